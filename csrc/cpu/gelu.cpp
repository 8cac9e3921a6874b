// GELU in its tanh form (Hendrycks & Gimpel 2016) and its backward. A unit is an element.
//
//   0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x s,   s = 1 / (1 + e^-z),   z = sqrt(8/pi) (x + 0.044715 x^3)
//
// Of e^-|z| alone: no sum cancels, so the tail of a negative x keeps its digits, and nothing overflows.
#include "kernels.h"
#include "rows.h"

namespace phmdiff {
namespace PHM_ISA {
namespace {

// Beyond it, e^-|z| is below float32's normal numbers and taken as 0.
constexpr float REACH = 10.04f;

// NaN stays NaN: a comparison with it is false.
PHM_HD float at_most(float limit, float x) { return limit < x ? limit : x; }
PHM_HD float at_least(float limit, float x) { return limit > x ? limit : x; }

// 2^t for t in [-127.5, 0]: within 2 units in the last place; 0 below -126.5. NaN stays NaN.
PHM_HD float exp2_negative(float t) {
  // Added to 1.5 * 2^23 + 127, t is rounded to an integer, and the sum's last bits are the result's exponent.
  const float shifted = t + 12583039.0f, f = t - (shifted - 12583039.0f);  // f in [-1/2, 1/2]
  float series = 1.546144746e-04f;  // of 2^f, relative error 6e-9
  series = 1.339086735e-03f + f * series;
  series = 9.618056670e-03f + f * series;
  series = 5.550357104e-02f + f * series;
  series = 2.402265092e-01f + f * series;
  series = 6.931471880e-01f + f * series;
  return (1.0f + f * series) * bits_float(float_bits(shifted) << 23);
}

struct Parts {
  float larger, smaller;  // 1 / (1 + e^-|z|) and 1 minus that
};

// size: |x|, REACH at most
PHM_HD Parts parts_of(float size) {
  // sqrt(8/pi) / ln 2 and 0.044715 times that
  const float exponential = exp2_negative(size * (-2.302208198f - 0.1029432396f * (size * size)));
  const float larger = 1.0f / (1.0f + exponential);
  return {larger, exponential * larger};
}

PHM_HD float gelu(float x) {
  const float inside = at_least(-REACH, x);  // -inf gives -0, its limit
  const Parts p = parts_of(at_most(REACH, __builtin_fabsf(x)));
  return inside * (x < 0.0f ? p.smaller : p.larger);
}

// d/dx (x s) = s + x s (1 - s) dz/dx
PHM_HD float gelu_slope(float x) {
  const float inside = at_least(-REACH, at_most(REACH, x));
  const Parts p = parts_of(__builtin_fabsf(inside));
  // sqrt(8/pi) and 3 * 0.044715 times that
  const float bend = p.larger * p.smaller * (1.5957691216f + 0.2140644488f * (inside * inside));
  return (x < 0.0f ? p.smaller : p.larger) + inside * bend;
}

template <typename T>
void forward(const T* __restrict x, int64_t n, T* __restrict y) {
  PHM_VECTOR
  for (int64_t i = 0; i < n; ++i) y[i] = narrow<T>(gelu(widen(x[i])));
}

template <typename T>
void backward(const T* __restrict dy, const T* __restrict x, int64_t n, T* __restrict dx) {
  PHM_VECTOR
  for (int64_t i = 0; i < n; ++i) dx[i] = narrow<T>(widen(dy[i]) * gelu_slope(widen(x[i])));
}

}  // namespace

template <typename T>
void gelu_forward(const void* x, void* y, int64_t begin, int64_t end) {
  forward(static_cast<const T*>(x) + begin, end - begin, static_cast<T*>(y) + begin);
}

template <typename T>
void gelu_backward(const void* dy, const void* x, void* dx, int64_t begin, int64_t end) {
  backward(static_cast<const T*>(dy) + begin, static_cast<const T*>(x) + begin, end - begin,
           static_cast<T*>(dx) + begin);
}

template void gelu_forward<float>(const void*, void*, int64_t, int64_t);
template void gelu_forward<bfloat16>(const void*, void*, int64_t, int64_t);
template void gelu_backward<float>(const void*, const void*, void*, int64_t, int64_t);
template void gelu_backward<bfloat16>(const void*, const void*, void*, int64_t, int64_t);

}  // namespace PHM_ISA
}  // namespace phmdiff
