// Modulated LayerNorm behind a gated residual, and its backward. A unit is a stretch of rows of one sample.
//
// Sums along a row are taken in 32 lanes, whatever a register holds, and the lanes added pairwise; sums over
// rows 16 at a time, those over a stretch, stretches in their order. So no bit depends on the instruction set or on
// how stretches are shared out.
#include "../common/args.h"

#include <cmath>

#include "kernels.h"
#include "rows.h"

namespace phmdiff {
namespace PHM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int LANES = 32, VECTORS = LANES / WIDTH;
constexpr int64_t SUMMED = 16;  // rows
constexpr int GROUP = 4;         // rows that are worked on side by side
typedef float Vector __attribute__((vector_size(4 * WIDTH)));

struct LoadVector {
  Vector operator()(const float* p) const {
    Vector v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
};

struct LoadScalar {
  float operator()(const float* p) const { return *p; }
};

// Lane l and lane l + 16 of 32, then l and l + 8, and so on: the same tree for every width of a register.
inline float add_lanes(Vector* sums) {
#pragma GCC unroll 8
  for (int half = VECTORS / 2; half; half /= 2)
    for (int v = 0; v < half; ++v) sums[v] += sums[v + half];
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m512 all = (__m512)sums[0];
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
  const __m256 eight = (__m256)sums[0];
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (sums[0][0] + sums[0][2]) + (sums[0][1] + sums[0][3]);
#endif
}

// The sum over i < n of term(load, i), which reads element i of a row p as load(p + i).
template <typename Term>
inline float sum_of(int64_t n, const Term& term) {
  Vector sums[VECTORS] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[v] += term(LoadVector{}, i + v * WIDTH);
  if (i < n) {
    float rest[LANES] = {};
    for (int l = 0; i < n; ++i, ++l) rest[l] = term(LoadScalar{}, i);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[v] += LoadVector{}(rest + v * WIDTH);
  }
  return add_lanes(sums);
}

struct Statistics {
  float mean, inverse;  // of the standard deviation
};

// Of a few rows at a time: their sums do not wait for one another.
inline void statistics(const float* const* x, int rows, int64_t n, float eps, Statistics* out) {
  for (int r = 0; r < rows; ++r) {
    const float* row = x[r];
    out[r].mean = sum_of(n, [row](auto load, int64_t i) { return load(row + i); }) / float(n);
  }
  for (int r = 0; r < rows; ++r) {
    const float *row = x[r], mean = out[r].mean;
    const float squares = sum_of(n, [row, mean](auto load, int64_t i) {
      const auto off = load(row + i) - mean;
      return off * off;
    });
    out[r].inverse = 1.0f / std::sqrt(squares / float(n) + eps);
  }
}

template <typename T>
const T* row_of(const TokenRows& rows, int64_t sample, int64_t row) {
  return static_cast<const T*>(rows.data) + sample * rows.sample + row * rows.row;
}

// The vector of a sample, plus `add`; nothing where there is none.
template <typename T>
void read_vector(const SampleVectors& from, int64_t sample, int64_t n, float add, float* __restrict out) {
  if (!from.data) return;
  const T* __restrict in = static_cast<const T*>(from.data) + sample * from.row;
  PHM_VECTOR
  for (int64_t i = 0; i < n; ++i) out[i] = widen(in[i]) + add;
}

template <typename X, typename V>
void add_gated(const X* __restrict x, const V* __restrict h, const float* __restrict gate, int64_t n,
               X* __restrict out) {
  PHM_VECTOR
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<X>(widen(x[i]) + gate[i] * widen(h[i]));
}

template <typename V>
void modulate(const float* __restrict x, Statistics s, const float* __restrict scale, const float* __restrict shift,
              int64_t n, V* __restrict y) {
  PHM_VECTOR
  for (int64_t i = 0; i < n; ++i) y[i] = narrow<V>((x[i] - s.mean) * s.inverse * scale[i] + shift[i]);
}

// xhat, dy (1 + scale), and the sums of dy and dy xhat over rows.
template <typename V>
void scaled_gradient(const V* __restrict dy, const float* __restrict x, Statistics s, const float* __restrict scale,
                     int64_t n, float* __restrict normed, float* __restrict grad, float* __restrict shift_sum,
                     float* __restrict scale_sum) {
  PHM_VECTOR
  for (int64_t i = 0; i < n; ++i) {
    const float d = widen(dy[i]), hat = (x[i] - s.mean) * s.inverse;
    normed[i] = hat;
    grad[i] = d * scale[i];
    shift_sum[i] += d;
    scale_sum[i] += d * hat;
  }
}

// dx = (g - mean(g) - xhat mean(g xhat)) / sigma + dx' with g = dy (1 + scale); and dh, and the sum of dx h.
template <bool NORM, bool GATED, typename X, typename V>
void finish(const float* __restrict grad, const float* __restrict normed, float plain, float along, float inverse,
            int64_t n, const X* __restrict dnew, const V* __restrict h, const float* __restrict gate,
            X* __restrict dx, V* __restrict dh, float* __restrict gate_sum) {
  PHM_VECTOR
  for (int64_t i = 0; i < n; ++i) {
    float d = widen(dnew[i]);
    if (NORM) d = inverse * (grad[i] - plain - normed[i] * along) + d;
    dx[i] = narrow<X>(d);
    if (GATED) {
      dh[i] = narrow<V>(d * gate[i]);
      gate_sum[i] += d * widen(h[i]);
    }
  }
}

template <typename X>
void add_row(const X* __restrict row, int64_t n, float* __restrict sum) {
  PHM_VECTOR
  for (int64_t i = 0; i < n; ++i) sum[i] += widen(row[i]);
}

void move_sum(int64_t n, float* __restrict from, float* __restrict to) {
  PHM_VECTOR
  for (int64_t i = 0; i < n; ++i) {
    to[i] += from[i];
    from[i] = 0.0f;
  }
}

}  // namespace

template <typename Types>
void adaln_forward(const AdalnArgs& a, int64_t begin, int64_t end) {
  using X = typename Types::Residual;
  using V = typename Types::Branch;
  const int64_t n = a.width;
  const Rows<float> scratch(3 + GROUP, n);
  float *gate = scratch[0], *shift = scratch[1], *scale = scratch[2];
  for (int64_t unit = begin; unit < end; ++unit) {
    const Stretch& s = a.stretches[unit];
    if (unit == begin || s.sample != a.stretches[unit - 1].sample) {
      read_vector<V>(a.gate, s.sample, n, 0.0f, gate);
      read_vector<V>(a.shift, s.sample, n, 0.0f, shift);
      read_vector<V>(a.scale, s.sample, n, 1.0f, scale);
    }
    for (int64_t first = 0; first < s.count; first += GROUP) {
      const int rows = int(std::min<int64_t>(GROUP, s.count - first));
      const float* wide[GROUP];
      Statistics found[GROUP];
      for (int r = 0; r < rows; ++r) {
        const int64_t row = s.first + first + r;
        const X* x = row_of<X>(a.x, s.sample, row);
        if (a.h.data) {
          X* out = static_cast<X*>(a.new_x) + (s.sample * a.rows + row) * n;
          add_gated(x, row_of<V>(a.h, s.sample, row), gate, n, out);
          x = out;
        }
        wide[r] = read_row(x, n, scratch[3 + r]);
      }
      statistics(wide, rows, n, a.eps, found);
      V* y = static_cast<V*>(a.y) + (s.sample * a.rows + s.first + first) * n;
      for (int r = 0; r < rows; ++r) modulate(wide[r], found[r], scale, shift, n, y + r * n);
    }
  }
}

template <typename Types>
void adaln_backward(const AdalnArgs& a, int64_t begin, int64_t end) {
  using X = typename Types::Residual;
  using V = typename Types::Branch;
  const int64_t n = a.width;
  const Rows<float> scratch(8 + 3 * GROUP, n);
  const Rows<X> spare(2, n);  // where results go that nobody asked for, and zeros for what is not given
  const Rows<V> spare_branch(2, n);
  std::memset(static_cast<void*>(spare[1]), 0, size_t(n) * sizeof(X));
  std::memset(static_cast<void*>(spare_branch[1]), 0, size_t(n) * sizeof(V));
  float *gate = scratch[0], *scale = scratch[1];
  float* recent[3] = {scratch[2], scratch[3], scratch[4]};  // sums for gate, shift, scale: of a few rows
  float* sums[3] = {scratch[5], scratch[6], scratch[7]};    // of the stretch
  const auto wide_row = [&](int r) { return scratch[8 + r]; };
  const auto normed_row = [&](int r) { return scratch[8 + GROUP + r]; };
  const auto grad_row = [&](int r) { return scratch[8 + 2 * GROUP + r]; };
  void* out[3] = {a.dgate, a.dshift, a.dscale};
  const bool gated = a.dh || a.dgate;
  for (float* row : {gate, recent[0], recent[1], recent[2]}) std::fill(row, row + n, 0.0f);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Stretch& s = a.stretches[unit];
    if (unit == begin || s.sample != a.stretches[unit - 1].sample) {
      read_vector<V>(a.gate, s.sample, n, 0.0f, gate);
      read_vector<V>(a.scale, s.sample, n, 1.0f, scale);
    }
    for (float* row : sums) std::fill(row, row + n, 0.0f);
    for (int64_t first = 0; first < s.count; first += GROUP) {
      const int rows = int(std::min<int64_t>(GROUP, s.count - first));
      const int64_t begin_row = s.first + first;
      const float* wide[GROUP];
      Statistics found[GROUP] = {};
      float plain[GROUP] = {}, along[GROUP] = {};
      if (a.dy.data) {
        for (int r = 0; r < rows; ++r) wide[r] = read_row(row_of<X>(a.x, s.sample, begin_row + r), n, wide_row(r));
        statistics(wide, rows, n, a.eps, found);
        for (int r = 0; r < rows; ++r)
          scaled_gradient(row_of<V>(a.dy, s.sample, begin_row + r), wide[r], found[r], scale, n, normed_row(r),
                          grad_row(r), recent[1], recent[2]);
        for (int r = 0; r < rows; ++r) {
          const float *normed = normed_row(r), *grad = grad_row(r);
          plain[r] = sum_of(n, [grad](auto load, int64_t i) { return load(grad + i); }) / float(n);
          along[r] =
              sum_of(n, [grad, normed](auto load, int64_t i) { return load(grad + i) * load(normed + i); }) / float(n);
        }
      }
      for (int r = 0; r < rows; ++r) {
        const int64_t row = begin_row + r, at = (s.sample * a.rows + row) * n;
        const auto run = [&](auto norm, auto with_gate) {
          finish<decltype(norm)::value, decltype(with_gate)::value>(
              grad_row(r), normed_row(r), plain[r], along[r], found[r].inverse, n,
              a.dnew.data ? row_of<X>(a.dnew, s.sample, row) : spare[1],
              a.dgate ? row_of<V>(a.h, s.sample, row) : spare_branch[1], gate,
              a.dx ? static_cast<X*>(a.dx) + at : spare[0], a.dh ? static_cast<V*>(a.dh) + at : spare_branch[0],
              recent[0]);
        };
        if (a.dy.data)
          gated ? run(std::true_type{}, std::true_type{}) : run(std::true_type{}, std::false_type{});
        else
          gated ? run(std::false_type{}, std::true_type{}) : run(std::false_type{}, std::false_type{});
      }
      if ((first + rows) % SUMMED == 0 || first + rows == s.count)
        for (int k = 0; k < 3; ++k) move_sum(n, recent[k], sums[k]);
    }
    for (int k = 0; k < 3; ++k) {
      if (!out[k]) continue;
      if (s.parts == 1)
        narrow_row(sums[k], n, static_cast<V*>(out[k]) + s.sample * n);
      else
        std::copy(sums[k], sums[k] + n, a.partial + (3 * unit + k) * n);
    }
  }
}

