// Products of matrices made of words of 32 bits: a float, or two bfloat16 that meet two others, whose products float32
// holds exactly. An element is one chain of sums in the order of its terms, the second of a pair before the first,
// which is what the processor's own instruction does: no bit depends on the instruction set, but for numbers below
// 1e-37, which that one takes for 0.
#pragma once

#include "rows.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace phmdiff {
namespace PHM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, TALL = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, TALL = 4;
#else
constexpr int WIDTH = 4, TALL = 2;
#endif
constexpr int LANES = 16, PARTS = LANES / WIDTH;  // rows in scratch memory are a multiple of LANES long
typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Bits __attribute__((vector_size(4 * WIDTH)));

inline int64_t rounded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }

inline uint32_t word_at(const void* words, int64_t i) {
  uint32_t word;
  std::memcpy(&word, static_cast<const char*>(words) + 4 * i, 4);
  return word;
}

template <typename T>
constexpr int64_t PER_WORD = 4 / int64_t(sizeof(T));
template <typename T>
inline int64_t words(int64_t n) {
  return (n + PER_WORD<T> - 1) / PER_WORD<T>;
}

// Rows of words, `row` words from one to the next.
struct Matrix {
  const float* data;
  int64_t row;
};

// The left side of a product: words from one row of the result to the next, and from one term to the next.
struct Left {
  const void* data;
  int64_t row, step;
  Left at(int64_t r) const { return {static_cast<const char*>(data) + 4 * r * row, row, step}; }
};

// R rows and V vectors of c = a b, of `depth` words.
template <typename T, int R, int V>
struct Tile {
  static void run(Left a, Matrix b, int64_t depth, float* c, int64_t c_row) {
    Vector sum[R][V] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Vector right[V], second[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        right[v] = load(b.data + k * b.row + v * WIDTH);
        if constexpr (std::is_same_v<T, bfloat16>) {
          second[v] = (Vector)((Bits)right[v] & int32_t(0xffff0000));
          right[v] = (Vector)((Bits)right[v] << 16);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const uint32_t word = word_at(a.data, r * a.row + k * a.step);
        if constexpr (std::is_same_v<T, bfloat16>) {
          const float left = bits_float(word << 16), left_second = bits_float(word & 0xffff0000u);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            sum[r][v] += left_second * second[v];
            sum[r][v] += left * right[v];
          }
        } else {
          const float left = bits_float(word);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(c + r * c_row + v * WIDTH, sum[r][v]);
  }
};

// The processor's own product of pairs, where it has one.
struct Native {};
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 11)
template <int R, int V>
struct Tile<Native, R, V> {
  __attribute__((target("avx512bf16"))) static void run(Left a, Matrix b, int64_t depth, float* c, int64_t c_row) {
    __m512 sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; ++k) {
      __m512bh right[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b.data + k * b.row + v * WIDTH);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512bh left = (__m512bh)_mm512_set1_epi32(int32_t(word_at(a.data, r * a.row + k * a.step)));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * c_row + v * WIDTH, sum[r][v]);
  }
};
bool has_native() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}
#else
template <int R, int V>
struct Tile<Native, R, V> : Tile<bfloat16, R, V> {};
bool has_native() { return false; }
#endif

// `rows` rows, R at a time; of the last few some twice, rather than a few alone.
template <typename T, int R, int V>
inline void tiles(int64_t row, int64_t rows, Left a, Matrix b, int64_t depth, float* c, int64_t c_row) {
  for (; row + R <= rows; row += R) Tile<T, R, V>::run(a.at(row), b, depth, c + row * c_row, c_row);
  if (row == rows) return;
  if constexpr (R > 4)
    tiles<T, R / 2, V>(row, rows, a, b, depth, c, c_row);
  else if (rows >= R)
    Tile<T, R, V>::run(a.at(rows - R), b, depth, c + (rows - R) * c_row, c_row);
  else
    for (; row < rows; ++row) Tile<T, 1, V>::run(a.at(row), b, depth, c + row * c_row, c_row);
}

template <typename T>
void product(Left a, Matrix b, int64_t rows, int64_t depth, int64_t columns, float* c) {
  int64_t column = 0;
#if defined(__AVX512F__)
  for (; column + 4 * LANES <= columns; column += 4 * LANES)
    tiles<T, 4, 4>(0, rows, a, {b.data + column, b.row}, depth, c + column, columns);
  for (; column + 2 * LANES <= columns; column += 2 * LANES)
    tiles<T, 8, 2>(0, rows, a, {b.data + column, b.row}, depth, c + column, columns);
#endif
  for (; column < columns; column += LANES)
    tiles<T, TALL, PARTS>(0, rows, a, {b.data + column, b.row}, depth, c + column, columns);
}

// c = a b, `columns` (a multiple of LANES) to a row; `depth` words.
template <typename T>
void multiply(Left a, Matrix b, int64_t rows, int64_t depth, int64_t columns, float* c) {
  if (std::is_same_v<T, bfloat16> && has_native()) return product<Native>(a, b, rows, depth, columns, c);
  product<T>(a, b, rows, depth, columns, c);
}

// --- rows into words -----------------------------------------------------------------------------

