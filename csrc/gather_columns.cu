// Choose columns:  out[t, j] = x[t, in_idx[j]]
//
// Bytes, e an element: T n_in e written, 8 n_in of indices, and of x every 32-byte sector that holds a chosen
// column (88 % of them at e = 2 and one column in 8). No arithmetic.
//
// The shape: a block copies TOKENS rows x THREADS columns. Neighbouring threads take neighbouring sorted
// indices, so they share sectors on the way in and write one contiguous line on the way out; a thread loads
// its index once and has TOKENS independent loads in flight. Values are moved as bits of their size: one
// instantiation serves bf16 and fp16. TOKENS and THREADS may be any powers of two up to 1024 threads.
#include <climits>

#include "losia.h"

namespace losia {
namespace {

constexpr int TOKENS = 4;
constexpr int THREADS = 256;

template <typename Bits>
__global__ void __launch_bounds__(THREADS)
    gather_columns_kernel(const Bits* __restrict__ x, const int64_t* __restrict__ in_idx,
                          Bits* __restrict__ out, int64_t tokens, int64_t n_in, int64_t stride_t,
                          int64_t stride_c, int column_blocks) {
  const int64_t j = int64_t(blockIdx.x % column_blocks) * THREADS + threadIdx.x;
  const int64_t first = int64_t(blockIdx.x / column_blocks) * TOKENS;
  if (j >= n_in) return;
  const Bits* source = x + in_idx[j] * stride_c;
  Bits value[TOKENS];
#pragma unroll
  for (int i = 0; i < TOKENS; ++i)
    if (first + i < tokens) value[i] = source[(first + i) * stride_t];
#pragma unroll
  for (int i = 0; i < TOKENS; ++i)
    if (first + i < tokens) out[(first + i) * n_in + j] = value[i];
}

template <typename Bits>
cudaError_t launch(const void* x, const int64_t* in_idx, void* out, int64_t tokens, int64_t n_in,
                   int64_t stride_t, int64_t stride_c, cudaStream_t stream) {
  const int64_t column_blocks = (n_in + THREADS - 1) / THREADS;
  const int64_t blocks = (tokens + TOKENS - 1) / TOKENS * column_blocks;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  gather_columns_kernel<Bits><<<unsigned(blocks), THREADS, 0, stream>>>(
      static_cast<const Bits*>(x), in_idx, static_cast<Bits*>(out), tokens, n_in, stride_t, stride_c,
      int(column_blocks));
  return cudaGetLastError();
}

}  // namespace

cudaError_t gather_columns(const void* x, const int64_t* in_idx, void* out, int64_t tokens, int64_t n_in,
                           int64_t stride_t, int64_t stride_c, int itemsize, cudaStream_t stream) {
  if (tokens == 0 || n_in == 0) return cudaSuccess;
  switch (itemsize) {
    case 2: return launch<uint16_t>(x, in_idx, out, tokens, n_in, stride_t, stride_c, stream);
    case 4: return launch<uint32_t>(x, in_idx, out, tokens, n_in, stride_t, stride_c, stream);
    case 8: return launch<uint64_t>(x, in_idx, out, tokens, n_in, stride_t, stride_c, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace losia
