// A profiled layer's step, for some rows whose product dy^T x the library has computed:
//
//   g = scale (product + grad),  I = importance of (g, W),
//   importance = beta1 importance + (1 - beta1) I,  uncertainty = beta2 uncertainty + (1 - beta2) |I - importance|
//
// Bytes an entry: 4 of the product, 4 of grad if there is one, e of W, and 4 k of importance and uncertainty, read
// and written with k bytes each. A dozen flops an entry, so the bytes decide. The host hands over so few rows at a
// time that the product is still in L2 when it is read here.
//
// The shape: a thread takes one entry at a time and strides over the grid, so neighbouring threads share lines of
// every operand. THREADS and BLOCKS may be any powers of two up to 1024 threads.
#include "dtypes.cuh"
#include "losia.h"

namespace losia {
namespace {

constexpr int THREADS = 256;
constexpr int BLOCKS = 2048;  // at most

template <typename Weight, typename Kept>
__global__ void __launch_bounds__(THREADS) importance_update_kernel(ImportanceUpdate u) {
  Kept* importance = static_cast<Kept*>(u.importance);
  Kept* uncertainty = static_cast<Kept*>(u.uncertainty);
  const Weight* weight = static_cast<const Weight*>(u.weight);
  const int64_t numel = u.rows * u.columns;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < numel; i += int64_t(gridDim.x) * THREADS) {
    const int64_t row = i / u.columns, column = i % u.columns;
    float g = u.product[i];
    if (u.grad) g += u.grad[i];
    const float gw = g * u.scale * widen(weight[row * u.weight_stride_r + column * u.weight_stride_c]);
    const float now = u.variant == 0 ? fabsf(gw - 0.5f * gw * gw) : u.variant == 1 ? fabsf(gw) : gw * gw;
    const float smoothed = u.beta1 * widen(importance[i]) + u.rest1 * now;
    importance[i] = convert<Kept>(smoothed);
    uncertainty[i] = convert<Kept>(u.beta2 * widen(uncertainty[i]) + u.rest2 * fabsf(now - smoothed));
  }
}

template <typename Weight>
cudaError_t launch(const ImportanceUpdate& u, cudaStream_t stream) {
  const int64_t needed = (u.rows * u.columns + THREADS - 1) / THREADS;
  const unsigned blocks = unsigned(needed < BLOCKS ? needed : BLOCKS);
  switch (u.kept_dtype) {
    case Dtype::fp32: importance_update_kernel<Weight, float><<<blocks, THREADS, 0, stream>>>(u); break;
    case Dtype::bf16: importance_update_kernel<Weight, __nv_bfloat16><<<blocks, THREADS, 0, stream>>>(u); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t importance_update(const ImportanceUpdate& u, cudaStream_t stream) {
  if (u.rows == 0 || u.columns == 0) return cudaSuccess;
  switch (u.weight_dtype) {
    case Dtype::fp32: return launch<float>(u, stream);
    case Dtype::bf16: return launch<__nv_bfloat16>(u, stream);
    case Dtype::fp16: return launch<__half>(u, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace losia
