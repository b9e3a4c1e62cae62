// What csrc/rounding.cuh and csrc/lerp.cu take from CUDA, for a CPU; compiled without contraction.
#pragma once

#include <cmath>

#include "dtypes.cuh"

using std::isfinite;

inline __nv_bfloat16 __float2bfloat16(float v) { return losia::convert<__nv_bfloat16>(v); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
