// Self-attention of short sequences from the packed projection, and its backward, which recomputes the weights
// (kernels/short_attention.py). CPU only.
#include "ops.h"
#include "tensor.h"

#include <cmath>

namespace phmdiff {
namespace {

using Maybe = std::optional<Tensor>;

// Sequences and heads, checked; offsets of packed sequences, on the host.
struct Layout {
  int64_t sequences, tokens, heads, dim, longest;
  std::vector<int64_t> offsets;

  int64_t units() const { return tokens * dim == 0 ? 0 : sequences * heads; }
  std::vector<int64_t> sizes(bool packed, int64_t columns) const {
    return packed ? std::vector<int64_t>{tokens, columns}
                  : std::vector<int64_t>{sequences, sequences ? tokens / sequences : longest, columns};
  }
};

template <typename I>
void read_offsets(const char* op, const Tensor& cu, Layout& layout) {
  const I* at = static_cast<const I*>(cu.const_data_ptr());
  layout.offsets.assign(at, at + layout.sequences + 1);
  require(layout.offsets.front() == 0 && layout.offsets.back() == layout.tokens, op, "cu_tokens must run from 0 to ",
          layout.tokens);
  for (int64_t s = 0; s < layout.sequences; ++s)
    require(layout.offsets[s] <= layout.offsets[s + 1], op, "cu_tokens must ascend");
}

Layout layout_of(const char* op, const Tensor& qkv, int64_t heads, const Maybe& cu, int64_t longest) {
  require(qkv.is_cpu(), op, "need CPU tensors");
  require(qkv.dim() == (cu ? 2 : 3), op, "qkv must be (B, N, 3 D), or (T, 3 D) with cu_tokens");
  const int64_t triple = qkv.size(qkv.dim() - 1);
  require(heads > 0 && triple % (3 * heads) == 0, op, "qkv must be packed as (3, heads, d)");
  Layout layout{0, 0, heads, triple / (3 * heads), longest, {}};
  if (!cu) {
    require(longest == qkv.size(1), op, "longest must be ", qkv.size(1), " without cu_tokens");
    layout.sequences = qkv.size(0), layout.tokens = qkv.size(0) * qkv.size(1);
    return layout;
  }
  require(longest >= 0, op, "longest must not be negative");
  require(cu->is_cpu() && cu->dim() == 1 && cu->size(0) > 0, op, "cu_tokens must be (S + 1,), on the CPU");
  const ScalarType type = cu->scalar_type();
  require(type == ScalarType::Int || type == ScalarType::Long, op, "cu_tokens must be int32 or int64");
  layout.sequences = cu->size(0) - 1, layout.tokens = qkv.size(0);
  const Tensor dense = torch::stable::contiguous(*cu);
  type == ScalarType::Int ? read_offsets<int32_t>(op, dense, layout) : read_offsets<int64_t>(op, dense, layout);
  return layout;
}

// `x` must be the result of dense_rows and outlive them.
TokenRows token_rows(const Tensor& x) {
  return {x.const_data_ptr(), x.dim() == 3 ? x.stride(0) : 0, x.stride(x.dim() - 2)};
}

AttentionArgs args_of(const Layout& layout, const Tensor& qkv) {
  AttentionArgs a{};
  a.qkv = token_rows(qkv);
  a.offsets = layout.offsets.empty() ? nullptr : layout.offsets.data();
  a.heads = layout.heads, a.dim = layout.dim, a.longest = layout.longest;
  const double scale = 1.0 / std::sqrt(double(std::max<int64_t>(1, layout.dim)));
  a.scale = float(scale), a.scale2 = float(scale * 1.44269504088896340736);
  return a;
}

// f(Tag<element type>{}, begin, end) over heads of sequences.
template <typename F>
void over_units(const char* op, const Tensor& qkv, const Layout& layout, F f) {
  const int64_t work = layout.longest * (layout.longest + 4 * layout.dim);
  const auto run = [&](auto tag) {
    in_parallel(layout.units(), work, [&](int64_t begin, int64_t end) { f(tag, begin, end); });
  };
  if (qkv.scalar_type() == ScalarType::Float) return run(Tag<float>{});
  require(qkv.scalar_type() == ScalarType::BFloat16, op, "need float32 or bfloat16");
  run(Tag<bfloat16>{});
}

}  // namespace

Tensor short_attention(const Tensor& qkv, int64_t heads, const Maybe& cu_tokens, int64_t longest) {
  const char* op = "short_attention";
  const Layout layout = layout_of(op, qkv, heads, cu_tokens, longest);
  const Tensor dense = dense_rows(qkv);
  Tensor out = empty_like(qkv, layout.sizes(cu_tokens.has_value(), layout.heads * layout.dim));
  AttentionArgs a = args_of(layout, dense);
  a.out = out.mutable_data_ptr();
  over_units(op, qkv, layout, [&](auto tag, int64_t begin, int64_t end) {
    using T = typename decltype(tag)::type;
    PHM_CPU(attention_forward<T>(a, begin, end));
  });
  return out;
}

Tensor short_attention_backward(const Tensor& dout, const Tensor& qkv, int64_t heads, const Maybe& cu_tokens,
                                int64_t longest) {
  const char* op = "short_attention_backward";
  const Layout layout = layout_of(op, qkv, heads, cu_tokens, longest);
  const std::vector<int64_t> sizes = layout.sizes(cu_tokens.has_value(), layout.heads * layout.dim);
  require_like(op, "dout", dout, qkv);
  require(dout.dim() == int64_t(sizes.size()), op, "dout must have the shape of the result");
  for (int64_t d = 0; d < dout.dim(); ++d)
    require(dout.size(d) == sizes[size_t(d)], op, "dout must have the shape of the result");
  const Tensor dense = dense_rows(qkv), dense_dout = dense_rows(dout);
  Tensor dqkv = empty_like(qkv, layout.sizes(cu_tokens.has_value(), 3 * layout.heads * layout.dim));
  AttentionArgs a = args_of(layout, dense);
  a.dout = token_rows(dense_dout), a.dqkv = dqkv.mutable_data_ptr();
  over_units(op, qkv, layout, [&](auto tag, int64_t begin, int64_t end) {
    using T = typename decltype(tag)::type;
    PHM_CPU(attention_backward<T>(a, begin, end));
  });
  return dqkv;
}

}  // namespace phmdiff
