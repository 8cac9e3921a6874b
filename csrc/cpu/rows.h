// Rows in the wide type: what every CPU kernel is made of. Loops are plain, so the compiler makes them vector
// instructions of whichever set the file is compiled for.
#pragma once

#include "../common/types.h"

#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define PHM_VECTOR _Pragma("GCC ivdep")

namespace phmdiff {
namespace PHM_ISA {

// Scratch memory of a thread, 64-byte aligned rows.
template <typename A>
class Rows {
 public:
  Rows(int64_t rows, int64_t length)
      : stride_((length + 2 * PAD + 15) / 16 * 16),
        data_(static_cast<A*>(::operator new(size_t(rows * stride_) * sizeof(A), std::align_val_t(64)))) {}
  // A row has room for PAD elements in front of its first, which is aligned, and as many behind.
  A* operator[](int64_t row) const { return data_.get() + row * stride_ + PAD; }

 private:
  static constexpr int64_t PAD = 16;
  struct Free {
    void operator()(A* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  int64_t stride_;
  std::unique_ptr<A, Free> data_;
};

template <typename T>
inline void widen_row(const T* __restrict in, int64_t n, wide_t<T>* __restrict out) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float16>)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  PHM_VECTOR
  for (; i < n; ++i) out[i] = widen(in[i]);
}

template <typename T>
inline void narrow_row(const wide_t<T>* __restrict in, int64_t n, T* __restrict out) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float16>)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  PHM_VECTOR
  for (; i < n; ++i) out[i] = narrow<T>(in[i]);
}

// The row itself where it is wide already, else widened into `scratch`.
template <typename T>
inline const wide_t<T>* read_row(const T* in, int64_t n, wide_t<T>* scratch) {
  if constexpr (std::is_same_v<T, wide_t<T>>) return in;
  widen_row(in, n, scratch);
  return scratch;
}

// Where a row is to be written: in place where it is wide already; `written` then brings it there.
template <typename T>
inline wide_t<T>* place(T* out, wide_t<T>* scratch) {
  if constexpr (std::is_same_v<T, wide_t<T>>) return out;
  return scratch;
}

template <typename T>
inline void written(const wide_t<T>* row, int64_t n, T* out) {
  if constexpr (!std::is_same_v<T, wide_t<T>>) narrow_row(row, n, out);
}

}  // namespace PHM_ISA
}  // namespace phmdiff
