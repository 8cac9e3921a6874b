// Rows of scores into weights, and gradients of weights into those of scores. Sums are taken in 16 lanes, whatever a
// register holds, and the lanes added pairwise.
#pragma once

#include <limits>

#include "words.h"

namespace phmdiff {
namespace PHM_ISA {
namespace {

// 2^t for t <= 0: within 2 units in the last place; 0 below -126.5. NaN stays NaN.
inline Vector exp2_negative(Vector t) {
  t = t < -127.0f ? Vector{} - 127.0f : t;
  // Added to 1.5 * 2^23 + 127, t is rounded to an integer, and the sum's last bits are the result's exponent.
  const Vector shifted = t + 12583039.0f, f = t - (shifted - 12583039.0f);  // f in [-1/2, 1/2]
  Vector series = 1.339086735e-03f + f * 1.546144746e-04f;  // of 2^f, relative error 6e-9
  series = 9.618056670e-03f + f * series;
  series = 5.550357104e-02f + f * series;
  series = 2.402265092e-01f + f * series;
  series = 6.931471880e-01f + f * series;
  return (1.0f + f * series) * (Vector)((Bits)shifted << 23);
}

// f of all lanes: of lane l and lane l + 8, then l and l + 4, and so on, whatever a register holds.
template <typename F>
inline float fold(const Vector* parts, const F& f) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  const __m512 all = (__m512)parts[0];
  const __m256 eight = f(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  const __m128 four = f(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif defined(__AVX2__)
  const __m256 eight = f((__m256)parts[0], (__m256)parts[1]);
  const __m128 four = f(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  const __m128 four = f(f((__m128)parts[0], (__m128)parts[2]), f((__m128)parts[1], (__m128)parts[3]));
#endif
  const __m128 two = f(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(f(two, _mm_shuffle_ps(two, two, 1)));
#else
  float lanes[LANES];
  std::memcpy(lanes, parts, sizeof(lanes));
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] = f(lanes[l], lanes[l + half]);
  return lanes[0];
#endif
}
struct Add {
  template <typename V>
  V operator()(V a, V b) const {
    return a + b;
  }
};
struct Larger {
  template <typename V>
  V operator()(V a, V b) const {
    return b > a ? b : a;
  }
};

// Which lanes of a row's last LANES are keys, as masks.
struct Tail {
  alignas(64) int32_t live[LANES];
  explicit Tail(int64_t tokens) {
    const int64_t left = tokens - (rounded(tokens) - LANES);
    for (int64_t l = 0; l < LANES; ++l) live[l] = l < left ? -1 : 0;
  }
  // v where the lane is a key, else `other`.
  Vector only(Vector v, int part, float other) const {
    Bits mask;
    std::memcpy(&mask, live + part * WIDTH, sizeof(mask));
    const Vector rest = Vector{} + other;
    return (Vector)(((Bits)v & mask) | ((Bits)rest & ~mask));
  }
};

// A row of scores that stays in registers: B times LANES.
template <int B>
struct Held {
  Vector v[B][PARTS];

  Held(const float* row, const Tail& tail, float other) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; ++p) {
        v[b][p] = load(row + b * LANES + p * WIDTH);
        if (b == B - 1) v[b][p] = tail.only(v[b][p], p, other);
      }
  }
  template <typename F>
  void each(const F& f) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; ++p) f(v[b][p], b * LANES + p * WIDTH, p);
  }
};

// A row of products q k into weights softmax(scale q k), in base 2: scale2 = scale / ln 2 > 0. 0 behind the last key.
// B: LANES of the row, 0 for any number.
template <int B>
inline void softmax(float* row, int64_t length, const Tail& tail, float scale2) {
  const float lowest = -std::numeric_limits<float>::infinity();
  const Vector none = Vector{} + lowest;
  Vector largest[PARTS], sums[PARTS] = {};
  for (Vector& v : largest) v = none;
  if constexpr (B > 0) {
    Held<B> held(row, tail, lowest);
    held.each([&](Vector v, int, int p) { largest[p] = Larger{}(largest[p], v); });
    const float most = fold(largest, Larger{});
    held.each([&](Vector& v, int, int p) { sums[p] += v = exp2_negative((v - most) * scale2); });
    const float inverse = 1.0f / fold(sums, Add{});
    held.each([&](Vector v, int i, int) { store(row + i, v * inverse); });
  } else {
    for (int p = 0; p < PARTS; ++p) {
      float* at = row + length - LANES + p * WIDTH;
      store(at, tail.only(load(at), p, lowest));
    }
    for (int64_t i = 0; i < length; i += LANES)
      for (int p = 0; p < PARTS; ++p) largest[p] = Larger{}(largest[p], load(row + i + p * WIDTH));
    const float most = fold(largest, Larger{});
    for (int64_t i = 0; i < length; i += LANES)
      for (int p = 0; p < PARTS; ++p) {
        const Vector weight = exp2_negative((load(row + i + p * WIDTH) - most) * scale2);
        store(row + i + p * WIDTH, weight);
        sums[p] += weight;
      }
    const float inverse = 1.0f / fold(sums, Add{});
    for (int64_t i = 0; i < length; i += WIDTH) store(row + i, load(row + i) * inverse);
  }
}

// A row of dP into dS / scale = P (dP - sum of P dP). 0 behind the last key.
template <int B>
inline void softmax_backward(const float* weights, float* row, int64_t length, const Tail& tail) {
  Vector sums[PARTS] = {};
  if constexpr (B > 0) {
    Held<B> held(row, tail, 0.0f);
    held.each([&](Vector v, int i, int p) { sums[p] += load(weights + i) * v; });
    const float mean = fold(sums, Add{});
    held.each([&](Vector v, int i, int) { store(row + i, load(weights + i) * (v - mean)); });
  } else {
    for (int p = 0; p < PARTS; ++p) {
      float* at = row + length - LANES + p * WIDTH;
      store(at, tail.only(load(at), p, 0.0f));
    }
    for (int64_t i = 0; i < length; i += LANES)
      for (int p = 0; p < PARTS; ++p) sums[p] += load(weights + i + p * WIDTH) * load(row + i + p * WIDTH);
    const float mean = fold(sums, Add{});
    for (int64_t i = 0; i < length; i += WIDTH) store(row + i, load(weights + i) * (load(row + i) - mean));
  }
}

// f(number of LANES of a row, where it is a small one, else 0), as a constant.
template <typename F>
inline void with_blocks(int64_t length, const F& f) {
  switch (length / LANES) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    default: f(std::integral_constant<int, 0>{});
  }
}

}  // namespace
}  // namespace PHM_ISA
}  // namespace phmdiff
