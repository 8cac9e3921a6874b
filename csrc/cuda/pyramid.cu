// build_pyramid for alpha = 0.5 and its backward: up to six levels a launch.
//
// A block has a tile of 64 x 64 pixels, which is a whole number of pixels at each of six levels, so no block needs
// a neighbour's. Forward reads the tile once and writes levels 1 to 6: 1 + 1/3 times the input's bytes in all.
// Level 1 is made in registers, of 2 rows of 16 bytes; it and what follows lie in shared memory, in float. Backward
// reads every level's gradient once and writes the input's once, coarse to fine, a gather: 1 + 1/3 again.
//
// A seventh level starts another launch from the sixth as it was stored. Where that is a 16-bit type it has been
// rounded once there, while the CPU carries float on; float32 and float64 give the CPU's bits at any depth. Backward
// is one launch, and the CPU's bits, always: levels above the sixth are a chain of one pixel each under a tile.
#include "../common/pyramid.h"

#include <algorithm>

#include "kernels.h"
#include "launch.cuh"

namespace phmdiff {
namespace cuda {
namespace {

constexpr int TILE = 64, DEPTH = 6, THREADS = 128;

// Blocks of a multiprocessor that registers have to suffice for.
template <typename T>
constexpr int BLOCKS = sizeof(T) == 4 ? 8 : 6;

struct Level {
  void* data;
  int64_t height, width;
};

struct Tiles {
  Level level[MAX_LEVELS + 1];  // 0: the full image
  int64_t count;                // of tiles in all planes
  Divisor channels, down, across;
  bool whole[2];  // 16-byte rows of level 0, 8-byte rows of level 1
};

// Where a tile lies.
struct Place {
  int64_t plane, i, j;
};

__device__ __forceinline__ Place place_of(const Tiles& tiles, int64_t tile) {
  const Divided row = divide(tile, tiles.across), plane = divide(row.quotient, tiles.down);
  return {plane.quotient, plane.remainder, row.remainder};
}

__device__ __forceinline__ constexpr int side_of(int level) { return TILE >> level; }

// A tile's part of a level: its first pixel, and the rows and columns of it that exist: all, where FULL.
template <typename T, bool FULL>
struct Part {
  T* data;
  int64_t width;  // of the level
  int rows, cols;
  __device__ __forceinline__ bool has(int r, int c) const { return FULL || (r < rows && c < cols); }
  __device__ __forceinline__ bool has_row(int r) const { return FULL || r < rows; }
  __device__ __forceinline__ bool has_col(int c) const { return FULL || c < cols; }
};

template <typename T, bool FULL>
__device__ __forceinline__ Part<T, FULL> part_of(const Tiles& tiles, int level, const Place& p) {
  const Level& all = tiles.level[level];
  const int64_t i = p.i * side_of(level), j = p.j * side_of(level);
  return {static_cast<T*>(all.data) + (p.plane * all.height + i) * all.width + j, all.width,
          FULL ? side_of(level) : left_of<TILE>(all.height, i), FULL ? side_of(level) : left_of<TILE>(all.width, j)};
}

// Whether all of a tile exists. Then so does all of it at every level, and no index in it has to be looked at.
__device__ __forceinline__ bool is_full(const Tiles& tiles, const Place& p) {
  return (p.i + 1) * TILE <= tiles.level[0].height && (p.j + 1) * TILE <= tiles.level[0].width;
}

// Two levels beside each other in shared memory, an odd one and the even one after it. A row is one element
// longer than its pixels, so that columns lie in different banks.
template <typename A>
struct TwoLevels {
  A odd[(TILE / 2) * (TILE / 2 + 1)], even[(TILE / 4) * (TILE / 4 + 1)];
  __device__ __forceinline__ A* of(int level) { return level % 2 ? odd : even; }
};

__device__ __forceinline__ constexpr int at(int level, int i, int j) { return i * (side_of(level) + 1) + j; }

// Of a block of which one or two rows and columns exist; each is a constant here, and no division.
template <typename A>
__device__ __forceinline__ A weight_of(bool two_rows, bool two_cols) {
  return two_rows ? (two_cols ? block_weight<A>(2, 2) : block_weight<A>(2, 1))
                  : (two_cols ? block_weight<A>(1, 2) : block_weight<A>(1, 1));
}

// A block of two by two, or what of it exists.
template <typename A>
__device__ __forceinline__ A mean(A top_left, A top_right, A bottom_left, A bottom_right, bool two_rows,
                                  bool two_cols) {
  const A left = two_rows ? top_left + bottom_left : top_left, right = two_rows ? top_right + bottom_right : top_right;
  const A weight = weight_of<A>(two_rows, two_cols);
  return two_cols ? mean_of(left, right, weight) : left * weight;
}

template <bool FULL, typename T>
__device__ __forceinline__ void forward_tile(const Image& x, const Tiles& tiles, int levels, const Place& p,
                                             TwoLevels<wide_t<T>>& pair) {
  using A = wide_t<T>;
  constexpr int N = PACK<T>, ACROSS = TILE / N, DOWN = THREADS / ACROSS;
  const Divided image = divide(p.plane, tiles.channels);
  const auto full = part_of<T, FULL>(tiles, 0, p), half = part_of<T, FULL>(tiles, 1, p);
  const T* in = static_cast<const T*>(x.data) + image.quotient * x.batch + image.remainder * x.channel +
                p.i * TILE * x.row + p.j * TILE;
  // Level 1: a thread reads four rows of 16 bytes, all before it needs the first, and makes two of 8.
  const int c = threadIdx.x % ACROSS * N, cols = FULL ? N : full.cols - c;
#pragma unroll
  for (int step = 0; step < TILE; step += 4 * DOWN) {
    const int r = step + threadIdx.x / ACROSS * 4;
    if (!full.has_row(r) || cols <= 0) continue;
    Row<T, N> rows[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      rows[k] = load_row<N>(in + (r + k) * x.row + c, full.has_row(r + k) ? cols : 0, tiles.whole[0]);
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      if (!full.has_row(r + k)) break;
      A out[N / 2];
#pragma unroll
      for (int n = 0; n < N / 2; ++n) {
        out[n] = mean(rows[k][2 * n], rows[k][2 * n + 1], rows[k + 1][2 * n], rows[k + 1][2 * n + 1],
                      full.has_row(r + k + 1), FULL || 2 * n + 1 < cols);
        pair.odd[at(1, (r + k) / 2, c / 2 + n)] = out[n];
      }
      store_row<N / 2>(out, half.data + (r + k) / 2 * half.width + c / 2, FULL ? N / 2 : half.cols - c / 2,
                       tiles.whole[1]);
    }
  }
  for (int n = 2; n <= levels; ++n) {
    __syncthreads();
    const auto fine = part_of<T, FULL>(tiles, n - 1, p), coarse = part_of<T, FULL>(tiles, n, p);
    const A* from = pair.of(n - 1);
    A* into = pair.of(n);
    for (int pixel = threadIdx.x; pixel < side_of(n) * side_of(n); pixel += THREADS) {
      const int r = pixel >> (DEPTH - n), c = pixel & (side_of(n) - 1);
      if (!coarse.has(r, c)) continue;
      const A value = mean(from[at(n - 1, 2 * r, 2 * c)], from[at(n - 1, 2 * r, 2 * c + 1)],
                           from[at(n - 1, 2 * r + 1, 2 * c)], from[at(n - 1, 2 * r + 1, 2 * c + 1)],
                           fine.has_row(2 * r + 1), fine.has_col(2 * c + 1));
      into[at(n, r, c)] = value;
      coarse.data[r * coarse.width + c] = narrow<T>(value);
    }
  }
  __syncthreads();  // before the next tile takes this memory
}

template <typename T>
__global__ void __launch_bounds__(THREADS, BLOCKS<T>) forward_kernel(Image x, Tiles tiles, int levels) {
  PHM_SHARED(TwoLevels<wide_t<T>>, pair);
  for (int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const Place p = place_of(tiles, tile);
    if (is_full(tiles, p))
      forward_tile<true, T>(x, tiles, levels, p, pair);
    else
      forward_tile<false, T>(x, tiles, levels, p, pair);
  }
}

// The whole gradient of the one pixel a tile has of its last level: all levels above it gone through, a pixel each.
template <typename T>
__device__ wide_t<T> gradient_above(const Tiles& tiles, int levels, const Place& p) {
  wide_t<T> sum = 0;
  for (int n = levels; n >= DEPTH; --n) {
    const Level& level = tiles.level[n];
    const int64_t i = p.i >> (n - DEPTH), j = p.j >> (n - DEPTH);
    const T* data = static_cast<const T*>(level.data) + p.plane * level.height * level.width;
    const wide_t<T> own = widen(load(data + i * level.width + j));
    sum = n == levels ? own : own + weight_of<wide_t<T>>((i | 1) < level.height, (j | 1) < level.width) * sum;
  }
  return sum;
}

// This thread's gradients of one level of the tile, in registers, as they were read: a column of them, whose rows
// are STEP apart.
template <int LEVEL, typename T, bool FULL>
struct Own {
  static constexpr int SIDE = TILE >> LEVEL, STEP = THREADS / SIDE < SIDE ? THREADS / SIDE : SIDE;
  T value[SIDE / STEP];

