// The orthonormal Haar transform of one 2 x 2 x 2 block: band 4 i + 2 j + k is the difference along the axes
// whose bit is set (i: X, j: Y, k: Z), band 0 the sum, all times 8^-1/2. It is its own inverse.
#pragma once

#include "macros.h"

namespace phmdiff {

// Sums and differences along one axis, written out: loops over an array of eight would keep a compiler from
// making vector instructions of the loop around them.
template <typename A>
PHM_HD void sum_and_difference(A& even, A& odd) {
  const A sum = even + odd;
  odd = even - odd;
  even = sum;
}

template <typename A>
PHM_HD void haar_block(A& v0, A& v1, A& v2, A& v3, A& v4, A& v5, A& v6, A& v7) {
  sum_and_difference(v0, v1), sum_and_difference(v2, v3), sum_and_difference(v4, v5), sum_and_difference(v6, v7);
  sum_and_difference(v0, v2), sum_and_difference(v1, v3), sum_and_difference(v4, v6), sum_and_difference(v5, v7);
  sum_and_difference(v0, v4), sum_and_difference(v1, v5), sum_and_difference(v2, v6), sum_and_difference(v3, v7);
  const A scale = A(0.35355339059327376220);
  v0 *= scale, v1 *= scale, v2 *= scale, v3 *= scale, v4 *= scale, v5 *= scale, v6 *= scale, v7 *= scale;
}

}  // namespace phmdiff
