// The merged state of Eq. 6, upsample_add, the error between levels, and their backward.
#include "ops.h"
#include "tensor.h"

namespace phmdiff {
namespace {

using Maybe = std::optional<Tensor>;

template <typename A>
const A* data_of(const Maybe& x) {
  return x ? static_cast<const A*>(x->const_data_ptr()) : nullptr;
}

void require_vector(const char* op, const char* name, const Maybe& v, const Tensor& like) {
  if (!v) return;
  require(v->dim() == 1 && v->size(0) == like.size(0) && v->is_contiguous(), op, name, " must be (B,), dense");
  require(v->scalar_type() == wide_type(like), op, name, " must be float32 (float64 beside float64)");
  require(v->get_device() == like.get_device(), op, name, " is on another device");
}

void require_coarse(const char* op, const Tensor& coarse, const Tensor& like, int64_t height, int64_t width) {
  require_images(op, coarse);
  require_like(op, "coarse", coarse, like);
  require(coarse.size(0) == like.size(0) && coarse.size(1) == like.size(1) && coarse.size(2) == half_of(height) &&
              coarse.size(3) == half_of(width),
          op, "coarse must be half as large, sides rounded up");
}

// Every forward operation of this file: what is given is merged, weighted by abar or by `weight` and `sign`.
Tensor merge(const char* op, const Maybe& y, const Maybe& eps, const Maybe& coarse, const Normals& normals,
             const Maybe& abar, const Maybe& weight, double sign, bool absolute, int64_t height, int64_t width) {
  const Tensor& like = y ? *y : *coarse;
  require_images(op, like);
  const Shape s{like.size(0), like.size(1), height, width};
  if (eps) {
    require_images(op, *eps);
    require_like(op, "eps", *eps, like);
    for (int d = 0; d < 4; ++d) require(eps->size(d) == like.size(d), op, "eps must have the shape of y");
  }
  if (coarse) require_coarse(op, *coarse, like, height, width);
  require_vector(op, "abar", abar, like);
  require_vector(op, "weight", weight, like);
  Tensor out = empty_like(like, {s.batch, s.channels, s.height, s.width});
  if (s.batch * s.channels * s.height * s.width == 0) return out;
  const Maybe dense_y = y ? Maybe(dense_rows(*y)) : y, dense_eps = eps ? Maybe(dense_rows(*eps)) : eps,
              dense_coarse = coarse ? Maybe(dense_rows(*coarse)) : coarse;
  with_type(op, like, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = wide_t<T>;
    MergeArgs<A> a{};
    if (dense_y) a.y = image_of(*dense_y);
    if (dense_eps) a.eps = image_of(*dense_eps);
    if (dense_coarse) a.coarse = image_of(*dense_coarse);
    a.normals = normals;
    a.shape = s;
    a.factors = {data_of<A>(abar), data_of<A>(weight), A(sign)};
    a.absolute = absolute;
    a.out = out.mutable_data_ptr();
    PHM_ON_DEVICE_OF(
        op, like,
        [&] {
          in_parallel(s.batch * s.channels * s.height, s.width,
                      [&](int64_t begin, int64_t end) { PHM_CPU(merge_forward<T>(a, begin, end)); });
        },
        cuda::merge_forward<T>(a, stream));
  });
  return out;
}

}  // namespace

Tensor merge_state(const Tensor& y, const Maybe& eps, const Maybe& coarse, const Tensor& abar, const Maybe& sample_ids,
                   int64_t seed, int64_t step, const Maybe& seed_at, const Maybe& step_at, int64_t stream) {
  require_images("merge_state", y);
  const Normals normals =
      sample_ids ? normals_of("merge_state", *sample_ids, seed, step, seed_at, step_at, stream) : Normals{};
  require(!(eps && sample_ids), "merge_state", "eps is given and to be drawn");
  if (sample_ids) {
    require(sample_ids->size(0) == y.size(0), "merge_state", "sample_ids must be (B,)");
    require(sample_ids->get_device() == y.get_device(), "merge_state", "sample_ids is on another device");
  }
  return merge("merge_state", y, eps, coarse, normals, abar, std::nullopt, 1, false, y.size(2), y.size(3));
}

Tensor upsample_add(const Tensor& coarse, const Maybe& x, const Maybe& weight, int64_t height, int64_t width) {
  if (x) require_images("upsample_add", *x);
  require(!x || (x->size(2) == height && x->size(3) == width), "upsample_add", "x must be (B, C, height, width)");
  return merge("upsample_add", x, std::nullopt, coarse, {}, std::nullopt, weight, 1, false, height, width);
}

Tensor level_error(const Tensor& x, const Tensor& coarse) {
  require_images("level_error", x);
  return merge("level_error", x, std::nullopt, coarse, {}, std::nullopt, std::nullopt, -1, true, x.size(2), x.size(3));
}

std::vector<Tensor> merge_backward(const Tensor& grad, const Maybe& abar, const Maybe& weight, bool y, bool eps,
                                   bool coarse) {
  const char* op = "merge_backward";
  require_images(op, grad);
  require_vector(op, "abar", abar, grad);
  require_vector(op, "weight", weight, grad);
  const Shape s = shape_of(grad);
  std::vector<Tensor> out;
  for (const bool fine : {y, eps})
    if (fine) out.push_back(empty_like(grad, {s.batch, s.channels, s.height, s.width}));
  const int64_t h = half_of(s.height), w = half_of(s.width);
  if (coarse) out.push_back(empty_like(grad, {s.batch, s.channels, h, w}));
  if (out.empty() || s.batch * s.channels * s.height * s.width == 0) return out;
  const Tensor dense = dense_rows(grad);
  with_type(op, grad, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = wide_t<T>;
    MergeBackwardArgs<A> a{image_of(dense), s, {data_of<A>(abar), data_of<A>(weight), A(1)}, nullptr, nullptr, nullptr};
    auto next = out.begin();
    if (y) a.y = (next++)->mutable_data_ptr();
    if (eps) a.eps = (next++)->mutable_data_ptr();
    if (coarse) a.coarse = next->mutable_data_ptr();
    PHM_ON_DEVICE_OF(
        op, grad,
        [&] {
          in_parallel(s.batch * s.channels * h, 2 * s.width,
                      [&](int64_t begin, int64_t end) { PHM_CPU(merge_backward<T>(a, begin, end)); });
        },
        cuda::merge_backward<T>(a, stream));
  });
  return out;
}

}  // namespace phmdiff
