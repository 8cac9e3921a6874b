// The CUDA kernels' interface: plain pointers and a stream, no torch, so that nvcc compiles these files beside a
// CPU-only torch. Every launcher only puts work on the stream: no allocation, no synchronisation.
#pragma once

#include "../common/args.h"

// As CUDA declares it; so what only calls the launchers needs no header of CUDA.
using cudaStream_t = struct CUstream_st*;

namespace phmdiff {
namespace cuda {

template <typename T>
void pyramid_forward(const PyramidArgs&, cudaStream_t);
template <typename T>
void pyramid_backward(const PyramidArgs&, cudaStream_t);
template <typename T>
void resample(const ResampleArgs&, cudaStream_t);
template <typename T>
void merge_forward(const MergeArgs<wide_t<T>>&, cudaStream_t);
template <typename T>
void merge_backward(const MergeBackwardArgs<wide_t<T>>&, cudaStream_t);
template <typename T>
void haar_forward(const HaarArgs&, cudaStream_t);
template <typename T>
void haar_inverse(const HaarArgs&, cudaStream_t);
void draw_normals(const DrawArgs&, cudaStream_t);
void draw_integers(const DrawArgs&, cudaStream_t);

}  // namespace cuda
}  // namespace phmdiff
