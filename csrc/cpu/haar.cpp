// The 3D Haar transform and its inverse. A unit is a row of blocks along z: four rows of the volume and one row
// of each of the eight bands.
#include "../common/haar.h"

#include <algorithm>

#include "../common/pyramid.h"
#include "kernels.h"
#include "rows.h"

namespace phmdiff {
namespace PHM_ISA {
namespace {

struct Place {
  int64_t volume, i, j;  // (b, c) of the volume, and the block's place in x and y
  int64_t band, apart;   // offset of this row in band 0, and between bands
};

Place place_of(const HaarArgs& a, int64_t unit) {
  const int64_t x = half_of(a.x), y = half_of(a.y), z = half_of(a.z);
  const int64_t volume = unit / (x * y), b = volume / a.channels, c = volume % a.channels;
  const int64_t apart = a.channels * x * y * z;
  return {volume, unit / y % x, unit % y, (8 * b * a.channels + c) * x * y * z + unit % (x * y) * z, apart};
}

// The pointers are parameters: only there does GCC take __restrict at its word.
template <typename A>
void split_rows(const A* __restrict r0, const A* __restrict r1, const A* __restrict r2, const A* __restrict r3,
                int64_t pairs, A* __restrict b0, A* __restrict b1, A* __restrict b2, A* __restrict b3,
                A* __restrict b4, A* __restrict b5, A* __restrict b6, A* __restrict b7) {
  PHM_VECTOR
  for (int64_t k = 0; k < pairs; ++k) {
    A v0 = r0[2 * k], v1 = r0[2 * k + 1], v2 = r1[2 * k], v3 = r1[2 * k + 1];
    A v4 = r2[2 * k], v5 = r2[2 * k + 1], v6 = r3[2 * k], v7 = r3[2 * k + 1];
    haar_block(v0, v1, v2, v3, v4, v5, v6, v7);
    b0[k] = v0, b1[k] = v1, b2[k] = v2, b3[k] = v3, b4[k] = v4, b5[k] = v5, b6[k] = v6, b7[k] = v7;
  }
}

template <typename A>
void join_rows(const A* __restrict b0, const A* __restrict b1, const A* __restrict b2, const A* __restrict b3,
               const A* __restrict b4, const A* __restrict b5, const A* __restrict b6, const A* __restrict b7,
               int64_t pairs, A* __restrict r0, A* __restrict r1, A* __restrict r2, A* __restrict r3) {
  PHM_VECTOR
  for (int64_t k = 0; k < pairs; ++k) {
    A v0 = b0[k], v1 = b1[k], v2 = b2[k], v3 = b3[k], v4 = b4[k], v5 = b5[k], v6 = b6[k], v7 = b7[k];
    haar_block(v0, v1, v2, v3, v4, v5, v6, v7);
    r0[2 * k] = v0, r0[2 * k + 1] = v1, r1[2 * k] = v2, r1[2 * k + 1] = v3;
    r2[2 * k] = v4, r2[2 * k + 1] = v5, r3[2 * k] = v6, r3[2 * k + 1] = v7;
  }
}

}  // namespace

template <typename T>
void haar_forward(const HaarArgs& a, int64_t begin, int64_t end) {
  using A = wide_t<T>;
  const int64_t pairs = half_of(a.z);
  const Rows<A> scratch(5, a.z + 1);
  const Writer<T> writer(8, pairs, 8 * a.batch * a.channels * half_of(a.x) * half_of(a.y) * pairs * int64_t(sizeof(T)));
  std::fill(scratch[4], scratch[4] + a.z + 1, A(0));
  for (int64_t unit = begin; unit < end; ++unit) {
    const Place p = place_of(a, unit);
    const A* rows[4];
    for (int r = 0; r < 4; ++r) {
      const int64_t i = 2 * p.i + r / 2, j = 2 * p.j + r % 2;
      rows[r] = scratch[4];  // zeros beyond an odd side
      if (i >= a.x || j >= a.y) continue;
      const T* in = static_cast<const T*>(a.in) + ((p.volume * a.x + i) * a.y + j) * a.z;
      prefetch_ahead(in, a.z, a.z);
      rows[r] = read_row(in, a.z, scratch[r]);
      if (a.z % 2) {
        if (rows[r] != scratch[r]) std::copy(rows[r], rows[r] + a.z, scratch[r]);
        scratch[r][a.z] = A(0);
        rows[r] = scratch[r];
      }
    }
    T* out = static_cast<T*>(a.out) + p.band;
    A* bands[8];
    for (int n = 0; n < 8; ++n) bands[n] = writer.place(out + n * p.apart, n);
    split_rows<A>(rows[0], rows[1], rows[2], rows[3], pairs, bands[0], bands[1], bands[2], bands[3], bands[4], bands[5],
                  bands[6], bands[7]);
    for (int n = 0; n < 8; ++n) writer.written(out + n * p.apart, pairs, n);
  }
}

template <typename T>
void haar_inverse(const HaarArgs& a, int64_t begin, int64_t end) {
  using A = wide_t<T>;
  const int64_t pairs = half_of(a.z);
  const Rows<A> scratch(12, a.z + 1);
  const Writer<T> writer(4, a.z, a.batch * a.channels * a.x * a.y * a.z * int64_t(sizeof(T)));
  for (int64_t unit = begin; unit < end; ++unit) {
    const Place p = place_of(a, unit);
    const T* in = static_cast<const T*>(a.in) + p.band;
    const A* bands[8];
    for (int n = 0; n < 8; ++n) {
      prefetch_ahead(in + n * p.apart, pairs, pairs);
      bands[n] = read_row(in + n * p.apart, pairs, scratch[4 + n]);
    }
    T* outs[4];
    A* rows[4];
    for (int r = 0; r < 4; ++r) {
      const int64_t i = 2 * p.i + r / 2, j = 2 * p.j + r % 2;
      const bool inside = i < a.x && j < a.y;
      outs[r] = inside ? static_cast<T*>(a.out) + ((p.volume * a.x + i) * a.y + j) * a.z : nullptr;
      // The last column of an odd side is cropped, so those rows are written beside and copied.
      rows[r] = inside && a.z % 2 == 0 ? writer.place(outs[r], r) : scratch[r];
    }
    join_rows<A>(bands[0], bands[1], bands[2], bands[3], bands[4], bands[5], bands[6], bands[7], pairs, rows[0], rows[1],
                 rows[2], rows[3]);
    for (int r = 0; r < 4; ++r) {
      if (!outs[r]) continue;
      if (a.z % 2) std::copy(rows[r], rows[r] + a.z, writer.place(outs[r], r));
      writer.written(outs[r], a.z, r);
    }
  }
}

#define PHM_INSTANTIATE(T)                                          \
  template void haar_forward<T>(const HaarArgs&, int64_t, int64_t); \
  template void haar_inverse<T>(const HaarArgs&, int64_t, int64_t);
PHM_INSTANTIATE(float)
PHM_INSTANTIATE(double)
PHM_INSTANTIATE(bfloat16)
PHM_INSTANTIATE(float16)

}  // namespace PHM_ISA
}  // namespace phmdiff
