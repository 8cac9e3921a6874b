// CUDA's runtime as far as csrc/cuda/*.cu use it, for a host compiler: found before the toolkit's own header of
// this name, it lets g++ compile those files unchanged, and a launch runs here, block after block.
//
// The threads of a block are fibers that change only where they meet a barrier, in an order that can be turned
// round: what one thread reads of another without a barrier between them comes out different, or as the NaN that
// shared memory holds when a block starts. Faults that need no wrong result are counted too: a barrier that part of a
// block misses, a vector access off its alignment, a write past a shared array, a
// read outside of every array, a launch out of limits.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = struct CUstream_st*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace emulated {

struct Settings {
  bool reversed;        // blocks and threads from last to first
  int64_t most_blocks;  // of a grid
  int64_t only_last;    // so many blocks run, the last of the grid: for images too large to go through
};
extern Settings settings;
extern dim3 thread, block, threads, blocks;  // threadIdx, blockIdx, blockDim, gridDim

void launch(dim3 grid, dim3 block, const std::function<void()>& kernel);
void barrier();
void fault(const char* what);
void* shared(size_t bytes);  // the block's next shared array, in the order they are met

void check_read(const void* p, size_t bytes);  // that all of it lies in one array made known

template <typename T>
T* accessed(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fault("an access off its alignment");
  return p;
}

}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block
#define blockDim emulated::threads
#define gridDim emulated::blocks

#define PHM_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), emulated::launch(grid, block, [&] { (kernel)(__VA_ARGS__); }))
#define PHM_SHARED(type, name) type& name = *static_cast<type*>(emulated::shared(sizeof(type)))
#define PHM_MAX_GRID emulated::settings.most_blocks

inline void __syncthreads() { emulated::barrier(); }

template <typename T>
T __ldg(const T* p) {
  emulated::check_read(p, sizeof(T));
  T value;
  std::memcpy(&value, emulated::accessed(p), sizeof(T));
  return value;
}

template <typename T>
void store_bits(T* p, T bits) {
  std::memcpy(emulated::accessed(p), &bits, sizeof(T));
}

inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }

using std::fabs;
template <typename T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
