// GELU, tanh form, and its backward, which forms everything again from x. CPU only.
#include "ops.h"
#include "tensor.h"

namespace phmdiff {
namespace {

// f(Tag<element type>{}) for the types this file computes.
template <typename F>
void with_gelu_type(const char* op, const Tensor& x, F f) {
  require(x.is_cpu(), op, "need a CPU tensor");
  if (x.scalar_type() == ScalarType::Float) return f(Tag<float>{});
  require(x.scalar_type() == ScalarType::BFloat16, op, "need float32 or bfloat16");
  f(Tag<bfloat16>{});
}

std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d));
  return sizes;
}

}  // namespace

Tensor gelu(const Tensor& x) {
  Tensor y = empty_like(x, sizes_of(x));
  with_gelu_type("gelu", x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor dense = torch::stable::contiguous(x);
    const void* in = dense.const_data_ptr();
    void* out = y.mutable_data_ptr();
    in_parallel(x.numel(), 1, [&](int64_t begin, int64_t end) { PHM_CPU(gelu_forward<T>(in, out, begin, end)); });
  });
  return y;
}

Tensor gelu_backward(const Tensor& dy, const Tensor& x) {
  const char* op = "gelu_backward";
  require_like(op, "dy", dy, x);
  require(sizes_of(dy) == sizes_of(x), op, "dy must have the shape of x");
  Tensor dx = empty_like(x, sizes_of(x));
  with_gelu_type(op, x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor dense = torch::stable::contiguous(x), grad = torch::stable::contiguous(dy);
    const void *in = dense.const_data_ptr(), *in_grad = grad.const_data_ptr();
    void* out = dx.mutable_data_ptr();
    in_parallel(x.numel(), 1,
                [&](int64_t begin, int64_t end) { PHM_CPU(gelu_backward<T>(in_grad, in, out, begin, end)); });
  });
  return dx;
}

}  // namespace phmdiff
