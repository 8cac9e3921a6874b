// Separable resampling by tables: antialiased levels for alpha other than 0.5, and their backward (the same with
// the tables turned round). A unit is a row of the output: its rows of the input are weighted together first,
// then the columns.
#include <algorithm>

#include "kernels.h"
#include "rows.h"

namespace phmdiff {
namespace PHM_ISA {
namespace {

template <typename A>
void add_row(const A* __restrict in, A weight, int64_t n, A* __restrict sum) {
  PHM_VECTOR
  for (int64_t j = 0; j < n; ++j) sum[j] += weight * in[j];
}

template <typename A>
void set_row(const A* __restrict in, A weight, int64_t n, A* __restrict sum) {
  PHM_VECTOR
  for (int64_t j = 0; j < n; ++j) sum[j] = weight * in[j];
}

// Columns: for each tap a gather, so that a vector holds neighbouring outputs.
template <typename A>
void columns(const A* __restrict in, const Axis<A>& axis, A* __restrict out) {
  const int32_t* __restrict start = axis.start.data();
  for (int64_t k = 0; k < axis.taps; ++k) {
    const A* __restrict weight = axis.weight.data() + k * axis.out;
    const A* __restrict from = in + k;
    if (k == 0) {
      PHM_VECTOR
      for (int64_t i = 0; i < axis.out; ++i) out[i] = weight[i] * from[start[i]];
    } else {
      PHM_VECTOR
      for (int64_t i = 0; i < axis.out; ++i) out[i] += weight[i] * from[start[i]];
    }
  }
}

}  // namespace

template <typename T>
void resample(const ResampleArgs& a, const Tables<wide_t<T>>& tables, int64_t begin, int64_t end) {
  using A = wide_t<T>;
  const Axis<A>&rows = tables.rows, &cols = tables.cols;
  // The last windows may look beyond a row, with weight 0: the scratch row is longer, and 0 there.
  const Rows<A> scratch(4, std::max(cols.in + cols.taps, cols.out));
  A* sum = scratch[1];
  std::fill(sum + cols.in, sum + cols.in + cols.taps, A(0));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / rows.out, i = unit % rows.out;
    for (int64_t k = 0; k < rows.taps; ++k) {
      const A weight = rows.weight[k * rows.out + i];
      if (k && weight == A(0)) continue;
      const T* row = static_cast<const T*>(a.in) + (plane * rows.in + rows.start[i] + k) * cols.in;
      const A* in = read_row(row, cols.in, scratch[0]);
      k == 0 ? set_row(in, weight, cols.in, sum) : add_row(in, weight, cols.in, sum);
    }
    T* out = static_cast<T*>(a.out) + unit * cols.out;
    A* wide = place(out, scratch[2]);
    columns(sum, cols, wide);
    if (a.add) add_row(read_row(static_cast<const T*>(a.add) + unit * cols.out, cols.out, scratch[3]), A(1), cols.out, wide);
    written(wide, cols.out, out);
  }
}

#define PHM_INSTANTIATE(T) \
  template void resample<T>(const ResampleArgs&, const Tables<wide_t<T>>&, int64_t, int64_t);
PHM_INSTANTIATE(float)
PHM_INSTANTIATE(double)
PHM_INSTANTIATE(bfloat16)
PHM_INSTANTIATE(float16)

}  // namespace PHM_ISA
}  // namespace phmdiff
