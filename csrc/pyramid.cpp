// build_pyramid and its backward.
#include <cmath>

#include "common/antialias.h"
#include "ops.h"
#include "tensor.h"

namespace phmdiff {
namespace {

int64_t side_below(int64_t side, double alpha) {
  return alpha == 0.5 ? half_of(side) : std::max<int64_t>(1, int64_t(std::ceil(alpha * double(side) - 1e-9)));
}

// The weights of one axis by output pixel; transposed, `in` and `out` are those of the backward.
template <typename A>
Axis<A> axis_of(int64_t in, int64_t out, bool transposed) {
  std::vector<std::vector<A>> weights(out);
  std::vector<int64_t> start(out, in);
  const auto add = [&](int64_t to, int64_t from, A weight) {
    if (weight == A(0)) return;
    if (weights[to].empty()) start[to] = from;
    weights[to].resize(from - start[to]);  // zeros between
    weights[to].push_back(weight);
  };
  for (int64_t i = 0; i < (transposed ? in : out); ++i) {
    const Window<A> w = transposed ? window<A>(i, out, in) : window<A>(i, in, out);
    for (int64_t j = w.start; j < w.start + w.count; ++j) {
      if (transposed)
        add(j, i, window_weight(w, j));
      else
        add(i, j, window_weight(w, j));
    }
  }
  size_t taps = 1;
  for (const auto& w : weights) taps = std::max(taps, w.size());
  Axis<A> axis{in, out, int64_t(taps), std::vector<int32_t>(out), std::vector<A>(taps * out, A(0))};
  for (int64_t i = 0; i < out; ++i) {
    axis.start[i] = int32_t(std::min(start[i], in - 1));
    for (size_t k = 0; k < weights[i].size(); ++k) axis.weight[k * out + i] = weights[i][k];
  }
  return axis;
}

template <typename T>
void resample_on_cpu(const ResampleArgs& a) {
  using A = wide_t<T>;
  const Tables<A> tables{axis_of<A>(a.in_height, a.out_height, a.transposed),
                         axis_of<A>(a.in_width, a.out_width, a.transposed)};
  in_parallel(a.planes * a.out_height, a.in_width * tables.rows.taps,
              [&](int64_t begin, int64_t end) { PHM_CPU(resample<T>(a, tables, begin, end)); });
}

void resample_level(const char* op, const Tensor& in, const Tensor* add, const Tensor& out, bool transposed) {
  const Shape s = shape_of(in), o = shape_of(out);
  const ResampleArgs a{in.const_data_ptr(), add ? add->const_data_ptr() : nullptr, out.mutable_data_ptr(),
                       s.batch * s.channels, s.height, s.width, o.height, o.width, transposed};
  with_type(op, in, [&](auto tag) {
    using T = typename decltype(tag)::type;
    PHM_ON_DEVICE_OF(op, in, [&] { resample_on_cpu<T>(a); }, cuda::resample<T>(a, stream));
  });
}

}  // namespace

std::vector<Tensor> build_pyramid(const Tensor& x, int64_t levels, double alpha) {
  const char* op = "build_pyramid";
  require_images(op, x);
  require(levels >= 1 && levels <= MAX_LEVELS, op, "need 1 to ", MAX_LEVELS, " levels below the input, got ", levels);
  require(alpha > 0 && alpha < 1, op, "need 0 < alpha < 1, got ", alpha);
  const Shape s = shape_of(x);
  require(s.height > 0 && s.width > 0, op, "an image has no pixels");
  std::vector<Tensor> out;
  for (int64_t n = 0, h = s.height, w = s.width; n < levels; ++n) {
    h = side_below(h, alpha), w = side_below(w, alpha);
    out.push_back(empty_like(x, {s.batch, s.channels, h, w}));
  }
  if (s.batch * s.channels == 0) return out;
  if (alpha != 0.5) {
    Tensor above = torch::stable::contiguous(x);
    for (const Tensor& level : out) {
      resample_level(op, above, nullptr, level, false);
      above = level;
    }
    return out;
  }
  const Tensor dense = dense_rows(x);
  PyramidArgs a{image_of(dense), s, int(levels), {}};
  for (int64_t n = 0; n < levels; ++n) a.level[n] = out[n].mutable_data_ptr();
  const int64_t rows = out.back().size(2);
  with_type(op, x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    PHM_ON_DEVICE_OF(
        op, x,
        [&] {
          in_parallel(s.batch * s.channels * rows, s.height / rows * s.width,
                      [&](int64_t begin, int64_t end) { PHM_CPU(pyramid_forward<T>(a, begin, end)); });
        },
        cuda::pyramid_forward<T>(a, stream));
  });
  return out;
}

Tensor build_pyramid_backward(const std::vector<Tensor>& grads, int64_t height, int64_t width, double alpha) {
  const char* op = "build_pyramid_backward";
  require(!grads.empty() && grads.size() <= size_t(MAX_LEVELS), op, "need 1 to ", MAX_LEVELS, " gradients");
  std::vector<Tensor> dense;
  for (const Tensor& grad : grads) {
    require_images(op, grad);
    require_like(op, "a gradient", grad, grads[0]);
    dense.push_back(torch::stable::contiguous(grad));
  }
  const Shape s{grads[0].size(0), grads[0].size(1), height, width};
  for (int64_t n = 0, h = height, w = width; n < int64_t(grads.size()); ++n) {
    h = side_below(h, alpha), w = side_below(w, alpha);
    const Shape g = shape_of(grads[n]);
    require(g.batch == s.batch && g.channels == s.channels && g.height == h && g.width == w, op,
            "gradient ", n, " does not fit an image of ", height, " x ", width);
  }
  Tensor out = empty_like(grads[0], {s.batch, s.channels, height, width});
  if (s.batch * s.channels == 0) return out;
  if (alpha != 0.5) {
    Tensor below = dense.back();
    for (size_t n = dense.size(); n-- > 0;) {
      const Tensor level = n ? empty_like(out, {s.batch, s.channels, dense[n - 1].size(2), dense[n - 1].size(3)}) : out;
      resample_level(op, below, n ? &dense[n - 1] : nullptr, level, true);
      below = level;
    }
    return out;
  }
  PyramidArgs a{image_of(out), s, int(dense.size()), {}};
  for (size_t n = 0; n < dense.size(); ++n) a.level[n] = const_cast<void*>(dense[n].const_data_ptr());
  const int64_t rows = dense.back().size(2);
  with_type(op, out, [&](auto tag) {
    using T = typename decltype(tag)::type;
    PHM_ON_DEVICE_OF(
        op, out,
        [&] {
          in_parallel(s.batch * s.channels * rows, height / rows * width,
                      [&](int64_t begin, int64_t end) { PHM_CPU(pyramid_backward<T>(a, begin, end)); });
        },
        cuda::pyramid_backward<T>(a, stream));
  });
  return out;
}

}  // namespace phmdiff
