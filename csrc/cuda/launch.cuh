// What every kernel file here shares: launches that are checked, 16-byte accesses, and the split of an index.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "../common/types.h"

// tests/cuda_on_cpu compiles these files for the host and brings its own of what follows.
#if defined(__CUDACC__)
#define PHM_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define PHM_SHARED(type, name) __shared__ type name
#define PHM_MAX_GRID 0x7fffffff

// Written out: of an assignment beside a branch that stores the same elements one by one, the compiler makes
// stores of 4 bytes.
__device__ __forceinline__ void store_bits(uint4* p, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w));
}
__device__ __forceinline__ void store_bits(uint2* p, uint2 v) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y));
}
#endif

namespace phmdiff {
namespace cuda {

// Blocks for `count` pieces of work, along x, the one dimension of a grid that goes beyond 65535. Every kernel
// steps over its pieces by gridDim.x, so more pieces than blocks can be are no special case.
inline unsigned blocks_of(int64_t count) { return unsigned(count < PHM_MAX_GRID ? count : PHM_MAX_GRID); }

inline void check_launch(const char* name) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
}

constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

struct Divided {
  int64_t quotient, remainder;
};

// Division by a number known at launch. The compiler's own 64-bit division is a subroutine of some hundred
// instructions whose call makes kernels spill.
struct Divisor {
  int64_t by;
  uint64_t inverse;  // 2^64 / by, at most 1 too small
  explicit Divisor(int64_t d) : by(d), inverse(~uint64_t(0) / uint64_t(d)) {}
};

// For n from 0 to 2^63 - 1: the product is short of n / by by less than one.
__device__ __forceinline__ Divided divide(int64_t n, const Divisor& d) {
  int64_t quotient = int64_t(__umul64hi(uint64_t(n), d.inverse)), remainder = n - quotient * d.by;
  if (remainder >= d.by) ++quotient, remainder -= d.by;
  return {quotient, remainder};
}

// Neighbouring elements a thread reads and writes as one: 16 bytes.
template <typename T>
constexpr int PACK = 16 / sizeof(T);

// Whether everything at `address` plus multiples of the `steps` (in elements) can be accessed `bytes` at a time.
template <typename T, typename... Steps>
bool aligned(int bytes, const void* address, Steps... steps) {
  return (reinterpret_cast<uintptr_t>(address) | ... | uintptr_t(steps * int64_t(sizeof(T)))) % bytes == 0;
}

// Inputs go through the read-only cache.
__device__ __forceinline__ float load(const float* p) { return __ldg(p); }
__device__ __forceinline__ double load(const double* p) { return __ldg(p); }
__device__ __forceinline__ bfloat16 load(const bfloat16* p) {
  return bfloat16{__ldg(reinterpret_cast<const unsigned short*>(p))};
}
__device__ __forceinline__ float16 load(const float16* p) {
  return float16{__ldg(reinterpret_cast<const unsigned short*>(p))};
}

// How many of the elements from `at` on exist, where at most N matter.
template <int N>
__device__ __forceinline__ int left_of(int64_t size, int64_t at) {
  return size - at < N ? int(size - at) : N;
}

// N neighbouring elements (16 bytes or 8) as they lie in memory. What is read is widened where it is used: to do so
// at once would have a thread wait for each of its loads before it starts the next.
template <typename T, int N>
struct Row {
  static constexpr int BYTES = N * sizeof(T), WORDS = BYTES / 4;
  static_assert(BYTES == 16 || BYTES == 8, "one access");
  uint32_t words[WORDS];

  __device__ __forceinline__ T get(int k) const {
    T element;
    if constexpr (sizeof(T) == 2) {
      element = T{uint16_t(words[k / 2] >> (k % 2 * 16))};
    } else {
      memcpy(&element, words + k * (sizeof(T) / 4), sizeof(T));
    }
    return element;
  }
  // In order of k: an even element of 16 bits clears the odd one beside it.
  __device__ __forceinline__ void set(int k, T element) {
    if constexpr (sizeof(T) == 2) {
      words[k / 2] = k % 2 ? words[k / 2] | uint32_t(element.bits) << 16 : uint32_t(element.bits);
    } else {
      memcpy(words + k * (sizeof(T) / 4), &element, sizeof(T));
    }
  }
  __device__ __forceinline__ wide_t<T> operator[](int k) const { return widen(get(k)); }
};

// Elements p[0] to p[N - 1] of which `left` exist, the others 0; in one access where `whole` allows.
template <int N, typename T>
__device__ __forceinline__ Row<T, N> load_row(const T* p, int left, bool whole) {
  Row<T, N> row;
  if (whole && left >= N) {
    if constexpr (row.BYTES == 16) {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(p));
      row.words[0] = bits.x, row.words[1] = bits.y, row.words[2] = bits.z, row.words[3] = bits.w;
    } else {
      const uint2 bits = __ldg(reinterpret_cast<const uint2*>(p));
      row.words[0] = bits.x, row.words[1] = bits.y;
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) row.set(k, k < left ? load(p + k) : T{});
  }
  return row;
}

// The first `left` of N elements, narrowed.
template <int N, typename T>
__device__ __forceinline__ void store_row(const wide_t<T>* in, T* p, int left, bool whole) {
  Row<T, N> row;
#pragma unroll
  for (int k = 0; k < N; ++k) row.set(k, narrow<T>(in[k]));
  if (whole && left >= N) {
    if constexpr (row.BYTES == 16) {
      const uint4 bits = {row.words[0], row.words[1], row.words[2], row.words[3]};
      store_bits(reinterpret_cast<uint4*>(p), bits);
    } else {
      const uint2 bits = {row.words[0], row.words[1]};
      store_bits(reinterpret_cast<uint2*>(p), bits);
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (k < left) p[k] = row.get(k);
  }
}

// Blocks that walk rows: `across` threads side by side, each with `pack` elements of a row, the rest of the 256
// threads on further rows; a piece of work is one such patch of rows.
struct RowGrid {
  int64_t rows, pieces;
  Divisor across_pieces;
  dim3 block;
};

constexpr int ROW_THREADS = 256;

inline RowGrid row_grid(int64_t rows, int64_t width, int pack) {
  unsigned across = 8;
  while (across < 64 && int64_t(across) * pack < width) across *= 2;
  const unsigned down = ROW_THREADS / across;
  const int64_t across_pieces = ceil_div(width, int64_t(across) * pack);
  return {rows, across_pieces * ceil_div(rows, down), Divisor(across_pieces), dim3(across, down, 1)};
}

// Row and first column of this thread in a piece.
__device__ __forceinline__ Divided row_and_column(const RowGrid& grid, int64_t piece, int pack) {
  const Divided at = divide(piece, grid.across_pieces);
  return {at.quotient * blockDim.y + threadIdx.y, (at.remainder * blockDim.x + threadIdx.x) * pack};
}

}  // namespace cuda
}  // namespace phmdiff
