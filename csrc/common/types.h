// The element types and the type each is computed in: float for the 16-bit ones and float, double for double.
//
// Conversions round alike on host and GPU: to nearest, ties to even; NaN stays NaN, its bits may differ.
#pragma once

#include "macros.h"

#include <cstring>

namespace phmdiff {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename T>
struct Wide {
  using type = T;
};
template <>
struct Wide<bfloat16> {
  using type = float;
};
template <>
struct Wide<float16> {
  using type = float;
};
template <typename T>
using wide_t = typename Wide<T>::type;

PHM_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

PHM_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

PHM_HD float widen(float x) { return x; }
PHM_HD double widen(double x) { return x; }
PHM_HD float widen(bfloat16 x) { return bits_float(uint32_t(x.bits) << 16); }

PHM_HD float widen(float16 x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#else
  // Shift the 5 + 10 bits into place and correct the exponent by a product, which is exact and takes
  // care of subnormal numbers; Inf and NaN keep their mantissa under a full exponent.
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t rest = uint32_t(x.bits & 0x7fffu) << 13;
  const float value = bits_float(rest) * bits_float(0x77800000u);  // 2^112
  const uint32_t bits = (x.bits & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : float_bits(value);
  return bits_float(bits | sign);
#endif
}

template <typename T>
PHM_HD T narrow(wide_t<T> x);

template <>
PHM_HD float narrow<float>(float x) {
  return x;
}
template <>
PHM_HD double narrow<double>(double x) {
  return x;
}

template <>
PHM_HD bfloat16 narrow<bfloat16>(float x) {
#if defined(__CUDA_ARCH__)
  bfloat16 out;  // one instruction; cuda_bf16.h would say the same and doubles the time to compile
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
  return out;
#else
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bfloat16{uint16_t(x != x ? 0x7fc0u : rounded)};
#endif
}

template <>
PHM_HD float16 narrow<float16>(float x) {
#if defined(__CUDA_ARCH__)
  float16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
  return out;
#else
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (size >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to Inf
  } else if (size < 0x38800000u) {
    // Below 2^-14: adding 1/2 puts the last kept bit, 2^-24, at the end of the mantissa, so the addition rounds.
    half = float_bits(bits_float(size) + 0.5f) - 0x3f000000u;
  } else {
    half = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  }
  return float16{uint16_t(half | sign)};
#endif
}

}  // namespace phmdiff
