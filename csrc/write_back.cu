// Write compact subnets into dense weights, many layers in one launch:  W[out_idx[i], in_idx[j]] = subnet[i, j]
//
// Bytes, for a subnet of n fp32 entries and a weight of e bytes: 4 n read and n e written; the writes are scattered,
// so memory moves every 32-byte sector that holds an entry, once in and once out. No arithmetic, but for about 25 integer
// operations an entry where it is rounded stochastically.
//
// The shape: a block writes one part of a layer's subnet, PART entries in rows that are as wide as the subnets need, so
// that narrow subnets leave no threads idle; tables say which. Neighbouring threads take neighbouring columns. PART, in
// losia.h, may be any power of two of at least THREADS, THREADS any power of two up to 1024.
//
// It is a launch of its own, not AdamW's last lines: decay, rewarming, and importance, which reads the weights as the
// forward had them, come between the two. Together they would spare the 4 n bytes of reading the subnet again, of the
// 28 n that AdamW moves in fp32, and work with no other optimizer.
#include <climits>

#include "dtypes.cuh"
#include "losia.h"
#include "rounding.cuh"

namespace losia {
namespace {

constexpr int THREADS = 256;
static_assert(PART % THREADS == 0, "every thread takes as many entries");

template <bool STOCHASTIC, typename Weight, typename Subnet>
__global__ void __launch_bounds__(THREADS)
    write_back_kernel(const int64_t* __restrict__ layers, const int32_t* __restrict__ parts, int log2_columns,
                      uint64_t key) {
  const int64_t* layer = layers + int64_t(parts[2 * blockIdx.x]) * 9;
  const int64_t part = parts[2 * blockIdx.x + 1];
  Weight* weight = reinterpret_cast<Weight*>(layer[0]);
  const Subnet* subnet = reinterpret_cast<const Subnet*>(layer[1]);
  const int64_t* out_idx = reinterpret_cast<const int64_t*>(layer[2]);
  const int64_t* in_idx = reinterpret_cast<const int64_t*>(layer[3]);
  const int64_t n_out = layer[4], n_in = layer[5], stride_r = layer[6], stride_c = layer[7];
  const int columns = 1 << log2_columns;
  const int64_t across = (n_in + columns - 1) >> log2_columns;
  const int64_t i0 = part / across * (PART >> log2_columns), j0 = part % across << log2_columns;
#pragma unroll
  for (int k = threadIdx.x; k < PART; k += THREADS) {
    const int64_t i = i0 + (k >> log2_columns), j = j0 + (k & (columns - 1));
    if (i < n_out && j < n_in) {
      Weight* to = weight + out_idx[i] * stride_r + in_idx[j] * stride_c;
      const Subnet value = subnet[i * n_in + j];
      if constexpr (STOCHASTIC)
        *to = to_bf16(value, noise(uint32_t(layer[8] + i * n_in + j), key));
      else
        *to = convert<Weight>(value);
    }
  }
}

template <typename Weight, typename Subnet, bool STOCHASTIC = false>
cudaError_t launch(const int64_t* layers, const int32_t* parts, int64_t n_parts, int log2_columns,
                   cudaStream_t stream, uint64_t key = 0) {
  if (n_parts > INT_MAX) return cudaErrorInvalidConfiguration;
  write_back_kernel<STOCHASTIC, Weight, Subnet>
      <<<unsigned(n_parts), THREADS, 0, stream>>>(layers, parts, log2_columns, key);
  return cudaGetLastError();
}

}  // namespace

cudaError_t write_back(const int64_t* layers, const int32_t* parts, int64_t n_parts, int log2_columns, Dtype weight,
                       Dtype subnet, uint64_t key, cudaStream_t stream) {
  if (n_parts == 0) return cudaSuccess;
  if (log2_columns < 0 || (1 << log2_columns) > PART) return cudaErrorInvalidValue;
  if (weight == Dtype::fp64 && subnet == Dtype::fp64)
    return launch<double, double>(layers, parts, n_parts, log2_columns, stream);
  if (weight == Dtype::bf16 && subnet == Dtype::bf16)
    return launch<__nv_bfloat16, __nv_bfloat16>(layers, parts, n_parts, log2_columns, stream);
  if (subnet != Dtype::fp32) return cudaErrorInvalidValue;
  switch (weight) {
    case Dtype::fp32: return launch<float, float>(layers, parts, n_parts, log2_columns, stream);
    case Dtype::bf16:
      if (key != 0)
        return launch<__nv_bfloat16, float, true>(layers, parts, n_parts, log2_columns, stream, key);
      return launch<__nv_bfloat16, float>(layers, parts, n_parts, log2_columns, stream);
    case Dtype::fp16: return launch<__half, float>(layers, parts, n_parts, log2_columns, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace losia
