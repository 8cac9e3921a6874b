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
void add_row(const A* __restrict in, int64_t n, A* __restrict sum) {
  PHM_VECTOR
  for (int64_t j = 0; j < n; ++j) sum[j] = sum[j] + in[j];
}

// sum (+)= w0 r0 + w1 r1 + ..., one after the other; rows beyond `count` are not read.
template <bool FIRST, int COUNT, typename A>
void weigh_rows(const A* __restrict r0, const A* __restrict r1, const A* __restrict r2, const A* __restrict r3,
                const A* weight, int64_t n, A* __restrict sum) {
  const A w0 = weight[0], w1 = COUNT > 1 ? weight[1] : A(0), w2 = COUNT > 2 ? weight[2] : A(0),
          w3 = COUNT > 3 ? weight[3] : A(0);
  PHM_VECTOR
  for (int64_t j = 0; j < n; ++j) {
    A out = FIRST ? w0 * r0[j] : sum[j] + w0 * r0[j];
    if (COUNT > 1) out = out + w1 * r1[j];
    if (COUNT > 2) out = out + w2 * r2[j];
    if (COUNT > 3) out = out + w3 * r3[j];
    sum[j] = out;
  }
}

template <bool FIRST, typename A>
void weigh_rows(int count, const A* const (&r)[4], const A* weight, int64_t n, A* sum) {
  switch (count) {
    case 4: return weigh_rows<FIRST, 4>(r[0], r[1], r[2], r[3], weight, n, sum);
    case 3: return weigh_rows<FIRST, 3>(r[0], r[1], r[2], r[2], weight, n, sum);
    case 2: return weigh_rows<FIRST, 2>(r[0], r[1], r[1], r[1], weight, n, sum);
    default: return weigh_rows<FIRST, 1>(r[0], r[0], r[0], r[0], weight, n, sum);
  }
}

// How far behind a row the columns may look.
constexpr int64_t BEHIND = 32;

#if defined(__AVX512F__)
// Sixteen neighbouring outputs whose inputs lie within 32 neighbours: two registers, and one permutation of them a
// tap. Returns the first output left to do.
int64_t columns_by_permutation(const float* in, const Axis<float>& axis, float* out) {
  const int32_t* start = axis.start.data();
  int64_t i = 0;
  for (; i < axis.out; i += 16) {
    const int64_t count = std::min<int64_t>(16, axis.out - i), base = start[i];
    if (start[i + count - 1] + axis.taps - base > 32) break;
    const __mmask16 lanes = __mmask16((1u << count) - 1);
    const __m512 low = _mm512_loadu_ps(in + base), high = _mm512_loadu_ps(in + base + 16);
    __m512i index = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(lanes, start + i), _mm512_set1_epi32(int32_t(base)));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < axis.taps; ++k) {
      const __m512 weight = _mm512_maskz_loadu_ps(lanes, axis.weight.data() + k * axis.out + i);
      const __m512 part = _mm512_mul_ps(weight, _mm512_permutex2var_ps(low, index, high));
      const __mmask16 inside = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_OQ);
      sum = k ? _mm512_mask_add_ps(sum, inside, sum, part) : part;
      index = _mm512_add_epi32(index, _mm512_set1_epi32(1));
    }
    _mm512_mask_storeu_ps(out + i, lanes, sum);
  }
  return std::min(i, axis.out);
}
#endif

// Columns: for each tap a gather, so that a vector holds neighbouring outputs. Where a window has fewer taps than
// the longest, its weights end in zeros and what lies there (it may be Inf) is left alone; the first is never 0.
template <typename A>
void columns(const A* __restrict in, const Axis<A>& axis, A* __restrict out) {
  const int32_t* __restrict start = axis.start.data();
  int64_t first = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) first = columns_by_permutation(in, axis, out);
#endif
  for (int64_t k = 0; k < axis.taps; ++k) {
    const A* __restrict weight = axis.weight.data() + k * axis.out;
    const A* __restrict from = in + k;
    if (k == 0) {
      PHM_VECTOR
      for (int64_t i = first; i < axis.out; ++i) out[i] = weight[i] * from[start[i]];
    } else {
      PHM_VECTOR
      for (int64_t i = first; i < axis.out; ++i) {
        const A sum = out[i] + weight[i] * from[start[i]];
        out[i] = weight[i] != A(0) ? sum : out[i];
      }
    }
  }
}

}  // namespace

template <typename T>
void resample(const ResampleArgs& a, const Tables<wide_t<T>>& tables, int64_t begin, int64_t end) {
  using A = wide_t<T>;
  const Axis<A>&rows = tables.rows, &cols = tables.cols;
  // The last windows may look beyond a row, with weight 0: the scratch row is longer, and 0 there.
  const Rows<A> scratch(6, std::max(cols.in + cols.taps + BEHIND, cols.out));
  const Writer<T> writer(1, cols.out, a.planes * rows.out * cols.out * int64_t(sizeof(T)));
  A* sum = scratch[4];
  std::fill(sum + cols.in, sum + cols.in + cols.taps + BEHIND, A(0));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / rows.out, i = unit % rows.out;
    const A* in[4];
    A weight[4];
    int count = 0;
    bool first = true;
    const auto weigh = [&] {
      first ? weigh_rows<true>(count, in, weight, cols.in, sum) : weigh_rows<false>(count, in, weight, cols.in, sum);
      first = false, count = 0;
    };
    const T* plane_in = static_cast<const T*>(a.in) + plane * rows.in * cols.in;
    if (i + 2 < rows.out) {  // the rows that come in with the output after next
      const int64_t from = rows.start[i + 1] + rows.taps, to = rows.start[i + 2] + rows.taps;
      prefetch(reinterpret_cast<uintptr_t>(plane_in + from * cols.in), (to - from) * cols.in * int64_t(sizeof(T)));
    }
    for (int64_t k = 0; k < rows.taps; ++k) {
      weight[count] = rows.weight[k * rows.out + i];
      if (k && weight[count] == A(0)) continue;
      const T* row = plane_in + (rows.start[i] + k) * cols.in;
      in[count] = read_row(row, cols.in, scratch[count]);
      if (++count == 4) weigh();
    }
    if (count) weigh();
    T* out = static_cast<T*>(a.out) + unit * cols.out;
    A* wide = writer.place(out);
    columns(sum, cols, wide);
    if (a.add) add_row(read_row(static_cast<const T*>(a.add) + unit * cols.out, cols.out, scratch[5]), cols.out, wide);
    writer.written(out, cols.out);
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
