// Bf16 tensors some way towards others, many in one launch, rounded stochastically to bf16:
//
//   t = t + weight (other - t)                  for |weight| < 1/2
//   t = other + (weight - 1) (other - t)        from there on, so that both ends are exact
//
// Bytes: 6 an entry, two tensors read and one written. About 30 operations an entry, most of them the random bits. Sums
// and products are rounded one by one, as PyTorch's are, so that all implementations give the same bits.
//
// The shape: a block takes LERP_PART neighbouring entries of one tensor, a thread EIGHT of them, which are 16 bytes: a
// load of each tensor and a store. A pair that does not begin at multiples of 16 bytes, and the last entries, go one by
// one. LERP_PART may be EIGHT times any whole number of warps, up to 1024 threads.
#include <climits>

#include "dtypes.cuh"
#include "losia.h"
#include "rounding.cuh"

namespace losia {
namespace {

constexpr int EIGHT = 8;
constexpr int THREADS = LERP_PART / EIGHT;
static_assert(LERP_PART % (EIGHT * 32) == 0 && THREADS <= 1024, "every thread takes as many");

struct Lerp {
  float factor;  // weight, or weight - 1
  bool small;

  __device__ explicit Lerp(float weight) : small(fabsf(weight) < 0.5f) {
    factor = small ? weight : __fsub_rn(weight, 1.0f);
  }

  __device__ __nv_bfloat16 operator()(__nv_bfloat16 t, __nv_bfloat16 other, uint32_t random) const {
    const float near = widen(t), far = widen(other);
    return to_bf16(__fadd_rn(small ? near : far, __fmul_rn(__fsub_rn(far, near), factor)), random);
  }
};

__global__ void __launch_bounds__(THREADS)
    lerp_kernel(const int64_t* __restrict__ tensors, const float* __restrict__ weight,
                const int32_t* __restrict__ parts) {
  const int64_t* tensor = tensors + int64_t(parts[2 * blockIdx.x]) * 5;
  __nv_bfloat16* t = reinterpret_cast<__nv_bfloat16*>(tensor[0]);
  const __nv_bfloat16* other = reinterpret_cast<const __nv_bfloat16*>(tensor[1]);
  const int64_t numel = tensor[2], before = tensor[3];
  const uint64_t key = tensor[4];
  const Lerp lerp(*weight);
  const int64_t n = int64_t(parts[2 * blockIdx.x + 1]) * LERP_PART + EIGHT * threadIdx.x;
  if (((tensor[0] | tensor[1]) & 15) == 0 && n + EIGHT <= numel) {
    uint4 mine = *reinterpret_cast<const uint4*>(t + n);
    const uint4 theirs = *reinterpret_cast<const uint4*>(other + n);
    __nv_bfloat16* const a = reinterpret_cast<__nv_bfloat16*>(&mine);
    const __nv_bfloat16* const b = reinterpret_cast<const __nv_bfloat16*>(&theirs);
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) a[i] = lerp(a[i], b[i], noise(uint32_t(before + n + i), key));
    *reinterpret_cast<uint4*>(t + n) = mine;
  } else {
    for (int64_t i = n; i < n + EIGHT && i < numel; ++i) t[i] = lerp(t[i], other[i], noise(uint32_t(before + i), key));
  }
}

}  // namespace

cudaError_t lerp(const int64_t* tensors, const float* weight, const int32_t* parts, int64_t n_parts,
                 cudaStream_t stream) {
  if (n_parts == 0) return cudaSuccess;
  if (n_parts > INT_MAX) return cudaErrorInvalidConfiguration;
  lerp_kernel<<<unsigned(n_parts), THREADS, 0, stream>>>(tensors, weight, parts);
  return cudaGetLastError();
}

}  // namespace losia