// to[c][r] = word c of row r, for the first `columns` words; lines of `to` are `line` words long, their end left as is.
void transpose(const void* from, int64_t row, int64_t rows, int64_t columns, float* to, int64_t line) {
  int64_t r = 0;
  const int64_t whole = columns / 4 * 4;
#if defined(__SSE2__)
  for (; r + 4 <= rows; r += 4) {
    const char* in = static_cast<const char*>(from) + 4 * r * row;
    for (int64_t c = 0; c < whole; c += 4) {
      __m128 lines[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&lines[i], in + 4 * (i * row + c), 16);
      _MM_TRANSPOSE4_PS(lines[0], lines[1], lines[2], lines[3]);
      for (int i = 0; i < 4; ++i) std::memcpy(to + (c + i) * line + r, &lines[i], 16);
    }
    for (int64_t c = whole; c < columns; ++c)
      for (int i = 0; i < 4; ++i) std::memcpy(to + c * line + r + i, in + 4 * (i * row + c), 4);
  }
#endif
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      std::memcpy(to + c * line + r, static_cast<const char*>(from) + 4 * (r * row + c), 4);
}

// A bfloat16 in the upper half of a word, rounded as narrow() does.
PHM_HD uint32_t upper(float x) {
  const uint32_t bits = float_bits(x), sum = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (x != x ? 0x7fc00000u : sum) & 0xffff0000u;
}
PHM_HD uint32_t upper(bfloat16 x) { return uint32_t(x.bits) << 16; }

// Two rows as one of pairs.
template <typename S>
void pair_rows(const S* __restrict first, const S* __restrict second, int64_t n, float* __restrict out) {
  PHM_VECTOR
  for (int64_t i = 0; i < n; ++i) out[i] = bits_float(upper(second[i]) | upper(first[i]) >> 16);
}
template <typename S>
void pair_row(const S* __restrict only, int64_t n, float* __restrict out) {
  PHM_VECTOR
  for (int64_t i = 0; i < n; ++i) out[i] = bits_float(upper(only[i]) >> 16);
}

// Rows one after the other as the terms of a product: `tokens` rows of `n` elements of type S into words of T, lines
// of `line` words, behind n zeros, which cost a product no time. Close together: rows of a tensor may be so far apart
// that they push each other out of a cache.
template <typename T, typename S>
Matrix terms(const S* in, int64_t row, int64_t tokens, int64_t n, int64_t line, float* to) {
  if constexpr (std::is_same_v<T, float>) {
    if (row == line && n == line) return {in, row};
    for (int64_t r = 0; r < tokens; ++r) {
      const float* from = in + r * row;
      float* out = to + r * line;
      int64_t i = 0;
      for (; i + WIDTH <= n; i += WIDTH) store(out + i, load(from + i));
      for (; i < n; ++i) out[i] = from[i];
      for (; i < line; ++i) out[i] = 0.0f;
    }
  } else {
    for (int64_t r = 0; r < tokens; r += 2) {
      float* out = to + r / 2 * line;
      if (r + 1 < tokens)
        pair_rows(in + r * row, in + (r + 1) * row, n, out);
      else
        pair_row(in + r * row, n, out);
      std::fill(out + n, out + line, 0.0f);
    }
  }
  return {to, line};
}

// Rows of a tensor as words: where they lie, or, where an odd bfloat16 is left over or rows begin inside a word,
// copied with a zero behind.
template <typename T>
Left words_of(const T* in, int64_t row, int64_t tokens, int64_t dim, float* to, int64_t line) {
  if (dim % PER_WORD<T> == 0 && row % PER_WORD<T> == 0) return {in, row / PER_WORD<T>, 1};
  char* out = reinterpret_cast<char*>(to);
  for (int64_t r = 0; r < tokens; ++r) {
    to[r * line + words<T>(dim) - 1] = 0.0f;
    std::memcpy(out + 4 * r * line, in + r * row, size_t(dim) * sizeof(T));
  }
  return {to, line, 1};
}

// Rows of weights, or of their gradients, into rows of words for the left side of a product.
template <typename T>
Left as_left(float* rows, int64_t tokens, int64_t length) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    // In place: a row of words is half as long, and is written where no later row begins.
    for (int64_t r = 0; r < tokens; ++r) {
      const float* in = rows + r * length;
      bfloat16 line[LANES];
      char* out = reinterpret_cast<char*>(rows) + r * length * 2;
      for (int64_t i = 0; i < length; i += LANES) {
        PHM_VECTOR
        for (int64_t l = 0; l < LANES; ++l) line[l] = narrow<bfloat16>(in[i + l]);
        std::memcpy(out + i * 2, line, sizeof(line));
      }
    }
  }
  return {rows, length / PER_WORD<T>, 1};
}

template <typename T>
void write(const float* __restrict row, int64_t line, float factor, int64_t tokens, int64_t dim, T* __restrict out,
           int64_t apart) {
  for (int64_t r = 0; r < tokens; ++r, out += apart, row += line) {
    PHM_VECTOR
    for (int64_t i = 0; i < dim; ++i) out[i] = narrow<T>(row[i] * factor);
  }
}

}  // namespace
}  // namespace PHM_ISA
}  // namespace phmdiff
