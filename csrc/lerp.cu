// Tensors some way towards others, many in one launch, bf16 ones rounded stochastically and fp32 ones to nearest:
//
//   t = t + weight (other - t)                  for |weight| < 1/2
//   t = other + (weight - 1) (other - t)        from there on, so that both ends are exact
//
// Bytes: 6 an entry of bf16 tensors, 10 of fp32 ones with others in bf16: two tensors read and one written. In bf16 about
// 30 operations an entry, most of them the random bits; in fp32 a few. Sums and products are rounded one by one, so that
// this and Triton's give the same bits, and in bf16 PyTorch's too.
//
// The shape: a block takes LERP_PART neighbouring entries of one tensor, a thread EIGHT of them, moved 16 bytes at a
// time: those of bf16 and fp16 at once, those of fp32 in two. A pair that does not begin at multiples of 16 bytes, and
// the last entries, go one by one. LERP_PART, in losia.h, may be EIGHT times any whole number of warps, up to 1024
// threads.
#include <climits>
#include <type_traits>

#include "dtypes.cuh"
#include "eight.cuh"
#include "losia.h"
#include "rounding.cuh"

namespace losia {
namespace {

constexpr int THREADS = LERP_PART / EIGHT;
static_assert(LERP_PART % (EIGHT * 32) == 0 && THREADS <= 1024, "every thread takes as many");

struct Lerp {
  float factor;  // weight, or weight - 1
  bool small;

  __device__ explicit Lerp(float weight) : small(fabsf(weight) < 0.5f) {
    factor = small ? weight : __fsub_rn(weight, 1.0f);
  }

  __device__ float operator()(float near, float far) const {
    return __fadd_rn(small ? near : far, __fmul_rn(__fsub_rn(far, near), factor));
  }
};

template <typename T, typename Other>
__global__ void __launch_bounds__(THREADS)
    lerp_kernel(const int64_t* __restrict__ tensors, const float* __restrict__ weight,
                const int32_t* __restrict__ parts) {
  const int64_t* tensor = tensors + int64_t(parts[2 * blockIdx.x]) * 5;
  T* t = reinterpret_cast<T*>(tensor[0]);
  const Other* other = reinterpret_cast<const Other*>(tensor[1]);
  const int64_t numel = tensor[2], before = tensor[3];
  const uint64_t key = tensor[4];
  const Lerp lerp(*weight);
  const auto value = [&](T mine, Other theirs, int64_t n) {
    const float wide = lerp(widen(mine), widen(theirs));
    if constexpr (std::is_same_v<T, float>)
      return wide;
    else
      return to_bf16(wide, noise(uint32_t(before + n), key));
  };
  const int64_t n = int64_t(parts[2 * blockIdx.x + 1]) * LERP_PART + EIGHT * threadIdx.x;
  if (((tensor[0] | tensor[1]) & 15) == 0 && n + EIGHT <= numel) {
    Eight<T> mine(t + n);
    const Eight<Other> theirs(other + n);
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) mine.of[i] = value(mine.of[i], theirs.of[i], n + i);
    mine.store(t + n);
  } else {
    for (int64_t i = n; i < n + EIGHT && i < numel; ++i) t[i] = value(t[i], other[i], i);
  }
}

template <typename T, typename Other>
cudaError_t launch(const int64_t* tensors, const float* weight, const int32_t* parts, int64_t n_parts,
                   cudaStream_t stream) {
  lerp_kernel<T, Other><<<unsigned(n_parts), THREADS, 0, stream>>>(tensors, weight, parts);
  return cudaGetLastError();
}

}  // namespace

cudaError_t lerp(const int64_t* tensors, const float* weight, const int32_t* parts, int64_t n_parts, Dtype t,
                 Dtype other, cudaStream_t stream) {
  if (n_parts == 0) return cudaSuccess;
  if (n_parts > INT_MAX) return cudaErrorInvalidConfiguration;
  if (t == Dtype::bf16 && other == Dtype::bf16)
    return launch<__nv_bfloat16, __nv_bfloat16>(tensors, weight, parts, n_parts, stream);
  if (t != Dtype::fp32) return cudaErrorInvalidValue;
  switch (other) {
    case Dtype::fp32: return launch<float, float>(tensors, weight, parts, n_parts, stream);
    case Dtype::bf16: return launch<float, __nv_bfloat16>(tensors, weight, parts, n_parts, stream);
    case Dtype::fp16: return launch<float, __half>(tensors, weight, parts, n_parts, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace losia
