// Modulated LayerNorm, alone and behind a gated residual, and the backward of both (kernels/adaln.py). CPU only.
#include "ops.h"
#include "tensor.h"

#include <memory>

namespace phmdiff {
namespace {

using Maybe = std::optional<Tensor>;

// Rows of a stretch: sums over rows are of these first, so the result depends on the length.
constexpr int64_t STRETCH = 64;

// f(AdalnTypes<residual, branch>{}) for the mixes that kernels/adaln.py takes.
template <typename F>
void with_types(const char* op, const Tensor& x, const Tensor& scale, F f) {
  const ScalarType wide = x.scalar_type(), narrow = scale.scalar_type();
  if (wide == ScalarType::Float && narrow == ScalarType::Float) return f(AdalnTypes<float, float>{});
  if (wide == ScalarType::Float && narrow == ScalarType::BFloat16) return f(AdalnTypes<float, bfloat16>{});
  require(wide == ScalarType::BFloat16 && narrow == ScalarType::BFloat16, op,
          "need float32, bfloat16, or x float32 beside bfloat16");
  f(AdalnTypes<bfloat16, bfloat16>{});
}

// Who has which rows: everything the kernels are told of a batch, or of packed samples.
struct Layout {
  int64_t samples, tokens, width, rows = 0;  // rows of each sample, 0 where they are packed
  std::vector<Stretch> stretches;
  std::vector<int64_t> first;  // stretch of each sample, and the end
  int64_t most = 0;            // parts of a sample

  void add(int64_t sample, int64_t begin, int64_t end) {
    const int64_t parts = std::max<int64_t>(1, (end - begin + STRETCH - 1) / STRETCH);
    first.push_back(int64_t(stretches.size()));
    most = std::max(most, parts);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t at = begin + part * STRETCH;
      stretches.push_back({sample, at, std::min(STRETCH, end - at), parts});
    }
  }
};

template <typename I>
void add_packed(const char* op, const Tensor& cu, Layout& layout) {
  const I* at = static_cast<const I*>(cu.const_data_ptr());
  require(at[0] == 0 && at[layout.samples] == layout.tokens, op, "cu_tokens must run from 0 to ", layout.tokens);
  for (int64_t sample = 0; sample < layout.samples; ++sample) {
    require(at[sample] <= at[sample + 1], op, "cu_tokens must ascend");
    layout.add(sample, at[sample], at[sample + 1]);
  }
}

Layout layout_of(const char* op, const Tensor& x, const Maybe& cu) {
  require(x.is_cpu(), op, "need CPU tensors");
  require(x.dim() == (cu ? 2 : 3), op, "x must be (B, N, D), or (T, D) with cu_tokens");
  if (cu) require(cu->is_cpu() && cu->dim() == 1 && cu->size(0) > 0, op, "cu_tokens must be (S + 1,), on the CPU");
  const int64_t samples = cu ? cu->size(0) - 1 : x.size(0), rows = cu ? 0 : x.size(1);
  Layout layout{samples, cu ? x.size(0) : samples * rows, x.size(x.dim() - 1), rows, {}, {}};
  layout.stretches.reserve(size_t(samples + layout.tokens / STRETCH));
  layout.first.reserve(size_t(samples + 1));
  if (!cu) {
    for (int64_t sample = 0; sample < samples; ++sample) layout.add(sample, 0, rows);
  } else {
    const Tensor dense = torch::stable::contiguous(*cu);
    const ScalarType type = cu->scalar_type();
    require(type == ScalarType::Int || type == ScalarType::Long, op, "cu_tokens must be int32 or int64");
    type == ScalarType::Int ? add_packed<int32_t>(op, dense, layout) : add_packed<int64_t>(op, dense, layout);
  }
  layout.first.push_back(int64_t(layout.stretches.size()));
  return layout;
}

// Tensors that the kernels read, kept alive where they had to be copied.
class Inputs {
 public:
  Inputs(const char* op, const Tensor& x, const Layout& layout) : op_(op), x_(x), layout_(layout) {}

  TokenRows tokens(const char* name, const Maybe& t, ScalarType type) {
    if (!t) return {};
    check(name, *t, type);
    require(t->dim() == x_.dim(), op_, name, " must have the shape of x");
    for (int64_t d = 0; d < t->dim(); ++d) require(t->size(d) == x_.size(d), op_, name, " must have the shape of x");
    const Tensor& dense = kept(*t);
    return {dense.const_data_ptr(), dense.dim() == 3 ? dense.stride(0) : 0, dense.stride(dense.dim() - 2)};
  }

  SampleVectors vectors(const char* name, const Maybe& t, ScalarType type) {
    if (!t) return {};
    check(name, *t, type);
    require(t->dim() == 2 && t->size(0) == layout_.samples && t->size(1) == layout_.width, op_, name,
            " must be one row of x's width a sample");
    const Tensor& dense = kept(*t);
    return {dense.const_data_ptr(), dense.stride(0)};
  }

 private:
  void check(const char* name, const Tensor& t, ScalarType type) {
    require(t.is_cpu(), op_, name, " must be on the CPU");
    require(t.scalar_type() == type, op_, name, " has another element type");
  }
  const Tensor& kept(const Tensor& t) {
    kept_.push_back(std::make_unique<Tensor>(dense_rows(t)));
    return *kept_.back();
  }

