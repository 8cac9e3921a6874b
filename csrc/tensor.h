// Between torch's stable ABI and the kernels: checks with messages, outputs, threads, the stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/args.h"
#include "cpu/dispatch.h"

#if defined(PHM_WITH_CUDA)
#include <dlfcn.h>

#include "cuda/kernels.h"
#endif

namespace phmdiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises RuntimeError with "<op>: <what>" where `holds` is false. The Python functions check first and raise
// ValueError or TypeError; these checks guard a direct call of the operation.
template <typename... Parts>
void require(bool holds, const char* op, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename T>
struct Tag {
  using type = T;
};

// f(Tag<element type>{}) for the tensor's element type.
template <typename F>
void with_type(const char* op, const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(Tag<float>{});
    case ScalarType::Double: return f(Tag<double>{});
    case ScalarType::BFloat16: return f(Tag<bfloat16>{});
    case ScalarType::Half: return f(Tag<float16>{});
    default: require(false, op, "need float32, float64, bfloat16 or float16, got another element type");
  }
}

// The type abar, weights and sums have beside elements of this type.
inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void require_images(const char* op, const Tensor& x) {
  require(x.dim() == 4, op, "need (B, C, H, W), got ", x.dim(), " dimensions");
  require(x.is_cpu() || x.is_cuda(), op, "need a CPU or CUDA tensor");
}

inline void require_like(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  require(x.scalar_type() == like.scalar_type(), op, name, " has another element type");
  require(x.get_device() == like.get_device(), op, name, " is on another device");
}

inline Shape shape_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

// Rows as they lie in memory where they are dense (any strides above them), else a copy.
inline Tensor dense_rows(const Tensor& x) {
  return x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

// `x` must be the result of dense_rows and outlive the image.
inline Image image_of(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

inline Tensor empty_like(const Tensor& x, const std::vector<int64_t>& sizes,
                         std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(x, sizes, type);
}

// f(begin, end) over units, on torch's own threads; a thread gets at least 32k elements of work.
template <typename F>
void in_parallel(int64_t units, int64_t work_per_unit, const F& f) {
  if (units <= 0) return;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work_per_unit));
  torch::stable::parallel_for(0, units, grain, f);
}

#if defined(PHM_WITH_CUDA)
// It is in libtorch_cuda alone, which a CPU-only torch lacks and which Python loads out of the linker's sight: so it is
// neither linked to nor a weak symbol, but looked up in the library that is loaded.
inline auto stream_getter() {
  using Getter = AOTITorchError (*)(int32_t device, void** stream);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  return getter;
}

inline cudaStream_t current_stream(const char* op, const Tensor& x) {
  const auto getter = stream_getter();
  require(getter != nullptr, op, "this torch has no CUDA");
  void* stream = nullptr;
  require(getter(x.get_device(), &stream) == 0, op, "torch gave no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Where x is on a GPU, f(its current stream) under its device guard; else `cpu()`.
template <typename F, typename G>
void on_device_of(const char* op, const Tensor& x, F cpu, G cuda) {
  if (x.is_cpu()) return cpu();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  cuda(current_stream(op, x));
}
#define PHM_ON_DEVICE_OF(op, x, cpu, ...) on_device_of(op, x, cpu, [&](cudaStream_t stream) { __VA_ARGS__; })
#else
#define PHM_ON_DEVICE_OF(op, x, cpu, ...)                                       \
  do {                                                                          \
    require((x).is_cpu(), op, "this extension was built without CUDA kernels"); \
    cpu();                                                                      \
  } while (0)
#endif

}  // namespace phmdiff
