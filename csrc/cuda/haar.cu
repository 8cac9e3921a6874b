// The 3D Haar transform and its inverse: each element of the volume and of the bands is moved once, 2 x 4 bytes a
// voxel in float. A thread takes 2 x 2 rows of 16 bytes along z, which are half as many elements of each of the
// eight bands (8 bytes each): it needs nothing of its neighbours, so there is no shared memory.
#include "../common/haar.h"

#include "../common/pyramid.h"
#include "kernels.h"
#include "launch.cuh"

namespace phmdiff {
namespace cuda {
namespace {

struct Volume {
  int64_t x, y, z, half_z;  // of the volume; of a band
  Divisor half_x, half_y, channels;
  int64_t apart;                 // between the bands of one sample
  bool whole_rows, whole_bands;  // 16-byte rows of the volume, 8-byte rows of the bands
};

// Where row `row` of all (sample, channel, i, j) lies in the volume and in band 0.
struct Place {
  int64_t i, j, volume, band;
};

__device__ __forceinline__ Place place_of(const Volume& v, int64_t row) {
  const Divided in_x = divide(row, v.half_y), in_volume = divide(in_x.quotient, v.half_x);
  const Divided sample = divide(in_volume.quotient, v.channels);
  const int64_t i = in_volume.remainder, j = in_x.remainder;
  const int64_t band = sample.quotient * 8 * v.apart +
                       ((sample.remainder * v.half_x.by + i) * v.half_y.by + j) * v.half_z;
  return {i, j, ((in_volume.quotient * v.x + 2 * i) * v.y + 2 * j) * v.z, band};
}

template <typename T>
__global__ void __launch_bounds__(ROW_THREADS, 3) forward_kernel(HaarArgs a, Volume v, RowGrid grid) {
  using A = wide_t<T>;
  constexpr int N = PACK<T>;
  for (int64_t piece = blockIdx.x; piece < grid.pieces; piece += gridDim.x) {
    const auto [row, column] = row_and_column(grid, piece, N);
    if (row >= grid.rows || column >= v.z) continue;
    const Place p = place_of(v, row);
    Row<T, N> in[4];
    A out[8][N / 2];
#pragma unroll
    for (int r = 0; r < 4; ++r) {  // zeros beyond an odd side
      const int left = 2 * p.i + r / 2 < v.x && 2 * p.j + r % 2 < v.y ? left_of<N>(v.z, column) : 0;
      const T* from = static_cast<const T*>(a.in) + p.volume + (r / 2 * v.y + r % 2) * v.z + column;
      in[r] = load_row<N>(from, left, v.whole_rows);
    }
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      A v0 = in[0][2 * k], v1 = in[0][2 * k + 1], v2 = in[1][2 * k], v3 = in[1][2 * k + 1];
      A v4 = in[2][2 * k], v5 = in[2][2 * k + 1], v6 = in[3][2 * k], v7 = in[3][2 * k + 1];
      haar_block(v0, v1, v2, v3, v4, v5, v6, v7);
      out[0][k] = v0, out[1][k] = v1, out[2][k] = v2, out[3][k] = v3;
      out[4][k] = v4, out[5][k] = v5, out[6][k] = v6, out[7][k] = v7;
    }
#pragma unroll
    for (int n = 0; n < 8; ++n)
      store_row<N / 2>(out[n], static_cast<T*>(a.out) + p.band + n * v.apart + column / 2,
                       left_of<N / 2>(v.half_z, column / 2), v.whole_bands);
  }
}

template <typename T>
__global__ void __launch_bounds__(ROW_THREADS, 3) inverse_kernel(HaarArgs a, Volume v, RowGrid grid) {
  using A = wide_t<T>;
  constexpr int N = PACK<T>;
  for (int64_t piece = blockIdx.x; piece < grid.pieces; piece += gridDim.x) {
    const auto [row, column] = row_and_column(grid, piece, N);
    if (row >= grid.rows || column >= v.z) continue;
    const Place p = place_of(v, row);
    Row<T, N / 2> in[8];
    A out[4][N];
#pragma unroll
    for (int n = 0; n < 8; ++n)
      in[n] = load_row<N / 2>(static_cast<const T*>(a.in) + p.band + n * v.apart + column / 2,
                              left_of<N / 2>(v.half_z, column / 2), v.whole_bands);
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      A v0 = in[0][k], v1 = in[1][k], v2 = in[2][k], v3 = in[3][k];
      A v4 = in[4][k], v5 = in[5][k], v6 = in[6][k], v7 = in[7][k];
      haar_block(v0, v1, v2, v3, v4, v5, v6, v7);
      out[0][2 * k] = v0, out[0][2 * k + 1] = v1, out[1][2 * k] = v2, out[1][2 * k + 1] = v3;
      out[2][2 * k] = v4, out[2][2 * k + 1] = v5, out[3][2 * k] = v6, out[3][2 * k + 1] = v7;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {  // cropped at an odd side
      const int left = 2 * p.i + r / 2 < v.x && 2 * p.j + r % 2 < v.y ? left_of<N>(v.z, column) : 0;
      store_row<N>(out[r], static_cast<T*>(a.out) + p.volume + (r / 2 * v.y + r % 2) * v.z + column, left,
                   v.whole_rows);
    }
  }
}

template <typename T>
Volume volume_of(const HaarArgs& a, const void* volume, const void* bands) {
  const int64_t x = half_of(a.x), y = half_of(a.y), z = half_of(a.z);
  return {a.x, a.y, a.z, z, Divisor(x), Divisor(y), Divisor(a.channels), a.channels * x * y * z,
          aligned<T>(16, volume, a.z), aligned<T>(8, bands, z)};
}

}  // namespace

template <typename T>
void haar_forward(const HaarArgs& a, cudaStream_t stream) {
  if (a.batch * a.channels * a.x * a.y * a.z == 0) return;
  const RowGrid grid = row_grid(a.batch * a.channels * half_of(a.x) * half_of(a.y), a.z, PACK<T>);
  PHM_LAUNCH(forward_kernel<T>, blocks_of(grid.pieces), grid.block, stream, a, volume_of<T>(a, a.in, a.out), grid);
  check_launch("haar3d");
}

template <typename T>
void haar_inverse(const HaarArgs& a, cudaStream_t stream) {
  if (a.batch * a.channels * a.x * a.y * a.z == 0) return;
  const RowGrid grid = row_grid(a.batch * a.channels * half_of(a.x) * half_of(a.y), a.z, PACK<T>);
  PHM_LAUNCH(inverse_kernel<T>, blocks_of(grid.pieces), grid.block, stream, a, volume_of<T>(a, a.out, a.in), grid);
  check_launch("inverse_haar3d");
}

#define PHM_INSTANTIATE(T)                                      \
  template void haar_forward<T>(const HaarArgs&, cudaStream_t); \
  template void haar_inverse<T>(const HaarArgs&, cudaStream_t);
PHM_INSTANTIATE(float)
PHM_INSTANTIATE(double)
PHM_INSTANTIATE(bfloat16)
PHM_INSTANTIATE(float16)

}  // namespace cuda
}  // namespace phmdiff
