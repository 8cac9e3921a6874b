// Random integers and normals of one sample, any range of a stream.
#include <algorithm>

#include "kernels.h"
#include "rows.h"

namespace phmdiff {
namespace PHM_ISA {
namespace {

constexpr int64_t BLOCK = 64;  // counters at a time

// Four normals from each of BLOCK counters from `index` on.
void block_of_normals(const Stream& s, uint32_t index, float* __restrict out) {
  alignas(64) uint32_t w0[BLOCK], w1[BLOCK], w2[BLOCK], w3[BLOCK];
  PHM_VECTOR
  for (uint32_t q = 0; q < BLOCK; ++q) {
    const Words w = philox(index + q, s);
    w0[q] = w.w0, w1[q] = w.w1, w2[q] = w.w2, w3[q] = w.w3;
  }
  PHM_VECTOR
  for (int64_t q = 0; q < BLOCK; ++q) {
    const Pair first = normal_pair(w0[q], w1[q]), second = normal_pair(w2[q], w3[q]);
    out[4 * q] = first.cos;
    out[4 * q + 1] = first.sin;
    out[4 * q + 2] = second.cos;
    out[4 * q + 3] = second.sin;
  }
}

}  // namespace

// Elements first .. first + count of the sample's stream: element e is lane e % 4 of counter e / 4.
void normals_row(const Stream& s, int64_t first, int64_t count, float* out) {
  alignas(64) float values[4 * BLOCK];
  for (int64_t e = first / 4 * 4; e < first + count; e += 4 * BLOCK) {
    float* whole = e >= first && e + 4 * BLOCK <= first + count ? out + (e - first) : values;
    block_of_normals(s, uint32_t(e / 4), whole);
    if (whole != values) continue;
    const int64_t from = std::max(e, first), to = std::min(e + 4 * BLOCK, first + count);
    std::copy(values + (from - e), values + (to - e), out + (from - first));
  }
}

void integers_row(const Stream& s, int64_t first, int64_t count, int64_t* __restrict out) {
  PHM_VECTOR
  for (int64_t i = 0; i < count; ++i) out[i] = int64_t(philox(uint32_t(first + i), s).w0);
}

}  // namespace PHM_ISA
}  // namespace phmdiff
