// The merged state of Eq. 6, its relatives (upsampling alone or added, the error between levels) and their
// backward. Forward's unit is a row of the output; backward's is a row of the coarse image and the two rows of
// the gradient above it.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "kernels.h"
#include "rows.h"

namespace phmdiff {
namespace PHM_ISA {
namespace {

template <typename T>
const T* row_of(const Image& image, int64_t b, int64_t c, int64_t i) {
  return static_cast<const T*>(image.data) + b * image.batch + c * image.channel + i * image.row;
}

// Row i of up(coarse), cropped to width: first between two coarse rows, then between their neighbours.
template <typename T, typename A>
void up_row(const Image& coarse, int64_t b, int64_t c, int64_t i, int64_t height, int64_t width,
            const Rows<A>& scratch, A* __restrict out) {
  const int64_t w = half_of(width), pairs = width / 2;
  const Taps t = taps(i, half_of(height));
  const A* near = read_row(row_of<T>(coarse, b, c, t.near), w, scratch[0]);
  const A* far = read_row(row_of<T>(coarse, b, c, t.far), w, scratch[1]);
  A* __restrict v = scratch[2];
  PHM_VECTOR
  for (int64_t j = 0; j < w; ++j) v[j] = between(near[j], far[j]);
  v[-1] = v[0];
  v[w] = v[w - 1];
  PHM_VECTOR
  for (int64_t j = 0; j < pairs; ++j) {
    out[2 * j] = between(v[j], v[j - 1]);
    out[2 * j + 1] = between(v[j], v[j + 1]);
  }
  if (width % 2) out[width - 1] = between(v[pairs], v[pairs - 1]);
}

template <bool Y, bool EPS, bool COARSE, typename A>
void combine_row(const A* __restrict y, const A* __restrict eps, const A* __restrict up, const Factors<A>& f,
                 int64_t width, A* __restrict out) {
  PHM_VECTOR
  for (int64_t j = 0; j < width; ++j)
    out[j] = merged<Y, EPS, COARSE>(Y ? y[j] : A(0), EPS ? eps[j] : A(0), COARSE ? up[j] : A(0), f);
}

template <typename A>
void combine(const A* y, const A* eps, const A* up, const Factors<A>& f, int64_t width, A* out) {
  const int given = (y ? 4 : 0) + (eps ? 2 : 0) + (up ? 1 : 0);
  switch (given) {
    case 7: return combine_row<true, true, true>(y, eps, up, f, width, out);
    case 6: return combine_row<true, true, false>(y, eps, up, f, width, out);
    case 5: return combine_row<true, false, true>(y, eps, up, f, width, out);
    case 4: return combine_row<true, false, false>(y, eps, up, f, width, out);
    case 3: return combine_row<false, true, true>(y, eps, up, f, width, out);
    case 2: return combine_row<false, true, false>(y, eps, up, f, width, out);
    default: return combine_row<false, false, true>(y, eps, up, f, width, out);
  }
}

template <typename A>
void scale_row(const A* __restrict in, A factor, int64_t n, A* __restrict out) {
  PHM_VECTOR
  for (int64_t j = 0; j < n; ++j) out[j] = factor * in[j];
}

// Gather of one coarse row: four rows of the gradient down to one, then four columns to one.
template <typename T, typename A>
void adjoint_row(const Image& grad, int64_t b, int64_t c, int64_t k, int64_t height, int64_t width, A factor,
                 const Rows<A>& scratch, A* __restrict out) {
  const int64_t h = half_of(height), w = half_of(width);
  const A* rows[4];
  A weight[4];
  for (int tap = 0; tap < 4; ++tap) {
    const int64_t r = 2 * k - 1 + tap;
    weight[tap] = adjoint_weight<A>(r, k, h, height);
    rows[tap] = scratch[tap];
    if (r < 0 || r >= height)  // a row that is not there is zeros: 0 times Inf is not 0
      std::fill(scratch[tap], scratch[tap] + width, A(0));
    else
      rows[tap] = read_row(row_of<T>(grad, b, c, r), width, scratch[tap]);
  }
  const A *__restrict r0 = rows[0], *__restrict r1 = rows[1], *__restrict r2 = rows[2], *__restrict r3 = rows[3];
  A* __restrict t = scratch[4];
  const A w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
  PHM_VECTOR
  for (int64_t j = 0; j < width; ++j) t[j] = adjoint_of(r0[j], r1[j], r2[j], r3[j], w0, w1, w2, w3);
  for (int64_t j = width; j < width + 4; ++j) t[j] = A(0);
  t[-1] = A(0);
  const auto edge = [&](int64_t j) {
    const int64_t i = 2 * j - 1;
    out[j] = factor * adjoint_of(t[i], t[i + 1], t[i + 2], t[i + 3], adjoint_weight<A>(i, j, w, width),
                                 adjoint_weight<A>(i + 1, j, w, width), adjoint_weight<A>(i + 2, j, w, width),
                                 adjoint_weight<A>(i + 3, j, w, width));
  };
  const int64_t last = (width - 2) / 2;  // columns below it have all four
  edge(0);
  PHM_VECTOR
  for (int64_t j = 1; j < last; ++j)
    out[j] = factor * adjoint_of(t[2 * j - 1], t[2 * j], t[2 * j + 1], t[2 * j + 2], A(0.25), A(0.75), A(0.75), A(0.25));
  for (int64_t j = std::max<int64_t>(last, 1); j < w; ++j) edge(j);
}

}  // namespace

template <typename T>
void merge_forward(const MergeArgs<wide_t<T>>& a, int64_t begin, int64_t end) {
  using A = wide_t<T>;
  const auto [batch, channels, height, width] = a.shape;
  const Rows<A> scratch(6, width);
  const Rows<float> noise(1, width);
  const Writer<T> writer(1, width, batch * channels * height * width * int64_t(sizeof(T)));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / height / channels, c = unit / height % channels, i = unit % height;
    const A *y = nullptr, *eps = nullptr;
    for (const auto& [image, row, into] : {std::tuple(&a.y, &y, 3), std::tuple(&a.eps, &eps, 4)}) {
      if (!image->data) continue;
      const T* in = row_of<T>(*image, b, c, i);
      if (sizeof(T) == 2) prefetch_ahead(in, width, image->row);  // three wider streams the hardware follows better
      *row = read_row(in, width, scratch[into]);
    }
    if (a.normals.sample_ids) {
      normals_row(stream_of(a.normals, b), (c * height + i) * width, width, noise[0]);
      std::copy(noise[0], noise[0] + width, scratch[4]);
      eps = scratch[4];
    }
    const A* up = nullptr;
    if (a.coarse.data) {
      up_row<T>(a.coarse, b, c, i, height, width, scratch, scratch[5]);
      up = scratch[5];
    }
    T* out = static_cast<T*>(a.out) + unit * width;
    A* wide = writer.place(out);
    combine(y, eps, up, factors_of(a.factors, b), width, wide);
    if (a.absolute)
      for (int64_t j = 0; j < width; ++j) wide[j] = std::abs(wide[j]);
    writer.written(out, width);
  }
}

template <typename T>
void merge_backward(const MergeBackwardArgs<wide_t<T>>& a, int64_t begin, int64_t end) {
  using A = wide_t<T>;
  const auto [batch, channels, height, width] = a.shape;
  const int64_t h = half_of(height), w = half_of(width);
  const Rows<A> scratch(7, width);
  const Writer<T> writer(1, width, batch * channels * height * width * int64_t(sizeof(T)));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / h, b = plane / channels, c = plane % channels, k = unit % h;
    const Factors<A> f = factors_of(a.factors, b);
    const auto scaled = [&](void* to, int64_t i, A factor) {
      if (!to) return;
      T* out = static_cast<T*>(to) + (plane * height + i) * width;
      const T* grad = row_of<T>(a.grad, b, c, i);
      prefetch_ahead(grad, width, a.grad.row);
      scale_row(read_row(grad, width, scratch[5]), factor, width, writer.place(out));
      writer.written(out, width);
    };
    for (int64_t i = 2 * k; i < std::min(2 * k + 2, height); ++i) {
      scaled(a.y, i, f.y);
      scaled(a.eps, i, f.eps);
    }
    if (!a.coarse) continue;
    for (int64_t i = 2 * k; !a.y && !a.eps && i < std::min(2 * k + 2, height); ++i)
      prefetch_ahead(row_of<T>(a.grad, b, c, i), width, a.grad.row);  // scaling has asked for them otherwise
    T* out = static_cast<T*>(a.coarse) + (plane * h + k) * w;
    A* wide = place(out, scratch[6]);
    adjoint_row<T>(a.grad, b, c, k, height, width, f.coarse, scratch, wide);
    written(wide, w, out);
  }
}

#define PHM_INSTANTIATE(T)                                                                \
  template void merge_forward<T>(const MergeArgs<wide_t<T>>&, int64_t, int64_t);          \
  template void merge_backward<T>(const MergeBackwardArgs<wide_t<T>>&, int64_t, int64_t);
PHM_INSTANTIATE(float)
PHM_INSTANTIATE(double)
PHM_INSTANTIATE(bfloat16)
PHM_INSTANTIATE(float16)

}  // namespace PHM_ISA
}  // namespace phmdiff
