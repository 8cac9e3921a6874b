// Random integers and normals of whole streams. Nothing is read; 4 bytes a normal and 8 an integer are written.
// A piece of work is a run of one sample's counters, so the sample is the same for a whole block.
#include "../common/philox.h"

#include "kernels.h"
#include "launch.cuh"

namespace phmdiff {
namespace cuda {
namespace {

constexpr int THREADS = 256;

// A counter gives four neighbouring normals, which leave as one store of 16 bytes.
__global__ void __launch_bounds__(THREADS) normals_kernel(DrawArgs a, Divisor runs, bool whole) {
  for (int64_t piece = blockIdx.x; piece < a.batch * runs.by; piece += gridDim.x) {
    const Divided at = divide(piece, runs);
    const int64_t counter = at.remainder * THREADS + threadIdx.x;
    if (4 * counter >= a.count) continue;
    const Words w = philox(uint32_t(counter), stream_of(a.normals, at.quotient));
    const Pair first = normal_pair(w.w0, w.w1), second = normal_pair(w.w2, w.w3);
    const float values[4] = {first.cos, first.sin, second.cos, second.sin};
    float* to = static_cast<float*>(a.out) + at.quotient * a.count + 4 * counter;
    store_row<4>(values, to, left_of<4>(a.count, 4 * counter), whole);
  }
}

// Word 0 of a counter for each element: the integers of masks.
__global__ void __launch_bounds__(THREADS) integers_kernel(DrawArgs a, Divisor runs) {
  for (int64_t piece = blockIdx.x; piece < a.batch * runs.by; piece += gridDim.x) {
    const Divided at = divide(piece, runs);
    const int64_t i = at.remainder * THREADS + threadIdx.x;
    if (i >= a.count) continue;
    const Words w = philox(uint32_t(i), stream_of(a.normals, at.quotient));
    static_cast<int64_t*>(a.out)[at.quotient * a.count + i] = int64_t(w.w0);
  }
}

}  // namespace

void draw_normals(const DrawArgs& a, cudaStream_t stream) {
  if (a.batch * a.count == 0) return;
  const int64_t runs = ceil_div(a.count, 4 * THREADS);
  const bool whole = aligned<float>(16, a.out, a.count);
  PHM_LAUNCH(normals_kernel, blocks_of(a.batch * runs), THREADS, stream, a, Divisor(runs), whole);
  check_launch("draw_normals");
}

void draw_integers(const DrawArgs& a, cudaStream_t stream) {
  if (a.batch * a.count == 0) return;
  const int64_t runs = ceil_div(a.count, THREADS);
  PHM_LAUNCH(integers_kernel, blocks_of(a.batch * runs), THREADS, stream, a, Divisor(runs));
  check_launch("draw_integers");
}

}  // namespace cuda
}  // namespace phmdiff
