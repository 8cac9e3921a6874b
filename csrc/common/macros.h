// What lets one function be compiled for the host and for a GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PHM_HD __host__ __device__ __forceinline__
#else
#define PHM_HD inline __attribute__((always_inline))
#endif
