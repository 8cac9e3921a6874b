// The operations' schemas. What they mean (fake tensors, autograd, autocast, documentation) is in Python:
// phmdiff_fast/_pyramid_ops.py. No header of Python is needed: torch.ops.load_library brings this in.
#include "ops.h"
#include "tensor.h"

#define PHM_DRAW "SymInt seed, SymInt step, Tensor? seed_at, Tensor? step_at, SymInt stream"

// A fragment: Triton's operations are in the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(phmdiff_fast, m) {
  m.def("build_pyramid(Tensor x, SymInt levels, float alpha) -> Tensor[]");
  m.def("build_pyramid_backward(Tensor[] grads, SymInt height, SymInt width, float alpha) -> Tensor");
  m.def("merge_state(Tensor y, Tensor? eps, Tensor? coarse, Tensor abar, Tensor? sample_ids, " PHM_DRAW ") -> Tensor");
  m.def("upsample_add(Tensor coarse, Tensor? x, Tensor? weight, SymInt height, SymInt width) -> Tensor");
  m.def("level_error(Tensor x, Tensor coarse) -> Tensor");
  m.def("merge_backward(Tensor grad, Tensor? abar, Tensor? weight, bool y, bool eps, bool coarse) -> Tensor[]");
  m.def("haar3d(Tensor x) -> Tensor");
  m.def("inverse_haar3d(Tensor bands, SymInt x, SymInt y, SymInt z) -> Tensor");
  m.def("adaln_modulate_cpu(Tensor x, Tensor shift, Tensor scale, Tensor? cu_tokens, float eps) -> Tensor");
  m.def("gated_residual_adaln_cpu(Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, Tensor? cu_tokens, "
        "float eps) -> (Tensor, Tensor)");
  m.def("adaln_backward_cpu(Tensor? dy, Tensor? dnew, Tensor x, Tensor? h, Tensor? gate, Tensor scale, "
        "Tensor? cu_tokens, float eps, bool needs_x, bool needs_h, bool needs_gate, bool needs_shift, "
        "bool needs_scale) -> Tensor[]");
  m.def("short_attention_cpu(Tensor qkv, SymInt heads, Tensor? cu_tokens, SymInt longest) -> Tensor");
  m.def("short_attention_backward_cpu(Tensor dout, Tensor qkv, SymInt heads, Tensor? cu_tokens, SymInt longest) "
        "-> Tensor");
  m.def("gelu(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor dy, Tensor x) -> Tensor");
  m.def("philox_normals(Tensor sample_ids, SymInt num, " PHM_DRAW ") -> Tensor");
  m.def("philox_integers(Tensor sample_ids, SymInt num, " PHM_DRAW ") -> Tensor");
}

#define PHM_IMPLEMENT(m)                                                       \
  m.impl("build_pyramid", TORCH_BOX(&phmdiff::build_pyramid));                   \
  m.impl("build_pyramid_backward", TORCH_BOX(&phmdiff::build_pyramid_backward)); \
  m.impl("merge_state", TORCH_BOX(&phmdiff::merge_state));                       \
  m.impl("upsample_add", TORCH_BOX(&phmdiff::upsample_add));                     \
  m.impl("level_error", TORCH_BOX(&phmdiff::level_error));                       \
  m.impl("merge_backward", TORCH_BOX(&phmdiff::merge_backward));                 \
  m.impl("haar3d", TORCH_BOX(&phmdiff::haar3d));                                 \
  m.impl("inverse_haar3d", TORCH_BOX(&phmdiff::inverse_haar3d));                 \
  m.impl("philox_normals", TORCH_BOX(&phmdiff::philox_normals));                 \
  m.impl("philox_integers", TORCH_BOX(&phmdiff::philox_integers))

STABLE_TORCH_LIBRARY_IMPL(phmdiff_fast, CPU, m) {
  PHM_IMPLEMENT(m);
  // On a GPU, Triton does these (kernels/adaln.py, kernels/short_attention.py), or the compiler within a product
  // (kernels/gelu.py).
  m.impl("adaln_modulate_cpu", TORCH_BOX(&phmdiff::adaln_modulate));
  m.impl("gated_residual_adaln_cpu", TORCH_BOX(&phmdiff::gated_residual_adaln));
  m.impl("adaln_backward_cpu", TORCH_BOX(&phmdiff::adaln_backward));
  m.impl("short_attention_cpu", TORCH_BOX(&phmdiff::short_attention));
  m.impl("short_attention_backward_cpu", TORCH_BOX(&phmdiff::short_attention_backward));
  m.impl("gelu", TORCH_BOX(&phmdiff::gelu));
  m.impl("gelu_backward", TORCH_BOX(&phmdiff::gelu_backward));
}
#if defined(PHM_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(phmdiff_fast, CUDA, m) { PHM_IMPLEMENT(m); }
#endif

// What this library is, for phmdiff_fast/kernels/_extension.py: "key=value" words.
extern "C" __attribute__((visibility("default"))) const char* phmdiff_fast_extension() {
  static const std::string text = std::string("sources=" PHM_SOURCES " cuda=" PHM_CUDA " cpu=") +
                                  (phmdiff::isa() == phmdiff::Isa::avx512 ? "avx512"
                                   : phmdiff::isa() == phmdiff::Isa::avx2 ? "avx2"
                                                                          : "generic");
  return text.c_str();
}
