// The merged state of Eq. 6, its relatives (upsampling alone or added, the error between levels) and their backward.
//
// Bound by memory: forward moves y, eps and out once and a quarter as much of coarse; backward the same the other
// way round. A thread has a pair of rows and 16 bytes of each (two 16-byte loads of y and of eps in flight, and
// three rows of coarse, which its neighbours above and below find in the cache): both rows of the pair lie between
// the same coarse row and one more each. Backward's thread reads the pair and a row above and below, which are
// its neighbours' pairs: each row comes from memory once and from the cache twice.
//
// Which images are given is asked at run time: the answer is one for the grid, so it costs a branch; only drawing
// noise, which takes registers, is a kernel of its own.
#include "../common/merge.h"

#include "kernels.h"
#include "launch.cuh"

namespace phmdiff {
namespace cuda {
namespace {

// Blocks of a multiprocessor that registers have to suffice for: a pair of rows of a
// 16-bit type is 16 elements in work, and a double takes two registers.
template <typename T>
constexpr int BLOCKS = sizeof(T) == 4 ? 3 : 2;

// Sizes and what an index is divided by.
struct Frame {
  int64_t height, width, half_height, half_width;
  Divisor pairs, channels;
};

Frame frame_of(const Shape& s) {
  const int64_t h = half_of(s.height), w = half_of(s.width);
  return {s.height, s.width, h, w, Divisor(h), Divisor(s.channels)};
}

// A pair of rows of one plane.
struct Place {
  int64_t plane, b, c, k;
};

__device__ __forceinline__ Place place_of(const Frame& frame, int64_t row) {
  const Divided plane = divide(row, frame.pairs), sample = divide(plane.quotient, frame.channels);
  return {plane.quotient, sample.quotient, sample.remainder, plane.remainder};
}

template <typename T>
__device__ __forceinline__ const T* row_of(const Image& image, const Place& p, int64_t i) {
  return static_cast<const T*>(image.data) + p.b * image.batch + p.c * image.channel + i * image.row;
}

__device__ __forceinline__ int64_t held(int64_t i, int64_t size) { return i < 0 ? 0 : (i < size ? i : size - 1); }

// N / 2 coarse pixels from `column` on and one on each side, held at the edges.
template <typename T, int N>
struct CoarseRow {
  Row<T, N / 2> own;
  T left, right;

