// Write compact subnets into dense weights, many layers in one launch:  W[out_idx[i], in_idx[j]] = subnet[i, j]
//
// Bytes, for a subnet of n fp32 entries and a weight of e bytes: 4 n read and n e written; the writes are scattered,
// so memory moves every 32-byte sector that holds an entry, once in and once out. No arithmetic.
//
// The shape: a block writes one part, PART_ROWS x PART_COLUMNS of a layer's subnet; tables say which. Neighbouring
// threads take neighbouring columns, whose indices they load once for all rows of the part.
#include <climits>

#include "dtypes.cuh"
#include "losia.h"

namespace losia {
namespace {

constexpr int THREADS = 256;
static_assert(PART_COLUMNS % THREADS == 0, "a thread takes the same columns in every row");

template <typename Weight, typename Subnet>
__global__ void __launch_bounds__(THREADS)
    write_back_kernel(const int64_t* __restrict__ layers, const int32_t* __restrict__ parts) {
  const int64_t* layer = layers + int64_t(parts[2 * blockIdx.x]) * 8;
  const int part = parts[2 * blockIdx.x + 1];
  Weight* weight = reinterpret_cast<Weight*>(layer[0]);
  const Subnet* subnet = reinterpret_cast<const Subnet*>(layer[1]);
  const int64_t* out_idx = reinterpret_cast<const int64_t*>(layer[2]);
  const int64_t* in_idx = reinterpret_cast<const int64_t*>(layer[3]);
  const int64_t n_out = layer[4], n_in = layer[5], stride_r = layer[6], stride_c = layer[7];
  const int64_t across = (n_in + PART_COLUMNS - 1) / PART_COLUMNS;
  const int64_t first = part / across * PART_ROWS;
  const int64_t j0 = part % across * PART_COLUMNS + threadIdx.x;
#pragma unroll
  for (int k = 0; k < PART_COLUMNS; k += THREADS) {
    const int64_t j = j0 + k;
    if (j >= n_in) return;
    Weight* column = weight + in_idx[j] * stride_c;
#pragma unroll
    for (int r = 0; r < PART_ROWS; ++r)
      if (first + r < n_out)
        column[out_idx[first + r] * stride_r] = convert<Weight>(subnet[(first + r) * n_in + j]);
  }
}

template <typename Weight, typename Subnet>
cudaError_t launch(const int64_t* layers, const int32_t* parts, int64_t n_parts, cudaStream_t stream) {
  if (n_parts > INT_MAX) return cudaErrorInvalidConfiguration;
  write_back_kernel<Weight, Subnet><<<unsigned(n_parts), THREADS, 0, stream>>>(layers, parts);
  return cudaGetLastError();
}

}  // namespace

cudaError_t write_back(const int64_t* layers, const int32_t* parts, int64_t n_parts, Dtype weight, Dtype subnet,
                       cudaStream_t stream) {
  if (n_parts == 0) return cudaSuccess;
  if (weight == Dtype::fp64 && subnet == Dtype::fp64) return launch<double, double>(layers, parts, n_parts, stream);
  if (subnet != Dtype::fp32) return cudaErrorInvalidValue;
  switch (weight) {
    case Dtype::fp32: return launch<float, float>(layers, parts, n_parts, stream);
    case Dtype::bf16: return launch<__nv_bfloat16, float>(layers, parts, n_parts, stream);
    case Dtype::fp16: return launch<__half, float>(layers, parts, n_parts, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace losia
