// The operations, as bind.cpp registers them. Shapes, units and sources: phmdiff_fast/pyramid.py and haar.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/args.h"

namespace phmdiff {

using torch::stable::Tensor;

std::vector<Tensor> build_pyramid(const Tensor& x, int64_t levels, double alpha);
Tensor build_pyramid_backward(const std::vector<Tensor>& grads, int64_t height, int64_t width, double alpha);

Tensor merge_state(const Tensor& y, const std::optional<Tensor>& eps, const std::optional<Tensor>& coarse,
                   const Tensor& abar, const std::optional<Tensor>& sample_ids, int64_t seed, int64_t step,
                   const std::optional<Tensor>& seed_at, const std::optional<Tensor>& step_at, int64_t stream);
Tensor upsample_add(const Tensor& coarse, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
                    int64_t height, int64_t width);
Tensor level_error(const Tensor& x, const Tensor& coarse);
std::vector<Tensor> merge_backward(const Tensor& grad, const std::optional<Tensor>& abar,
                                   const std::optional<Tensor>& weight, bool y, bool eps, bool coarse);

Tensor haar3d(const Tensor& x);
Tensor inverse_haar3d(const Tensor& bands, int64_t x, int64_t y, int64_t z);

Tensor adaln_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale,
                      const std::optional<Tensor>& cu_tokens, double eps);
std::tuple<Tensor, Tensor> gated_residual_adaln(const Tensor& x, const Tensor& h, const Tensor& gate,
                                                const Tensor& shift, const Tensor& scale,
                                                const std::optional<Tensor>& cu_tokens, double eps);
std::vector<Tensor> adaln_backward(const std::optional<Tensor>& dy, const std::optional<Tensor>& dnew, const Tensor& x,
                                   const std::optional<Tensor>& h, const std::optional<Tensor>& gate,
                                   const Tensor& scale, const std::optional<Tensor>& cu_tokens, double eps,
                                   bool needs_x, bool needs_h, bool needs_gate, bool needs_shift, bool needs_scale);

Tensor short_attention(const Tensor& qkv, int64_t heads, const std::optional<Tensor>& cu_tokens, int64_t longest);
Tensor short_attention_backward(const Tensor& dout, const Tensor& qkv, int64_t heads,
                                const std::optional<Tensor>& cu_tokens, int64_t longest);

Tensor gelu(const Tensor& x);
Tensor gelu_backward(const Tensor& dy, const Tensor& x);

Tensor philox_normals(const Tensor& sample_ids, int64_t num, int64_t seed, int64_t step,
                      const std::optional<Tensor>& seed_at, const std::optional<Tensor>& step_at, int64_t stream);
Tensor philox_integers(const Tensor& sample_ids, int64_t num, int64_t seed, int64_t step,
                       const std::optional<Tensor>& seed_at, const std::optional<Tensor>& step_at, int64_t stream);
Normals normals_of(const char* op, const Tensor& sample_ids, int64_t seed, int64_t step,
                   const std::optional<Tensor>& seed_at, const std::optional<Tensor>& step_at, int64_t stream);

}  // namespace phmdiff
