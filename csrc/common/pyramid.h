// Down and up by two: the element-wise arithmetic of PHMDiff Eq. 1 and Eq. 6. A is float or double.
//
// Down is the mean of 2 x 2 blocks, edge blocks over what exists. Up is bilinear at scale exactly 2,
// align_corners False: pixel i lies between coarse pixels near (weight 3/4) and far (1/4), held at the
// edges. Sums are written in one order, and no compiler here may contract a product and a sum, so every
// device and instruction set gives the same bits.
#pragma once

#include "macros.h"

namespace phmdiff {

PHM_HD int64_t half_of(int64_t n) { return (n + 1) / 2; }

// Sums of a block are taken column by column, then across: (top + bottom) left, (top + bottom) right.
template <typename A>
PHM_HD A mean_of(A left, A right, A weight) {
  return (left + right) * weight;
}

// The weight of each element of a block of which `rows` and `cols` (1 or 2 each) exist.
template <typename A>
PHM_HD A block_weight(int rows, int cols) {
  return A(1) / A(rows * cols);
}

struct Taps {
  int64_t near, far;
};

// The coarse pixels (of n) that pixel i lies between.
PHM_HD Taps taps(int64_t i, int64_t n) {
  const int64_t near = i / 2, other = i % 2 ? near + 1 : near - 1;
  return {near, other < 0 ? 0 : (other < n ? other : n - 1)};
}

template <typename A>
PHM_HD A between(A near, A far) {
  return A(0.75) * near + A(0.25) * far;
}

// Backward of up, as a gather: what coarse pixel k (of n) gets from pixel r (of size); r runs from 2k - 1 to 2k + 2.
template <typename A>
PHM_HD A adjoint_weight(int64_t r, int64_t k, int64_t n, int64_t size) {
  if (r < 0 || r >= size) return A(0);
  const Taps t = taps(r, n);
  return (t.near == k ? A(0.75) : A(0)) + (t.far == k ? A(0.25) : A(0));
}

template <typename A>
PHM_HD A adjoint_of(A r0, A r1, A r2, A r3, A w0, A w1, A w2, A w3) {
  return (w0 * r0 + w3 * r3) + (w1 * r1 + w2 * r2);
}

}  // namespace phmdiff
