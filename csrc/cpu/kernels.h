// The CPU kernels' interface. Every kernel does units [begin, end) of its work and writes only those, so any
// split over threads gives the same bits.
//
// Each file beside this one is compiled once per instruction set (setup.py), in a namespace of its own;
// dispatch.h picks one at run time.
#pragma once

#include <vector>

#include "../common/args.h"

namespace phmdiff {

// One axis of a separable resampling: out[i] = sum over k < taps of weight[k * out + i] * in[start[i] + k].
template <typename A>
struct Axis {
  int64_t in, out, taps;
  std::vector<int32_t> start;
  std::vector<A> weight;
};

template <typename A>
struct Tables {
  Axis<A> rows, cols;
};

#define PHM_CPU_KERNELS                                                                        \
  template <typename T>                                                                        \
  void pyramid_forward(const PyramidArgs&, int64_t begin, int64_t end);                        \
  template <typename T>                                                                        \
  void pyramid_backward(const PyramidArgs&, int64_t begin, int64_t end);                       \
  template <typename T>                                                                        \
  void resample(const ResampleArgs&, const Tables<wide_t<T>>&, int64_t begin, int64_t end);    \
  template <typename T>                                                                        \
  void merge_forward(const MergeArgs<wide_t<T>>&, int64_t begin, int64_t end);                 \
  template <typename T>                                                                        \
  void merge_backward(const MergeBackwardArgs<wide_t<T>>&, int64_t begin, int64_t end);        \
  template <typename T>                                                                        \
  void haar_forward(const HaarArgs&, int64_t begin, int64_t end);                              \
  template <typename T>                                                                        \
  void haar_inverse(const HaarArgs&, int64_t begin, int64_t end);                              \
  template <typename Types>                                                                    \
  void adaln_forward(const AdalnArgs&, int64_t begin, int64_t end);                            \
  template <typename Types>                                                                    \
  void adaln_backward(const AdalnArgs&, int64_t begin, int64_t end);                           \
  template <typename Types>                                                                    \
  void adaln_add_parts(const AdalnArgs&, int64_t begin, int64_t end);                          \
  template <typename T>                                                                        \
  void attention_forward(const AttentionArgs&, int64_t begin, int64_t end);                    \
  template <typename T>                                                                        \
  void attention_backward(const AttentionArgs&, int64_t begin, int64_t end);                   \
  template <typename T>                                                                        \
  void gelu_forward(const void* x, void* y, int64_t begin, int64_t end);                       \
  template <typename T>                                                                        \
  void gelu_backward(const void* dy, const void* x, void* dx, int64_t begin, int64_t end);     \
  void normals_row(const Stream&, int64_t first, int64_t count, float* out);                   \
  void integers_row(const Stream&, int64_t first, int64_t count, int64_t* out);

#if defined(PHM_ISA)
namespace PHM_ISA {
PHM_CPU_KERNELS
}
#endif

}  // namespace phmdiff