// Random integers and normals, as kernels/_philox.py defines them.
#include "ops.h"
#include "tensor.h"

namespace phmdiff {

Normals normals_of(const char* op, const Tensor& sample_ids, int64_t seed, int64_t step,
                   const std::optional<Tensor>& seed_at, const std::optional<Tensor>& step_at, int64_t stream) {
  require(sample_ids.dim() == 1 && sample_ids.scalar_type() == ScalarType::Long && sample_ids.is_contiguous(), op,
          "sample_ids must be (B,) int64, dense");
  Normals out{static_cast<const int64_t*>(sample_ids.const_data_ptr()), seed, step, stream, nullptr, nullptr};
  for (const auto* part : {&seed_at, &step_at}) {
    if (!*part) continue;
    const Tensor& at = **part;
    require(at.numel() == 1 && at.scalar_type() == ScalarType::Long && at.get_device() == sample_ids.get_device(), op,
            "seed and step must be integers or 0-d int64 tensors beside sample_ids");
    (part == &seed_at ? out.seed_at : out.step_at) = static_cast<const int64_t*>(at.const_data_ptr());
  }
  return out;
}

namespace {

Tensor draw(const char* op, const Tensor& sample_ids, int64_t num, const Normals& normals, bool integers) {
  const int64_t batch = sample_ids.size(0), limit = int64_t(1) << (integers ? 32 : 34);
  require(num >= 0 && num <= limit, op, "a stream has ", limit, " numbers, asked for ", num);
  Tensor out = empty_like(sample_ids, {batch, num}, integers ? ScalarType::Long : ScalarType::Float);
  if (batch * num == 0) return out;
  const DrawArgs a{normals, batch, num, out.mutable_data_ptr()};
  const int64_t piece = 4096, pieces = (num + piece - 1) / piece;
  const auto on_cpu = [&] {
    in_parallel(batch * pieces, 8 * std::min(piece, num), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / pieces, first = unit % pieces * piece, count = std::min(piece, num - first);
        const Stream s = stream_of(a.normals, b);
        if (integers)
          PHM_CPU(integers_row(s, first, count, static_cast<int64_t*>(a.out) + b * num + first));
        else
          PHM_CPU(normals_row(s, first, count, static_cast<float*>(a.out) + b * num + first));
      }
    });
  };
  PHM_ON_DEVICE_OF(op, sample_ids, on_cpu,
                   integers ? cuda::draw_integers(a, stream) : cuda::draw_normals(a, stream));
  return out;
}

}  // namespace

Tensor philox_normals(const Tensor& sample_ids, int64_t num, int64_t seed, int64_t step,
                      const std::optional<Tensor>& seed_at, const std::optional<Tensor>& step_at, int64_t stream) {
  const char* op = "philox_normals";
  return draw(op, sample_ids, num, normals_of(op, sample_ids, seed, step, seed_at, step_at, stream), false);
}

Tensor philox_integers(const Tensor& sample_ids, int64_t num, int64_t seed, int64_t step,
                       const std::optional<Tensor>& seed_at, const std::optional<Tensor>& step_at, int64_t stream) {
  const char* op = "philox_integers";
  return draw(op, sample_ids, num, normals_of(op, sample_ids, seed, step, seed_at, step_at, stream), true);
}

}  // namespace phmdiff
