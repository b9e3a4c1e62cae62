// A profiled layer's step, for some rows whose product dy^T x the library has computed:
//
//   g = scale (product + grad),  I = importance of (g, W),
//   importance = beta1 importance + (1 - beta1) I,  uncertainty = beta2 uncertainty + (1 - beta2) |I - importance|
//
// Bytes an entry: 4 of the product, 4 of grad if there is one, e of W, and 4 k of importance and uncertainty, read
// and written with k bytes each. A dozen flops an entry, so the bytes decide. The host hands over so few rows at a
// time that the product is still in L2 when it is read here.
//
// The shape: a thread takes EIGHT neighbouring entries of a row, 16 bytes or 32 of each operand, and loads all of them
// before it computes. All but the product, whose place in L2 the next one takes, are marked as first to leave. Where
// rows do not consist of whole eights that begin at multiples of 16 bytes, a thread takes one entry at a time and
// strides over the grid. THREADS and BLOCKS may be any powers of two up to 1024 threads.
#include <climits>

#include "dtypes.cuh"
#include "eight.cuh"
#include "losia.h"

namespace losia {
namespace {

constexpr int THREADS = 256;
constexpr int BLOCKS = 2048;  // at most, of single entries

template <typename Weight, typename Kept>
__device__ inline void step(const ImportanceUpdate& u, float g, Weight weight, Kept& importance, Kept& uncertainty) {
  const float gw = g * u.scale * widen(weight);
  const float now = u.variant == 0 ? fabsf(gw - 0.5f * gw * gw) : u.variant == 1 ? fabsf(gw) : gw * gw;
  const float smoothed = u.beta1 * widen(importance) + u.rest1 * now;
  importance = convert<Kept>(smoothed);
  uncertainty = convert<Kept>(u.beta2 * widen(uncertainty) + u.rest2 * fabsf(now - smoothed));
}

template <typename Weight, typename Kept>
__global__ void __launch_bounds__(THREADS) update_eights_kernel(ImportanceUpdate u, unsigned eights, unsigned a_row) {
  const unsigned i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= eights) return;
  const unsigned row = i / a_row, column = i % a_row;
  const int64_t n = int64_t(i) * EIGHT;
  Kept* const kept_importance = static_cast<Kept*>(u.importance) + n;
  Kept* const kept_uncertainty = static_cast<Kept*>(u.uncertainty) + n;
  const Eight<float> product(u.product + n);
  const Eight<Weight> weight(static_cast<const Weight*>(u.weight) + row * u.weight_stride_r + column * EIGHT, true);
  Eight<Kept> importance(kept_importance, true), uncertainty(kept_uncertainty, true);
  float g[EIGHT];
#pragma unroll
  for (int k = 0; k < EIGHT; ++k) g[k] = product.of[k];
  if (u.grad) {
    const Eight<float> grad(u.grad + n, true);
#pragma unroll
    for (int k = 0; k < EIGHT; ++k) g[k] += grad.of[k];
  }
#pragma unroll
  for (int k = 0; k < EIGHT; ++k) step(u, g[k], weight.of[k], importance.of[k], uncertainty.of[k]);
  importance.store(kept_importance, true);
  uncertainty.store(kept_uncertainty, true);
}

template <typename Weight, typename Kept>
__global__ void __launch_bounds__(THREADS) update_entries_kernel(ImportanceUpdate u) {
  Kept* importance = static_cast<Kept*>(u.importance);
  Kept* uncertainty = static_cast<Kept*>(u.uncertainty);
  const Weight* weight = static_cast<const Weight*>(u.weight);
  const int64_t numel = u.rows * u.columns;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < numel; i += int64_t(gridDim.x) * THREADS) {
    const int64_t row = i / u.columns, column = i % u.columns;
    float g = u.product[i];
    if (u.grad) g += u.grad[i];
    step(u, g, weight[row * u.weight_stride_r + column * u.weight_stride_c], importance[i], uncertainty[i]);
  }
}

template <typename Weight, typename Kept> cudaError_t launch(const ImportanceUpdate& u, cudaStream_t stream) {
  const int64_t numel = u.rows * u.columns, eights = numel / EIGHT;
  const uintptr_t addresses = uintptr_t(u.importance) | uintptr_t(u.uncertainty) | uintptr_t(u.weight) |
                              uintptr_t(u.product) | uintptr_t(u.grad);
  const bool rows_of_eights = u.columns % EIGHT == 0 && u.weight_stride_c == 1 && u.weight_stride_r % EIGHT == 0;
  if (rows_of_eights && addresses % 16 == 0 && eights <= INT_MAX) {
    const unsigned blocks = unsigned((eights + THREADS - 1) / THREADS), a_row = unsigned(u.columns / EIGHT);
    update_eights_kernel<Weight, Kept><<<blocks, THREADS, 0, stream>>>(u, unsigned(eights), a_row);
  } else {
    const int64_t needed = (numel + THREADS - 1) / THREADS;
    update_entries_kernel<Weight, Kept><<<unsigned(needed < BLOCKS ? needed : BLOCKS), THREADS, 0, stream>>>(u);
  }
  return cudaGetLastError();
}

template <typename Weight>
cudaError_t launch(const ImportanceUpdate& u, cudaStream_t stream) {
  switch (u.kept_dtype) {
    case Dtype::fp32: return launch<Weight, float>(u, stream);
    case Dtype::bf16: return launch<Weight, __nv_bfloat16>(u, stream);
    default: return cudaErrorInvalidValue;
  }
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