  // Pixel column - 1 + k, of which `exist` are in the row from `column` on.
  __device__ __forceinline__ wide_t<T> at(int k, int exist) const {
    return k == 0 ? widen(left) : k <= N / 2 && k <= exist ? own[k - 1] : widen(right);
  }
};

template <int N, typename T>
__device__ __forceinline__ CoarseRow<T, N> load_coarse(const T* row, int64_t column, int64_t width, bool whole) {
  return {load_row<N / 2>(row + column, left_of<N / 2>(width, column), whole), load(row + held(column - 1, width)),
          load(row + held(column + N / 2, width))};
}

// Normals of elements e .. e + N - 1 of a sample: element e is lane e % 4 of counter e / 4.
template <int N, typename A>
__device__ __forceinline__ void draw(const Stream& stream, int64_t e, A* out) {
  constexpr int COUNTERS = (N + 2) / 4 + 1;  // where e is not a multiple of 4, one more is begun
  const int lane = int(e % 4);
  float values[4 * COUNTERS];
#pragma unroll
  for (int q = 0; q < COUNTERS; ++q) {
    if (4 * q >= lane + N) continue;
    const Words w = philox(uint32_t(e / 4 + q), stream);
    const Pair first = normal_pair(w.w0, w.w1), second = normal_pair(w.w2, w.w3);
    values[4 * q] = first.cos, values[4 * q + 1] = first.sin;
    values[4 * q + 2] = second.cos, values[4 * q + 3] = second.sin;
  }
#pragma unroll
  for (int k = 0; k < N; ++k)  // by hand, so that no register is indexed
    out[k] = A(lane == 0 ? values[k] : lane == 1 ? values[k + 1] : lane == 2 ? values[k + 2] : values[k + 3]);
}

template <bool Y, bool EPS, bool COARSE, int N, typename T, typename A>
__device__ __forceinline__ void combine_row(const Row<T, N>& y, const A* eps, const A* up, const Factors<A>& f,
                                            A* out) {
#pragma unroll
  for (int k = 0; k < N; ++k)
    out[k] = merged<Y, EPS, COARSE>(Y ? y[k] : A(0), EPS ? eps[k] : A(0), COARSE ? up[k] : A(0), f);
}

template <int N, typename T, typename A>
__device__ __forceinline__ void combine(int given, const Row<T, N>& y, const A* eps, const A* up, const Factors<A>& f,
                                        A* out) {
  switch (given) {
    case 7: return combine_row<true, true, true, N>(y, eps, up, f, out);
    case 6: return combine_row<true, true, false, N>(y, eps, up, f, out);
    case 5: return combine_row<true, false, true, N>(y, eps, up, f, out);
    case 4: return combine_row<true, false, false, N>(y, eps, up, f, out);
    case 3: return combine_row<false, true, true, N>(y, eps, up, f, out);
    case 2: return combine_row<false, true, false, N>(y, eps, up, f, out);
    default: return combine_row<false, false, true, N>(y, eps, up, f, out);
  }
}

// Rows that can be read and written 16 bytes at a time; of coarse, 8.
struct Whole {
  bool y, eps, coarse, out;
};

template <typename T, bool DRAWN>
__global__ void __launch_bounds__(ROW_THREADS, BLOCKS<T>)
    forward_kernel(MergeArgs<wide_t<T>> a, Frame frame, RowGrid grid, Whole whole) {
  using A = wide_t<T>;
  constexpr int N = PACK<T>;
  const bool has_eps = DRAWN || a.eps.data;
  const int given = (a.y.data ? 4 : 0) + (has_eps ? 2 : 0) + (a.coarse.data ? 1 : 0);
  for (int64_t piece = blockIdx.x; piece < grid.pieces; piece += gridDim.x) {
    const auto [row, column] = row_and_column(grid, piece, N);
    if (row >= grid.rows || column >= frame.width) continue;
    const Place p = place_of(frame, row);
    const int left = left_of<N>(frame.width, column), rows = left_of<2>(frame.height, 2 * p.k);
    const int exist = left_of<N / 2>(frame.half_width, column / 2);
    Row<T, N> y[2] = {}, given_eps[2] = {};
    CoarseRow<T, N> coarse[3] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t i = 2 * p.k + r;
      if (a.y.data) y[r] = load_row<N>(row_of<T>(a.y, p, i) + column, r < rows ? left : 0, whole.y);
      if (!DRAWN && has_eps)
        given_eps[r] = load_row<N>(row_of<T>(a.eps, p, i) + column, r < rows ? left : 0, whole.eps);
    }
    if (a.coarse.data) {
#pragma unroll
      for (int r = 0; r < 3; ++r)
        coarse[r] = load_coarse<N>(row_of<T>(a.coarse, p, held(p.k - 1 + r, frame.half_height)), column / 2,
                                   frame.half_width, whole.coarse);
    }
    const Factors<A> f = factors_of(a.factors, p.b);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r >= rows) break;
      const int64_t i = 2 * p.k + r;
      A eps[N], v[N / 2 + 2], up[N], out[N];
      if constexpr (DRAWN) {
        draw<N>(stream_of(a.normals, p.b), (p.c * frame.height + i) * frame.width + column, eps);
      } else {
#pragma unroll
        for (int k = 0; k < N; ++k) eps[k] = given_eps[r][k];
      }
#pragma unroll
      for (int k = 0; k < N / 2 + 2; ++k) v[k] = between(coarse[1].at(k, exist), coarse[2 * r].at(k, exist));
#pragma unroll
      for (int k = 0; k < N / 2; ++k) {
        up[2 * k] = between(v[k + 1], v[k]);
        up[2 * k + 1] = between(v[k + 1], v[k + 2]);
      }
      combine<N>(given, y[r], eps, up, f, out);
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (a.absolute) out[k] = fabs(out[k]);
      store_row<N>(out, static_cast<T*>(a.out) + (p.plane * frame.height + i) * frame.width + column, left, whole.out);
    }
  }
}

template <int N, typename T>
__device__ __forceinline__ void store_scaled(void* to, int64_t offset, wide_t<T> factor, const Row<T, N>& in, int left,
                                             bool whole) {
  wide_t<T> out[N];
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = factor * in[k];
  store_row<N>(out, static_cast<T*>(to) + offset, left, whole);
}