// A unit is a sample: the sums of its stretches, where it has several.
template <typename Types>
void adaln_add_parts(const AdalnArgs& a, int64_t begin, int64_t end) {
  using V = typename Types::Branch;
  const int64_t n = a.width;
  const Rows<float> scratch(2, n);
  void* out[3] = {a.dgate, a.dshift, a.dscale};
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t first = a.first_stretch[sample], parts = a.first_stretch[sample + 1] - first;
    for (int k = 0; k < 3 && parts > 1; ++k) {
      if (!out[k]) continue;
      std::fill(scratch[0], scratch[0] + n, 0.0f);
      std::fill(scratch[1], scratch[1] + n, 0.0f);
      for (int64_t part = 0; part < parts; ++part) {
        add_row(a.partial + (3 * (first + part) + k) * n, n, scratch[0]);
        if ((part + 1) % SUMMED == 0 || part + 1 == parts) move_sum(n, scratch[0], scratch[1]);
      }
      narrow_row(scratch[1], n, static_cast<V*>(out[k]) + sample * n);
    }
  }
}

#define PHM_ADALN(X, V)                                                             \
  template void adaln_forward<AdalnTypes<X, V>>(const AdalnArgs&, int64_t, int64_t);  \
  template void adaln_backward<AdalnTypes<X, V>>(const AdalnArgs&, int64_t, int64_t); \
  template void adaln_add_parts<AdalnTypes<X, V>>(const AdalnArgs&, int64_t, int64_t);
PHM_ADALN(float, float)
PHM_ADALN(float, bfloat16)
PHM_ADALN(bfloat16, bfloat16)

}  // namespace PHM_ISA
}  // namespace phmdiff
