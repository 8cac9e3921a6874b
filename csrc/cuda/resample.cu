// Separable antialiased resampling, for alpha other than 0.5, and its backward (transposed: the same weights turned
// round, a gather).
//
// A block makes 16 x 32 pixels of the output. Rows of the input are weighted together first, for every column under
// the tile, into shared memory; then those columns. The output is written once and the input read once, but for
// the rows and columns that neighbouring tiles share (2 of 16 at most where the output is the larger one, a step
// on each side where it is the smaller), which the cache has. Columns are taken in runs of RUN from left to right,
// sums staying in registers, so that no window is too wide for shared memory and no sum changes its order.
//
// The weights of a tile's rows and columns are worked out once, into tables. Of windows wider than those (more than
// TABLE taps, alpha below 0.13) the rest is worked out at each use: right at any size, slower.
#include "../common/antialias.h"

#include <algorithm>

#include "kernels.h"
#include "launch.cuh"

namespace phmdiff {
namespace cuda {
namespace {

constexpr int DOWN = 16, ACROSS = 32, WARPS = 8, TABLE = 16, RUN = 96;

// One axis: `from` pixels of the input make `to` of the output.
struct Side {
  int64_t from, to;
};

// The pixels of the input, start to stop, that one of the output is made of: those its own window, or where
// transposed those whose windows give it a weight.
template <typename A>
struct Reach {
  int64_t pixel, start, stop;
  Window<A> own;
};

template <bool TRANSPOSED, typename A>
__device__ __forceinline__ A weight_of(const Side& side, const Reach<A>& reach, int64_t k) {
  return TRANSPOSED ? window_weight(window<A>(k, side.to, side.from), reach.pixel) : window_weight(reach.own, k);
}

// Weights of 0, which only the ends have, are left out: what they lie at may be Inf.
template <bool TRANSPOSED, typename A>
__device__ __forceinline__ Reach<A> reach_of(const Side& side, int64_t pixel) {
  Reach<A> reach = {pixel, 0, 0, {}};
  if (pixel >= side.to) return reach;
  if constexpr (TRANSPOSED) {
    reach.start = first_reached(pixel, side.to, side.from);
    reach.stop = reach.start + MOST_REACHED < side.from ? reach.start + MOST_REACHED : side.from;
  } else {
    reach.own = window<A>(pixel, side.from, side.to);
    reach.start = reach.own.start, reach.stop = reach.start + reach.own.count;
  }
  while (reach.start < reach.stop && weight_of<TRANSPOSED>(side, reach, reach.start) == A(0)) ++reach.start;
  while (reach.start < reach.stop && weight_of<TRANSPOSED>(side, reach, reach.stop - 1) == A(0)) --reach.stop;
  return reach;
}

template <typename A>
struct Work {
  Reach<A> reach[DOWN + ACROSS];        // of the rows of the tile, then of its columns
  A table[DOWN + ACROSS][TABLE + 1];    // one more, so that columns lie in different banks
  A sums[DOWN][RUN];
};

// Calls add(k, weight) for the taps of an output that lie from `from` to `to`, in order.
template <bool TRANSPOSED, typename A, typename Add>
__device__ __forceinline__ void for_taps(const Work<A>& work, const Side& side, int output, int64_t from, int64_t to,
                                         const Add& add) {
  const Reach<A>& reach = work.reach[output];
  const int64_t start = reach.start, begin = from < start ? start : from, end = to < reach.stop ? to : reach.stop;
  const int64_t in_table = TRANSPOSED || end < start + TABLE ? end : start + TABLE;
  const A* table = work.table[output];
  for (int k = int(begin - start), last = int(in_table - start); k < last; ++k) add(start + k, table[k]);
  if constexpr (!TRANSPOSED) {
#pragma unroll 1
    for (int64_t k = begin < in_table ? in_table : begin; k < end; ++k) add(k, weight_of<TRANSPOSED>(side, reach, k));
  }
}

template <typename T, bool TRANSPOSED>
__global__ void __launch_bounds__(32 * WARPS, 4)
    resample_kernel(ResampleArgs a, Divisor down, Divisor across, int64_t tiles) {
  using A = wide_t<T>;
  static_assert(MOST_REACHED <= TABLE, "a transposed window fits into the tables");
  PHM_SHARED(Work<A>, work);
  const Side rows = {a.in_height, a.out_height}, cols = {a.in_width, a.out_width};
  const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Divided strip = divide(tile, across), plane = divide(strip.quotient, down);
    const int64_t first_row = plane.remainder * DOWN, first_col = strip.remainder * ACROSS;
    if (thread < DOWN + ACROSS)
      work.reach[thread] = thread < DOWN ? reach_of<TRANSPOSED, A>(rows, first_row + thread)
                                         : reach_of<TRANSPOSED, A>(cols, first_col + thread - DOWN);
    __syncthreads();
    for (int entry = thread; entry < (DOWN + ACROSS) * TABLE; entry += 32 * WARPS) {
      const int output = entry / TABLE;
      const Reach<A>& reach = work.reach[output];
      const int64_t k = reach.start + entry % TABLE;
      if (k < reach.stop)
        work.table[output][entry % TABLE] = weight_of<TRANSPOSED>(output < DOWN ? rows : cols, reach, k);
    }
    __syncthreads();
    const T* in = static_cast<const T*>(a.in) + plane.quotient * rows.from * cols.from;
    const int64_t begin = work.reach[DOWN].start;
    const int64_t end = work.reach[DOWN - 1 + left_of<ACROSS>(cols.to, first_col)].stop;
    A out[DOWN / WARPS];  // from -0, which leaves any first summand as it is
#pragma unroll
    for (int n = 0; n < DOWN / WARPS; ++n) out[n] = A(-0.0);
    for (int64_t run = begin; run < end; run += RUN) {
      const int count = left_of<RUN>(end, run);
      for (int r = warp; r < DOWN; r += WARPS) {
        for (int c = lane; c < count; c += 32) {
          A sum = A(-0.0);
          for_taps<TRANSPOSED>(work, rows, r, 0, rows.from, [&](int64_t k, A weight) {
            sum += weight * widen(load(in + k * cols.from + run + c));
          });
          work.sums[r][c] = sum;
        }
      }
      __syncthreads();
      for_taps<TRANSPOSED>(work, cols, DOWN + lane, run, run + count, [&](int64_t k, A weight) {
#pragma unroll
        for (int n = 0; n < DOWN / WARPS; ++n) out[n] += weight * work.sums[warp + n * WARPS][k - run];
      });
      __syncthreads();  // before the next run, or tile, overwrites what is read here
    }
#pragma unroll
    for (int n = 0; n < DOWN / WARPS; ++n) {
      const int64_t i = first_row + warp + n * WARPS, j = first_col + lane;
      if (i >= rows.to || j >= cols.to) continue;
      const int64_t offset = (plane.quotient * rows.to + i) * cols.to + j;
      if (a.add) out[n] += widen(load(static_cast<const T*>(a.add) + offset));
      static_cast<T*>(a.out)[offset] = narrow<T>(out[n]);
    }
  }
}

}  // namespace

template <typename T>
void resample(const ResampleArgs& a, cudaStream_t stream) {
  if (a.planes * a.in_height * a.in_width * a.out_height * a.out_width == 0) return;
  const int64_t down = ceil_div(a.out_height, DOWN), across = ceil_div(a.out_width, ACROSS);
  const int64_t tiles = a.planes * down * across;
  const dim3 block(32, WARPS, 1);
  if (a.transposed) {
    PHM_LAUNCH((resample_kernel<T, true>), blocks_of(tiles), block, stream, a, Divisor(down), Divisor(across), tiles);
  } else {
    PHM_LAUNCH((resample_kernel<T, false>), blocks_of(tiles), block, stream, a, Divisor(down), Divisor(across), tiles);
  }
  check_launch("resample");
}

#define PHM_INSTANTIATE(T) template void resample<T>(const ResampleArgs&, cudaStream_t);
PHM_INSTANTIATE(float)
PHM_INSTANTIATE(double)
PHM_INSTANTIATE(bfloat16)
PHM_INSTANTIATE(float16)

}  // namespace cuda
}  // namespace phmdiff
