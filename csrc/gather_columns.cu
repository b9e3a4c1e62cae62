// Choose columns:  out[t, j] = x[t, in_idx[j]]
//
// Bytes, e an element: T n_in e written, 8 n_in of indices, and of x every 32-byte sector that holds a chosen
// column (88 % of them at e = 2 and one column in 8). No arithmetic.
//
// The shape: a block copies rows of tokens x units, a unit being an element or 16 bytes of a run. Neighbouring
// threads take neighbouring sorted indices, so they share sectors on the way in and write one contiguous line on
// the way out; a thread loads its index once and has TOKENS independent loads in flight. A row is shared out evenly
// among as few blocks of THREADS as hold it, in whole warps, so that few threads have nothing to do; where a block has
// room for several rows it takes more tokens. Values are moved as bits of their size: one instantiation serves bf16 and
// fp16. TOKENS may be any number, THREADS any multiple of 32 up to 1024.
#include <climits>

#include "losia.h"

namespace losia {
namespace {

constexpr int TOKENS = 4;
constexpr int THREADS = 256;

template <typename Bits>
__global__ void __launch_bounds__(THREADS)
    gather_columns_kernel(const char* __restrict__ x, const int64_t* __restrict__ in_idx, Bits* __restrict__ out,
                          int64_t tokens, int64_t units, int step, int64_t stride_t, int64_t stride_c,
                          int column_blocks) {
  const int64_t j = int64_t(blockIdx.x % column_blocks) * blockDim.x + threadIdx.x;
  const int64_t first = (int64_t(blockIdx.x / column_blocks) * blockDim.y + threadIdx.y) * TOKENS;
  if (j >= units) return;
  const char* source = x + in_idx[j * step] * stride_c;
  Bits value[TOKENS];
#pragma unroll
  for (int i = 0; i < TOKENS; ++i)
    if (first + i < tokens) value[i] = *reinterpret_cast<const Bits*>(source + (first + i) * stride_t);
#pragma unroll
  for (int i = 0; i < TOKENS; ++i)
    if (first + i < tokens) out[(first + i) * units + j] = value[i];
}

template <typename Bits>
cudaError_t launch(const void* x, const int64_t* in_idx, void* out, int64_t tokens, int64_t units, int step,
                   int64_t stride_t, int64_t stride_c, cudaStream_t stream) {
  const int64_t column_blocks = (units + THREADS - 1) / THREADS;
  const int64_t each = (units + column_blocks - 1) / column_blocks;
  const unsigned across = unsigned((each + 31) / 32 * 32);
  const dim3 block(across, THREADS / across);
  const int64_t a_block = int64_t(block.y) * TOKENS;
  const int64_t blocks = (tokens + a_block - 1) / a_block * column_blocks;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  gather_columns_kernel<Bits><<<unsigned(blocks), block, 0, stream>>>(
      static_cast<const char*>(x), in_idx, static_cast<Bits*>(out), tokens, units, step, stride_t, stride_c,
      int(column_blocks));
  return cudaGetLastError();
}

}  // namespace

cudaError_t gather_columns(const void* x, const int64_t* in_idx, void* out, int64_t tokens, int64_t n_in,
                           int64_t stride_t, int64_t stride_c, int unit, int step, cudaStream_t stream) {
  const int64_t units = n_in / step;
  if (tokens == 0 || units == 0) return cudaSuccess;
  switch (unit) {
    case 2: return launch<uint16_t>(x, in_idx, out, tokens, units, step, stride_t, stride_c, stream);
    case 4: return launch<uint32_t>(x, in_idx, out, tokens, units, step, stride_t, stride_c, stream);
    case 8: return launch<uint64_t>(x, in_idx, out, tokens, units, step, stride_t, stride_c, stream);
    case 16: return launch<uint4>(x, in_idx, out, tokens, units, step, stride_t, stride_c, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace losia
