// Antialiased bilinear resampling along one axis (for alpha other than 0.5 in PHMDiff Eq. 1), as
// F.interpolate(size=..., mode="bilinear", antialias=True, align_corners=False) defines it: a triangle as wide
// as the step between output pixels, cut off at the edges, its weights normalised to sum 1.
#pragma once

#include "macros.h"

namespace phmdiff {

template <typename A>
struct Window {
  int64_t start, count;
  A center, step, total;  // of the triangle; total is the sum of its weights
};

template <typename A>
PHM_HD A triangle(int64_t j, A center, A step) {
  const A distance = (A(j) - center + A(0.5)) / step;
  const A weight = A(1) - (distance < A(0) ? -distance : distance);
  return weight > A(0) ? weight : A(0);
}

// The input pixels (of `in`) that output pixel i (of `out` <= in) is made of.
template <typename A>
PHM_HD Window<A> window(int64_t i, int64_t in, int64_t out) {
  const A step = A(in) / A(out), center = step * (A(i) + A(0.5));
  int64_t start = int64_t(center - step + A(0.5)), stop = int64_t(center + step + A(0.5));
  start = start < 0 ? 0 : start;
  stop = stop > in ? in : stop;
  A total = A(0);
  for (int64_t j = start; j < stop; ++j) total += triangle(j, center, step);
  return {start, stop - start, center, step, total};
}

template <typename A>
PHM_HD A window_weight(const Window<A>& w, int64_t j) {
  return j >= w.start && j < w.start + w.count ? triangle(j, w.center, w.step) / w.total : A(0);
}

// The first output pixel whose window may hold input pixel j, and how many from there on may: for the backward.
// One more on each side than the triangles reach, because of rounding; weights outside are 0.
PHM_HD int64_t first_reached(int64_t j, int64_t in, int64_t out) {
  const int64_t i = (j * out) / in - 2;
  return i < 0 ? 0 : i;
}

constexpr int64_t MOST_REACHED = 6;

// The most pixels a window has.
PHM_HD int64_t window_taps(int64_t in, int64_t out) { return 2 * ((in + out - 1) / out) + 1; }

}  // namespace phmdiff
