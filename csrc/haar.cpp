// The 3D Haar transform and its inverse; each is the other's backward.
#include "ops.h"
#include "tensor.h"

namespace phmdiff {

Tensor haar3d(const Tensor& x) {
  const char* op = "haar3d";
  require(x.dim() == 5, op, "need (B, C, X, Y, Z), got ", x.dim(), " dimensions");
  const Tensor dense = torch::stable::contiguous(x);
  const HaarArgs sizes{nullptr, nullptr, x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)};
  const int64_t i = half_of(sizes.x), j = half_of(sizes.y), k = half_of(sizes.z);
  Tensor out = empty_like(x, {sizes.batch, 8, sizes.channels, i, j, k});
  if (sizes.batch * sizes.channels * i * j * k == 0) return out;
  HaarArgs a = sizes;
  a.in = dense.const_data_ptr(), a.out = out.mutable_data_ptr();
  with_type(op, x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    PHM_ON_DEVICE_OF(
        op, x,
        [&] {
          in_parallel(a.batch * a.channels * i * j, 8 * k,
                      [&](int64_t begin, int64_t end) { PHM_CPU(haar_forward<T>(a, begin, end)); });
        },
        cuda::haar_forward<T>(a, stream));
  });
  return out;
}

Tensor inverse_haar3d(const Tensor& bands, int64_t x, int64_t y, int64_t z) {
  const char* op = "inverse_haar3d";
  require(bands.dim() == 6 && bands.size(1) == 8, op, "need (B, 8, C, x, y, z)");
  const int64_t i = half_of(x), j = half_of(y), k = half_of(z);
  require(bands.size(3) == i && bands.size(4) == j && bands.size(5) == k, op, "bands must be half of ", x, " x ", y,
          " x ", z, ", rounded up");
  const Tensor dense = torch::stable::contiguous(bands);
  Tensor out = empty_like(bands, {bands.size(0), bands.size(2), x, y, z});
  const HaarArgs a{dense.const_data_ptr(), out.mutable_data_ptr(), bands.size(0), bands.size(2), x, y, z};
  if (a.batch * a.channels * x * y * z == 0) return out;
  with_type(op, bands, [&](auto tag) {
    using T = typename decltype(tag)::type;
    PHM_ON_DEVICE_OF(
        op, bands,
        [&] {
          in_parallel(a.batch * a.channels * i * j, 8 * k,
                      [&](int64_t begin, int64_t end) { PHM_CPU(haar_inverse<T>(a, begin, end)); });
        },
        cuda::haar_inverse<T>(a, stream));
  });
  return out;
}

}  // namespace phmdiff