// Whether y and eps are written 16 bytes at a time, coarse 8, and grad read 16.
template <typename T>
__global__ void __launch_bounds__(ROW_THREADS, BLOCKS<T>)
    backward_kernel(MergeBackwardArgs<wide_t<T>> a, Frame frame, RowGrid grid, Whole whole, bool whole_grad) {
  using A = wide_t<T>;
  constexpr int N = PACK<T>;
  for (int64_t piece = blockIdx.x; piece < grid.pieces; piece += gridDim.x) {
    const auto [row, column] = row_and_column(grid, piece, N);
    if (row >= grid.rows || column >= frame.width) continue;
    const Place p = place_of(frame, row);
    const Factors<A> f = factors_of(a.factors, p.b);
    const int left = left_of<N>(frame.width, column), rows = left_of<2>(frame.height, 2 * p.k);
    // Rows 2k - 1 to 2k + 2, held at the edges; of each, one column more on either side.
    Row<T, N> grad[4] = {};
    T before[4], after[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (!a.coarse && (r == 0 || r == 3)) continue;
      const int64_t i = 2 * p.k - 1 + r;
      const bool inside = i >= 0 && i < frame.height;  // a row that is not there is zeros: 0 times Inf is not 0
      const T* from = row_of<T>(a.grad, p, held(i, frame.height));
      grad[r] = load_row<N>(from + column, inside ? left : 0, whole_grad);
      if (!a.coarse) continue;
      before[r] = inside ? load(from + held(column - 1, frame.width)) : T{};
      after[r] = inside ? load(from + held(column + N, frame.width)) : T{};
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r >= rows) break;
      const int64_t offset = (p.plane * frame.height + 2 * p.k + r) * frame.width + column;
      if (a.y) store_scaled<N, T>(a.y, offset, f.y, grad[1 + r], left, whole.y);
      if (a.eps) store_scaled<N, T>(a.eps, offset, f.eps, grad[1 + r], left, whole.eps);
    }
    if (!a.coarse) continue;
    A weight[4], t[N + 2], out[N / 2];
#pragma unroll
    for (int r = 0; r < 4; ++r)
      weight[r] = adjoint_weight<A>(2 * p.k - 1 + r, p.k, frame.half_height, frame.height);
    // Rows first: column - 1 + k of them in t[k], 0 beyond the edges.
    const auto down = [&](A r0, A r1, A r2, A r3) {
      return adjoint_of(r0, r1, r2, r3, weight[0], weight[1], weight[2], weight[3]);
    };
    const A first = down(widen(before[0]), widen(before[1]), widen(before[2]), widen(before[3]));
    const A last = down(widen(after[0]), widen(after[1]), widen(after[2]), widen(after[3]));
    t[0] = column > 0 ? first : A(0);
    t[N + 1] = column + N < frame.width ? last : A(0);
#pragma unroll
    for (int k = 0; k < N; ++k)
      t[1 + k] = k < left ? down(grad[0][k], grad[1][k], grad[2][k], grad[3][k]) : A(0);
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      const int64_t j = column + 2 * k;  // columns j - 1 to j + 2, all of which there are but at the edges
      A w[4] = {A(0.25), A(0.75), A(0.75), A(0.25)};
      if (j == 0 || j + 2 >= frame.width)
#pragma unroll
        for (int n = 0; n < 4; ++n) w[n] = adjoint_weight<A>(j - 1 + n, j / 2, frame.half_width, frame.width);
      out[k] = f.coarse * adjoint_of(t[2 * k], t[2 * k + 1], t[2 * k + 2], t[2 * k + 3], w[0], w[1], w[2], w[3]);
    }
    T* to = static_cast<T*>(a.coarse) + (p.plane * frame.half_height + p.k) * frame.half_width + column / 2;
    store_row<N / 2>(out, to, (left + 1) / 2, whole.coarse);
  }
}

template <typename T>
bool whole_image(int bytes, const Image& image) {
  return aligned<T>(bytes, image.data, image.batch, image.channel, image.row);
}

RowGrid grid_of(const Shape& s, int pack) {
  return row_grid(s.batch * s.channels * half_of(s.height), s.width, pack);
}

}  // namespace

template <typename T>
void merge_forward(const MergeArgs<wide_t<T>>& a, cudaStream_t stream) {
  if (a.shape.batch * a.shape.channels * a.shape.height * a.shape.width == 0) return;
  const RowGrid grid = grid_of(a.shape, PACK<T>);
  const Whole whole = {whole_image<T>(16, a.y), whole_image<T>(16, a.eps), whole_image<T>(8, a.coarse),
                       aligned<T>(16, a.out, a.shape.width)};
  if (a.normals.sample_ids) {
    PHM_LAUNCH((forward_kernel<T, true>), blocks_of(grid.pieces), grid.block, stream, a, frame_of(a.shape), grid,
               whole);
  } else {
    PHM_LAUNCH((forward_kernel<T, false>), blocks_of(grid.pieces), grid.block, stream, a, frame_of(a.shape), grid,
               whole);
  }
  check_launch("merge_state");
}

template <typename T>
void merge_backward(const MergeBackwardArgs<wide_t<T>>& a, cudaStream_t stream) {
  const Shape& s = a.shape;
  if (s.batch * s.channels * s.height * s.width == 0 || (!a.y && !a.eps && !a.coarse)) return;
  const RowGrid grid = grid_of(s, PACK<T>);
  const Whole whole = {aligned<T>(16, a.y, s.width), aligned<T>(16, a.eps, s.width),
                       aligned<T>(8, a.coarse, half_of(s.width)), false};
  PHM_LAUNCH(backward_kernel<T>, blocks_of(grid.pieces), grid.block, stream, a, frame_of(s), grid, whole,
             whole_image<T>(16, a.grad));
  check_launch("merge_state backward");
}

#define PHM_INSTANTIATE(T)                                                            \
  template void merge_forward<T>(const MergeArgs<wide_t<T>>&, cudaStream_t);          \
  template void merge_backward<T>(const MergeBackwardArgs<wide_t<T>>&, cudaStream_t);
PHM_INSTANTIATE(float)
PHM_INSTANTIATE(double)
PHM_INSTANTIATE(bfloat16)
PHM_INSTANTIATE(float16)

}  // namespace cuda
}  // namespace phmdiff
