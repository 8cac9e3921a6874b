// Rows in the wide type: what every CPU kernel is made of. Loops are plain, so the compiler makes them vector
// instructions of whichever set the file is compiled for.
#pragma once

#include "../common/types.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__AVX2__)
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

inline void prefetch(uintptr_t from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const void*>(from + uintptr_t(at)));
}

// Ask for the row some 4 KiB further on, which a walk over rows comes to soon: hardware stops at every page.
template <typename T>
inline void prefetch_ahead(const T* row, int64_t n, int64_t stride) {
  const int64_t bytes = n * int64_t(sizeof(T)), apart = stride * int64_t(sizeof(T));
  prefetch(reinterpret_cast<uintptr_t>(row) + uintptr_t(apart * (bytes < 4096 ? 4096 / (bytes + 1) : 1)), bytes);
}

// An operation on images this large writes past the caches: with its inputs it fills them several times over, so
// little of what it writes would still be there, and a line that is written whole need not be fetched first.
constexpr int64_t STREAMED_BYTES = int64_t(8) << 20;

// Copy a row past the caches; lines it does not fill are written the usual way.
template <typename T>
inline void stream_row(const T* in, int64_t n, T* out) {
#if defined(__AVX512F__)
  const char* from = reinterpret_cast<const char*>(in);
  char* to = reinterpret_cast<char*>(out);
  char* const end = to + n * int64_t(sizeof(T));
  const int64_t head = std::min<int64_t>(end - to, -reinterpret_cast<intptr_t>(to) & 63);
  std::memcpy(to, from, size_t(head));
  to += head, from += head;
  for (; to + 64 <= end; to += 64, from += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  std::memcpy(to, from, size_t(end - to));
#elif defined(__AVX2__)
  const char* from = reinterpret_cast<const char*>(in);
  char* to = reinterpret_cast<char*>(out);
  char* const end = to + n * int64_t(sizeof(T));
  const int64_t head = std::min<int64_t>(end - to, -reinterpret_cast<intptr_t>(to) & 31);
  std::memcpy(to, from, size_t(head));
  to += head, from += head;
  for (; to + 32 <= end; to += 32, from += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  std::memcpy(to, from, size_t(end - to));
#else
  std::copy(in, in + n, out);
#endif
}

// After streamed rows, before anybody else may read them.
inline void streamed() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Where results go: straight to memory, or, for large outputs, to a scratch row that is then streamed there.
template <typename T>
class Writer {
 public:
  using A = wide_t<T>;
  Writer(int64_t rows, int64_t length, int64_t image_bytes)
      : stream_(image_bytes >= STREAMED_BYTES), wide_(rows, length), narrow_(rows, length) {}
  ~Writer() {
    if (stream_) streamed();
  }
  // Write a row here ...
  A* place(T* out, int64_t which = 0) const {
    if constexpr (std::is_same_v<T, A>) return stream_ ? wide_[which] : out;
    return wide_[which];
  }
  // ... and say so.
  void written(T* out, int64_t n, int64_t which = 0) const {
    if constexpr (std::is_same_v<T, A>) {
      if (stream_) stream_row(wide_[which], n, out);
    } else if (stream_) {
      narrow_row(wide_[which], n, narrow_[which]);
      stream_row(narrow_[which], n, out);
    } else {
      narrow_row(wide_[which], n, out);
    }
  }

 private:
  bool stream_;
  Rows<A> wide_;
  Rows<T> narrow_;
};

}  // namespace PHM_ISA
}  // namespace phmdiff