  const char* op_;
  const Tensor& x_;
  const Layout& layout_;
  std::vector<std::unique_ptr<Tensor>> kept_;
};

std::vector<int64_t> sizes_like(const Tensor& x) {
  return x.dim() == 3 ? std::vector<int64_t>{x.size(0), x.size(1), x.size(2)}
                      : std::vector<int64_t>{x.size(0), x.size(1)};
}

AdalnArgs args_of(const Layout& layout, double eps) {
  AdalnArgs a{};
  a.stretches = layout.stretches.data(), a.first_stretch = layout.first.data();
  a.width = layout.width, a.rows = layout.rows, a.eps = float(eps);
  return a;
}

// x' into `new_x` where h is given, y.
void forward(const char* op, const Tensor& x, const Maybe& h, const Maybe& gate, const Tensor& shift,
             const Tensor& scale, const Maybe& cu, double eps, void* new_x, void* y) {
  const Layout layout = layout_of(op, x, cu);
  const ScalarType type = scale.scalar_type();
  Inputs inputs(op, x, layout);
  AdalnArgs a = args_of(layout, eps);
  a.x = inputs.tokens("x", x, x.scalar_type()), a.h = inputs.tokens("h", h, type);
  a.gate = inputs.vectors("gate", gate, type), a.shift = inputs.vectors("shift", shift, type);
  a.scale = inputs.vectors("scale", scale, type);
  a.new_x = new_x, a.y = y;
  with_types(op, x, scale, [&](auto types) {
    using Types = decltype(types);
    if (layout.tokens * layout.width == 0) return;
    in_parallel(int64_t(layout.stretches.size()), std::min(STRETCH, layout.tokens) * layout.width,
                [&](int64_t begin, int64_t end) { PHM_CPU(adaln_forward<Types>(a, begin, end)); });
  });
}

}  // namespace

Tensor adaln_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, const Maybe& cu_tokens, double eps) {
  Tensor y = empty_like(x, sizes_like(x), scale.scalar_type());
  forward("adaln_modulate", x, std::nullopt, std::nullopt, shift, scale, cu_tokens, eps, nullptr,
          y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor> gated_residual_adaln(const Tensor& x, const Tensor& h, const Tensor& gate,
                                                const Tensor& shift, const Tensor& scale, const Maybe& cu_tokens,
                                                double eps) {
  Tensor new_x = empty_like(x, sizes_like(x)), y = empty_like(x, sizes_like(x), scale.scalar_type());
  forward("gated_residual_adaln", x, h, gate, shift, scale, cu_tokens, eps, new_x.mutable_data_ptr(),
          y.mutable_data_ptr());
  return {new_x, y};
}

std::vector<Tensor> adaln_backward(const Maybe& dy, const Maybe& dnew, const Tensor& x, const Maybe& h,
                                   const Maybe& gate, const Tensor& scale, const Maybe& cu_tokens, double eps,
                                   bool needs_x, bool needs_h, bool needs_gate, bool needs_shift, bool needs_scale) {
  const char* op = "adaln_backward";
  const Layout layout = layout_of(op, x, cu_tokens);
  require(dy || dnew, op, "need a gradient");
  require(dy || !(needs_shift || needs_scale), op, "shift and scale get a gradient from that of y alone");
  require(!needs_h || gate, op, "the gradient of h needs gate");
  require(!needs_gate || h, op, "the gradient of gate needs h");
  const ScalarType wide = x.scalar_type(), type = scale.scalar_type();
  Inputs inputs(op, x, layout);
  AdalnArgs a = args_of(layout, eps);
  a.x = inputs.tokens("x", x, wide), a.h = inputs.tokens("h", h, type);
  a.dy = inputs.tokens("dy", dy, type), a.dnew = inputs.tokens("dnew", dnew, wide);
  a.gate = inputs.vectors("gate", gate, type), a.scale = inputs.vectors("scale", scale, type);
  std::vector<Tensor> out;
  const auto made = [&](bool needed, std::vector<int64_t> sizes, ScalarType of) -> void* {
    if (!needed) return nullptr;
    out.push_back(empty_like(x, sizes, of));
    return out.back().mutable_data_ptr();
  };
  const std::vector<int64_t> vector{layout.samples, layout.width};
  a.dx = made(needs_x, sizes_like(x), wide), a.dh = made(needs_h, sizes_like(x), type);
  a.dgate = made(needs_gate, vector, type), a.dshift = made(needs_shift, vector, type);
  a.dscale = made(needs_scale, vector, type);
  const int64_t units = int64_t(layout.stretches.size());
  const bool several = layout.most > 1 && (needs_gate || needs_shift || needs_scale);
  const std::unique_ptr<float[]> partial(several ? new float[size_t(3 * units * layout.width)] : nullptr);
  a.partial = partial.get();
  with_types(op, x, scale, [&](auto types) {
    using Types = decltype(types);
    if (layout.width == 0) return;
    in_parallel(units, std::min(STRETCH, layout.tokens) * layout.width,
                [&](int64_t begin, int64_t end) { PHM_CPU(adaln_backward<Types>(a, begin, end)); });
    if (several)
      in_parallel(layout.samples, 3 * layout.most * layout.width,
                  [&](int64_t begin, int64_t end) { PHM_CPU(adaln_add_parts<Types>(a, begin, end)); });
  });
  return out;
}

}  // namespace phmdiff