  __device__ __forceinline__ void load_all(const Tiles& tiles, int levels, const Place& p) {
    const int r = threadIdx.x / SIDE, c = threadIdx.x % SIDE;
    if (LEVEL > levels || r >= STEP) return;
    const auto part = part_of<const T, FULL>(tiles, LEVEL, p);
    const T* from = part.data + r * part.width + c;
#pragma unroll
    for (int k = 0; k < SIDE / STEP; ++k, from += STEP * part.width)
      if (part.has(r + k * STEP, c)) value[k] = load(from);
  }

  // Adds what comes from the coarser level and lays the sums down for the finer one.
  __device__ __forceinline__ void combine(const Tiles& tiles, int levels, const Place& p, TwoLevels<wide_t<T>>& pair) {
    if (LEVEL > levels) return;
    const auto part = part_of<const T, FULL>(tiles, LEVEL, p);
    const int r0 = threadIdx.x / SIDE, c = threadIdx.x % SIDE;
#pragma unroll
    for (int r = r0, k = 0; k < SIDE / STEP; ++k, r += STEP) {
      if (r0 >= STEP) break;
      wide_t<T> sum = widen(value[k]);
      if (LEVEL == DEPTH && LEVEL < levels) sum = gradient_above<T>(tiles, levels, p);
      if (LEVEL < DEPTH && LEVEL < levels)
        sum = sum + weight_of<wide_t<T>>(part.has_row(r | 1), part.has_col(c | 1)) *
                        pair.of(LEVEL + 1)[at(LEVEL + 1, r / 2, c / 2)];
      pair.of(LEVEL)[at(LEVEL, r, c)] = sum;
    }
    __syncthreads();
  }
};

template <bool FULL, typename T>
__device__ __forceinline__ void backward_tile(const Tiles& tiles, int levels, const Place& p,
                                              TwoLevels<wide_t<T>>& pair) {
  using A = wide_t<T>;
  constexpr int N = PACK<T>, ACROSS = TILE / N, DOWN = THREADS / ACROSS;
  // All loads first: the sums below wait for one another, the loads need not.
  Own<1, T, FULL> g1 = {};
  Own<2, T, FULL> g2 = {};
  Own<3, T, FULL> g3 = {};
  Own<4, T, FULL> g4 = {};
  Own<5, T, FULL> g5 = {};
  Own<6, T, FULL> g6 = {};
  g6.load_all(tiles, levels, p), g5.load_all(tiles, levels, p), g4.load_all(tiles, levels, p);
  g3.load_all(tiles, levels, p), g2.load_all(tiles, levels, p), g1.load_all(tiles, levels, p);
  g6.combine(tiles, levels, p, pair), g5.combine(tiles, levels, p, pair), g4.combine(tiles, levels, p, pair);
  g3.combine(tiles, levels, p, pair), g2.combine(tiles, levels, p, pair), g1.combine(tiles, levels, p, pair);
  const auto full = part_of<T, FULL>(tiles, 0, p);
  const int c = threadIdx.x % ACROSS * N, cols = FULL ? N : full.cols - c;
  T* to = full.data + threadIdx.x / ACROSS * full.width + c;
#pragma unroll
  for (int step = 0; step < TILE; step += DOWN, to += DOWN * full.width) {
    const int r = step + threadIdx.x / ACROSS;
    if (!full.has_row(r) || cols <= 0) break;
    A out[N];
#pragma unroll
    for (int n = 0; n < N; ++n)
      out[n] = weight_of<A>(full.has_row(r | 1), full.has_col((c + n) | 1)) * pair.odd[at(1, r / 2, (c + n) / 2)];
    store_row<N>(out, to, cols, tiles.whole[0]);
  }
  __syncthreads();  // before the next tile overwrites level 1
}

template <typename T>
__global__ void __launch_bounds__(THREADS, BLOCKS<T>) backward_kernel(Tiles tiles, int levels) {
  PHM_SHARED(TwoLevels<wide_t<T>>, pair);
  for (int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const Place p = place_of(tiles, tile);
    if (is_full(tiles, p))
      backward_tile<true, T>(tiles, levels, p, pair);
    else
      backward_tile<false, T>(tiles, levels, p, pair);
  }
}

// Levels `first` to `last` of the arguments, `first` being the full image of this launch.
Tiles tiles_of(const PyramidArgs& a, void* full, int64_t height, int64_t width, int first, int last) {
  const int64_t down = ceil_div(height, TILE), across = ceil_div(width, TILE);
  Tiles tiles = {{}, a.shape.batch * a.shape.channels * down * across, Divisor(a.shape.channels), Divisor(down),
                 Divisor(across), {false, false}};
  tiles.level[0] = {full, height, width};
  for (int n = first + 1; n <= last; ++n) {
    height = half_of(height), width = half_of(width);
    tiles.level[n - first] = {a.level[n - 1], height, width};
  }
  return tiles;
}

}  // namespace

template <typename T>
void pyramid_forward(const PyramidArgs& a, cudaStream_t stream) {
  if (a.shape.batch * a.shape.channels * a.shape.height * a.shape.width == 0) return;
  Image x = a.x;
  int64_t height = a.shape.height, width = a.shape.width;
  for (int first = 0; first < a.levels; first += DEPTH) {
    const int last = std::min(first + DEPTH, a.levels);
    Tiles tiles = tiles_of(a, x.data, height, width, first, last);
    tiles.whole[0] = aligned<T>(16, x.data, x.batch, x.channel, x.row);
    tiles.whole[1] = aligned<T>(8, a.level[first], tiles.level[1].width);
    PHM_LAUNCH(forward_kernel<T>, blocks_of(tiles.count), THREADS, stream, x, tiles, last - first);
    check_launch("build_pyramid");
    const Level coarsest = tiles.level[last - first];
    height = coarsest.height, width = coarsest.width;
    x = {coarsest.data, a.shape.channels * height * width, height * width, width};
  }
}

template <typename T>
void pyramid_backward(const PyramidArgs& a, cudaStream_t stream) {
  if (a.levels == 0 || a.shape.batch * a.shape.channels * a.shape.height * a.shape.width == 0) return;
  Tiles tiles = tiles_of(a, a.x.data, a.shape.height, a.shape.width, 0, a.levels);
  tiles.whole[0] = aligned<T>(16, a.x.data, a.shape.width);
  PHM_LAUNCH(backward_kernel<T>, blocks_of(tiles.count), THREADS, stream, tiles, a.levels);
  check_launch("build_pyramid backward");
}

#define PHM_INSTANTIATE(T)                                            \
  template void pyramid_forward<T>(const PyramidArgs&, cudaStream_t); \
  template void pyramid_backward<T>(const PyramidArgs&, cudaStream_t);
PHM_INSTANTIATE(float)
PHM_INSTANTIATE(double)
PHM_INSTANTIATE(bfloat16)
PHM_INSTANTIATE(float16)

}  // namespace cuda
}  // namespace phmdiff
