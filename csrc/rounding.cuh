// Stochastic rounding of fp32 to bf16: what losia_pro/rounding.py computes, bit for bit.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace losia {

__device__ inline uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x21F0AAADu;
  x = (x ^ x >> 15) * 0xD35A2D97u;
  return x ^ x >> 15;
}

// 32 random bits for entry n.
__device__ inline uint32_t noise(uint32_t n, uint64_t key) {
  return mix(mix(n ^ uint32_t(key)) ^ uint32_t(key >> 32));
}

// Adds the low 16 of the random bits to what bf16 drops, and keeps the carry; infinities and NaN stay.
__device__ inline __nv_bfloat16 to_bf16(float value, uint32_t random) {
  if (!isfinite(value)) return __float2bfloat16(value);
  return __ushort_as_bfloat16(static_cast<unsigned short>((__float_as_uint(value) + (random & 0xFFFFu)) >> 16));
}

}  // namespace losia
