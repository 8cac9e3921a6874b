// Every operation for ctypes, on the CPU kernels or on the emulated CUDA ones. `type`: 0 float, 1 double,
// 2 bfloat16, 3 float16. Units [begin, end) of a CPU kernel; end < 0 stands for all.
#include <algorithm>
#include <cstdint>

#include "../../csrc/common/antialias.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cuda/kernels.h"

using namespace phmdiff;
namespace cpu = phmdiff::PHM_ISA;

namespace {

// The tables csrc/cpu/resample.cpp is called with, one weight after another as common/antialias.h says.
template <typename A>
Axis<A> axis_of(int64_t in, int64_t out, bool transposed) {
  const int64_t most = std::min(in, transposed ? MOST_REACHED : window_taps(in, out));
  Axis<A> axis = {in, out, most, std::vector<int32_t>(out), std::vector<A>(most * out, A(0))};
  for (int64_t i = 0; i < out; ++i) {
    const int64_t first = transposed ? first_reached(i, out, in) : window<A>(i, in, out).start;
    const int64_t start = std::min(first, in - most);
    axis.start[i] = int32_t(start);
    for (int64_t k = 0; k < most; ++k)
      axis.weight[k * out + i] =
          transposed ? window_weight(window<A>(start + k, out, in), i)
                     : window_weight(window<A>(i, in, out), start + k);
  }
  return axis;
}

struct Units {
  int64_t begin, end;
  Units(int64_t begin, int64_t end, int64_t all) : begin(begin), end(end < 0 ? all : end) {}
};

}  // namespace

#define PHM_TYPES(call)               \
  switch (type) {                     \
    case 0: return call<float>();     \
    case 1: return call<double>();    \
    case 2: return call<bfloat16>();  \
    default: return call<float16>();  \
  }

extern "C" {

void pyramid(int type, bool cuda, bool backward, const PyramidArgs* a, int64_t begin, int64_t end) {
  const auto run = [&]<typename T>() {
    if (cuda) return backward ? cuda::pyramid_backward<T>(*a, nullptr) : cuda::pyramid_forward<T>(*a, nullptr);
    int64_t rows = a->shape.height;
    for (int n = 0; n < a->levels; ++n) rows = half_of(rows);
    const Units u(begin, end, a->shape.batch * a->shape.channels * rows);
    backward ? cpu::pyramid_backward<T>(*a, u.begin, u.end) : cpu::pyramid_forward<T>(*a, u.begin, u.end);
  };
  PHM_TYPES(run.template operator())
}

void resampled(int type, bool cuda, const ResampleArgs* a, int64_t begin, int64_t end) {
  const auto run = [&]<typename T>() {
    if (cuda) return cuda::resample<T>(*a, nullptr);
    const Tables<wide_t<T>> tables = {axis_of<wide_t<T>>(a->in_height, a->out_height, a->transposed),
                                      axis_of<wide_t<T>>(a->in_width, a->out_width, a->transposed)};
    const Units u(begin, end, a->planes * a->out_height);
    cpu::resample<T>(*a, tables, u.begin, u.end);
  };
  PHM_TYPES(run.template operator())
}

void merge(int type, bool cuda, const void* args, int64_t begin, int64_t end) {
  const auto run = [&]<typename T>() {
    const auto& a = *static_cast<const MergeArgs<wide_t<T>>*>(args);
    if (cuda) return cuda::merge_forward<T>(a, nullptr);
    const Units u(begin, end, a.shape.batch * a.shape.channels * a.shape.height);
    cpu::merge_forward<T>(a, u.begin, u.end);
  };
  PHM_TYPES(run.template operator())
}

void merge_backward(int type, bool cuda, const void* args, int64_t begin, int64_t end) {
  const auto run = [&]<typename T>() {
    const auto& a = *static_cast<const MergeBackwardArgs<wide_t<T>>*>(args);
    if (cuda) return cuda::merge_backward<T>(a, nullptr);
    const Units u(begin, end, a.shape.batch * a.shape.channels * half_of(a.shape.height));
    cpu::merge_backward<T>(a, u.begin, u.end);
  };
  PHM_TYPES(run.template operator())
}

void haar(int type, bool cuda, bool inverse, const HaarArgs* a, int64_t begin, int64_t end) {
  const auto run = [&]<typename T>() {
    if (cuda) return inverse ? cuda::haar_inverse<T>(*a, nullptr) : cuda::haar_forward<T>(*a, nullptr);
    const Units u(begin, end, a->batch * a->channels * half_of(a->x) * half_of(a->y));
    inverse ? cpu::haar_inverse<T>(*a, u.begin, u.end) : cpu::haar_forward<T>(*a, u.begin, u.end);
  };
  PHM_TYPES(run.template operator())
}

void drawn(bool cuda, bool integers, const DrawArgs* a) {
  if (cuda) return integers ? cuda::draw_integers(*a, nullptr) : cuda::draw_normals(*a, nullptr);
  for (int64_t b = 0; b < a->batch; ++b) {
    const Stream stream = stream_of(a->normals, b);
    if (integers)
      cpu::integers_row(stream, 0, a->count, static_cast<int64_t*>(a->out) + b * a->count);
    else
      cpu::normals_row(stream, 0, a->count, static_cast<float*>(a->out) + b * a->count);
  }
}

// What ctypes has to lay out alike.
int64_t size_of(int which) {
  const int64_t sizes[] = {sizeof(PyramidArgs),       sizeof(ResampleArgs),
                           sizeof(MergeArgs<float>),  sizeof(MergeBackwardArgs<float>),
                           sizeof(MergeArgs<double>), sizeof(MergeBackwardArgs<double>),
                           sizeof(HaarArgs),          sizeof(DrawArgs)};
  return sizes[which];
}
}
