// Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller normals, as kernels/_philox.py defines them.
//
// The logarithm, sine and cosine are written out: no library's is used, so host and GPU give the same bits,
// and loops over them become vector instructions. Each is within 2 units in the last place on its range.
#pragma once

#include "merge.h"
#include "types.h"

namespace phmdiff {

struct Words {
  uint32_t w0, w1, w2, w3;
};

// One stream of one sample at one step: all of a counter and key but the index.
struct Stream {
  uint32_t sample_low, sample_high, step, key_low, key_high;
};

PHM_HD Stream stream_of(int64_t sample, int64_t stream, int64_t seed, int64_t step) {
  return {uint32_t(sample), uint32_t(uint64_t(sample) >> 32) ^ (uint32_t(stream) << 24), uint32_t(step), uint32_t(seed),
          uint32_t(uint64_t(seed) >> 32)};
}

PHM_HD Words philox(uint32_t index, const Stream& s) {
  uint32_t c0 = index, c1 = s.sample_low, c2 = s.sample_high, c3 = s.step, k0 = s.key_low, k1 = s.key_high;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// In (0, 1]: 24 bits and a half; the largest rounds up to 1.
PHM_HD float unit(uint32_t word) { return (float(int32_t(word >> 8)) + 0.5f) * 5.9604644775390625e-8f; }

// ln u of a normal u in (0, 1]: exponent and the series of ln((1 + s)/(1 - s)), s = (m - 1)/(m + 1), m near 1.
PHM_HD float log_unit(float u) {
  const uint32_t bits = float_bits(u), shifted = bits - 0x3f3504f3u;  // sqrt(1/2)
  const int32_t exponent = int32_t(shifted) >> 23;
  const float m = bits_float((shifted & 0x007fffffu) + 0x3f3504f3u);  // in [sqrt(1/2), sqrt(2))
  const float f = m - 1.0f, s = f / (2.0f + f), z = s * s, e = float(exponent);
  const float series = z * (0.66666662693f + z * (0.40000972152f + z * (0.28498786688f + z * 0.24279078841f)));
  const float half = 0.5f * f * f;
  return e * 0.693138122559f - ((half - (s * (half + series) + e * 9.05800061445e-6f)) - f);
}

struct Pair {
  float cos, sin;
};

// cos and sin of an angle in [0, 2 pi]: reduced to [-pi/4, pi/4] by a three-part pi/2, then two polynomials.
PHM_HD Pair cos_sin(float angle) {
  const int32_t n = int32_t(angle * 0.63661977236758134f + 0.5f);  // 0 .. 4
  const float q = float(n);
  const float r = ((angle - q * 1.5703125f) - q * 4.837512969970703125e-4f) - q * 7.549789948768648e-8f;
  const float z = r * r;
  const float sine = r + r * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const float cosine =
      1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const float c = n & 1 ? sine : cosine, s = n & 1 ? cosine : sine;
  return {(n + 1) & 2 ? -c : c, n & 2 ? -s : s};
}

// Two standard normals from two words.
PHM_HD Pair normal_pair(uint32_t first, uint32_t second) {
  const float radius = root(-2.0f * log_unit(unit(first)));
  const Pair p = cos_sin(6.28318530717958648f * unit(second));
  return {radius * p.cos, radius * p.sin};
}

}  // namespace phmdiff
