// PHMDiff Eq. 6, one element: sqrt(abar) y + sqrt(1 - abar) eps + (1 - sqrt(abar)) up, in this order.
#pragma once

#include "pyramid.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace phmdiff {

template <typename A>
struct Factors {
  A y, eps, coarse;
};

PHM_HD float root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

PHM_HD double root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

// The factors of a sample: Eq. 6 from abar (B,), or 1, 1 and weight[b] or one for all.
template <typename A>
struct FactorsOf {
  const A *abar, *weight;
  A coarse;
};

template <typename A>
PHM_HD Factors<A> factors_of(const FactorsOf<A>& from, int64_t b) {
  if (!from.abar) return {A(1), A(1), from.weight ? from.weight[b] : from.coarse};
  const A signal = root(from.abar[b]);
  return {signal, root(A(1) - from.abar[b]), A(1) - signal};
}

template <bool Y, bool EPS, bool COARSE, typename A>
PHM_HD A merged(A y, A eps, A up, const Factors<A>& f) {
  A out = A(0);
  if (Y) out = f.y * y;
  if (EPS) out = Y ? out + f.eps * eps : f.eps * eps;
  if (COARSE) out = Y || EPS ? out + f.coarse * up : f.coarse * up;
  return out;
}

}  // namespace phmdiff
