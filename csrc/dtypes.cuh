// Between a stored dtype and the float that is computed with; narrowing rounds to nearest.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace losia {

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }

template <typename To, typename From> __device__ inline To convert(From v) { return To(v); }
template <> __device__ inline __nv_bfloat16 convert(float v) { return __float2bfloat16(v); }
template <> __device__ inline __half convert(float v) { return __float2half(v); }

}  // namespace losia
