// The subnet's gradient, of columns in aligned runs:  out[m, n] = sum_t dy[t, out_idx[m]] x_sub[t, n]
//
// Flops: 2 T n_out n_in. Bytes: 2 T (n_out + n_in) at least, in runs of 16; runs of 8 are half of the 32-byte sectors
// that they lie in. From L2, a tile's operands: T n_out n_in (1/64 + 1/64), 182 MB for 1376 x 512 and T = 8192.
//
// The shape: a block makes a tile of GRAD_TILE x GRAD_TILE over some of the tokens, GRAD_STEP a step. Both operands
// lie token-major, so what is gathered are whole units of 16 bytes, copied asynchronously STAGES - 1 steps ahead; a
// thread copies one unit of each row, so it reads one index in all. The matrix units take both transposed.
// A warp's part is 64 x 64: with half of it, shared memory would be read 1.5 times as often, and would decide. That
// leaves four warps to a tile, so a block has four more, which take the other half of every step's tokens; the two
// sums are added in shared memory at the end. With 128 registers a thread for sums, a processor holds one block, and
// 96 KiB of stages fit the 99 KiB of sm_86, sm_89 and sm_120. With no other block to fill the gaps, fragments are
// loaded one part ahead, over the barrier between two steps.
// The tokens are split over gridDim.y to fill the device. Each split writes its sum in fp32, and a second kernel adds
// them in order: no atomics, the same bits every run. One split writes the result itself.
// Tokens past T and columns past n_out or n_in are zeros in shared memory and never read.
#include <climits>

#include "dtypes.cuh"
#include "losia.h"
#include "mma.cuh"
#include "subnet_grad_layout.cuh"

namespace losia {
namespace {

constexpr int STAGES = 3;
constexpr int PARTS = GRAD_STEP / SLICES / 16;  // of a step, for a warp
static_assert(PARTS % 2 == 0, "the fragments of a step's first part are in buffer 0");
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
static_assert(SHARED_BYTES >= SLICE_THREADS * FRAGMENTS_M * FRAGMENTS_N * 16, "a slice's sums fit");
static_assert(SHARED_BYTES <= 99 * 1024, "on every device");

template <typename Out> struct alignas(2 * sizeof(Out)) Pair { Out left, right; };
template <typename Out> struct alignas(4 * sizeof(Out)) Four { Out a, b, c, d; };

template <typename In, typename Out>
__global__ void __launch_bounds__(THREADS, 1)
    subnet_grad_kernel(const char* __restrict__ dy, const char* __restrict__ x_sub,
                       const int64_t* __restrict__ out_idx, Out* __restrict__ out, int64_t tokens, int n_out, int n_in,
                       int64_t split_tokens, int64_t stride_dt, int64_t stride_xt) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();
#else
  extern __shared__ __align__(128) char shared[];
  const int thread = threadIdx.x, lane = thread % 32;
  const int blocks_n = (n_in + GRAD_TILE - 1) / GRAD_TILE;
  const int m0 = int(blockIdx.x) / blocks_n * GRAD_TILE, n0 = int(blockIdx.x) % blocks_n * GRAD_TILE;
  const int64_t first = blockIdx.y * split_tokens;
  const int64_t rest = tokens - first < split_tokens ? tokens - first : split_tokens;
  const int steps = int((rest + GRAD_STEP - 1) / GRAD_STEP);

  const int unit = copied_unit(thread), row = copied_row(thread, 0);
  const int m = m0 + unit * UNIT, n = n0 + unit * UNIT;
  const char* const a_from = dy + (first + row) * stride_dt + (m < n_out ? out_idx[m] * 2 : 0);
  const char* const b_from = x_sub + (first + row) * stride_xt + int64_t(n) * 2;
  const uint32_t stages = shared_address(shared);
  const auto copy = [&](int step) {
    const uint32_t to = stages + step % STAGES * STAGE_BYTES;
    const int64_t t = int64_t(step) * GRAD_STEP;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      const bool past = t + copied_row(thread, i) >= rest;
      const int at = place(copied_row(thread, i), unit);
      copy_async(to + at, a_from + (t + i * COPY_ROWS) * stride_dt, past || m >= n_out);
      copy_async(to + TILE_BYTES + at, b_from + (t + i * COPY_ROWS) * stride_xt, past || n >= n_in);
    }
  };

  uint32_t fa[2][FRAGMENTS_M][4], fb[2][FRAGMENTS_N / 2][4];
  const auto load = [&](int buffer, int step, int part) {
    const uint32_t from = stages + step % STAGES * STAGE_BYTES;
    const int k = (slice_of(thread) * PARTS + part) * 16;
#pragma unroll
    for (int f = 0; f < FRAGMENTS_M; ++f)
      load_transposed(fa[buffer][f], from + row_of_a(lane, k, warp_m(thread) + f * 16));
#pragma unroll
    for (int f = 0; f < FRAGMENTS_N / 2; ++f)
      load_transposed(fb[buffer][f], from + TILE_BYTES + row_of_b(lane, k, warp_n(thread) + f * 16));
  };

  float acc[FRAGMENTS_M][FRAGMENTS_N][4] = {};
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) copy(step);
    close_copies();  // of nothing too, so that the number of open groups is known
  }
  wait_copies<STAGES - 2>();
  __syncthreads();
  load(0, 0, 0);
  for (int step = 0; step < steps; ++step) {
    if (step + STAGES - 1 < steps) copy(step + STAGES - 1);
    close_copies();
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      if (part + 1 < PARTS) {
        load((part + 1) % 2, step, part + 1);
      } else {
        wait_copies<STAGES - 2>();
        __syncthreads();  // the next step is there for all, and all have read this one, which is overwritten next
        load(0, step + 1, 0);  // after the last step: of what is there, for nothing
      }
#pragma unroll
      for (int f = 0; f < FRAGMENTS_M; ++f)
#pragma unroll
        for (int g = 0; g < FRAGMENTS_N; ++g) {
          const uint32_t(&b)[4] = fb[part % 2][g / 2];
          mma<In>(acc[f][g], fa[part % 2][f], b[g % 2 * 2], b[g % 2 * 2 + 1]);
        }
    }
  }

  __syncthreads();  // what was loaded for nothing is loaded, and the stages are free
  float4* const sums = reinterpret_cast<float4*>(shared) + thread % SLICE_THREADS;
  if (slice_of(thread) == 1) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS_M; ++f)
#pragma unroll
      for (int g = 0; g < FRAGMENTS_N; ++g)
        sums[(f * FRAGMENTS_N + g) * SLICE_THREADS] =
            make_float4(acc[f][g][0], acc[f][g][1], acc[f][g][2], acc[f][g][3]);
  }
  __syncthreads();
  if (slice_of(thread) == 1) return;
  Out* const part = out + int64_t(blockIdx.y) * n_out * n_in;
#pragma unroll
  for (int f = 0; f < FRAGMENTS_M; ++f) {
    const int i = m0 + warp_m(thread) + f * 16 + row_of_c(lane);
#pragma unroll
    for (int g = 0; g < FRAGMENTS_N; ++g) {
      const int j = n0 + warp_n(thread) + g * 8 + column_of_c(lane);
      const float4 other = sums[(f * FRAGMENTS_N + g) * SLICE_THREADS];
      const float(&own)[4] = acc[f][g];
      Out* const at = part + int64_t(i) * n_in + j;
      if (i < n_out && j < n_in)
        *reinterpret_cast<Pair<Out>*>(at) = {convert<Out>(own[0] + other.x), convert<Out>(own[1] + other.y)};
      if (i + 8 < n_out && j < n_in)
        *reinterpret_cast<Pair<Out>*>(at + int64_t(8) * n_in) = {convert<Out>(own[2] + other.z),
                                                                 convert<Out>(own[3] + other.w)};
    }
  }
#endif
}

// out[i] = sum_s parts[s, i], in the order of s; four neighbouring entries a thread.
template <typename Out>
__global__ void __launch_bounds__(THREADS)
    sum_splits_kernel(const float4* __restrict__ parts, Four<Out>* __restrict__ out, int64_t fours, int splits) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= fours) return;
  float4 sum = parts[i];
#pragma unroll 4
  for (int s = 1; s < splits; ++s) {
    const float4 part = parts[s * fours + i];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  out[i] = {convert<Out>(sum.x), convert<Out>(sum.y), convert<Out>(sum.z), convert<Out>(sum.w)};
}

template <typename In, typename Out>
cudaError_t multiply(const SubnetGrad& g, Out* to, int64_t splits, cudaStream_t stream) {
  const int64_t tiles = ((g.n_out + GRAD_TILE - 1) / GRAD_TILE) * ((g.n_in + GRAD_TILE - 1) / GRAD_TILE);
  if (tiles > INT_MAX || splits > 65535) return cudaErrorInvalidConfiguration;
  const auto kernel = subnet_grad_kernel<In, Out>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  if (error != cudaSuccess) return error;
  kernel<<<dim3(unsigned(tiles), unsigned(splits)), THREADS, SHARED_BYTES, stream>>>(
      static_cast<const char*>(g.dy), static_cast<const char*>(g.x_sub), g.out_idx, to, g.tokens, int(g.n_out),
      int(g.n_in), g.split_tokens, g.stride_dt, g.stride_xt);
  return cudaGetLastError();
}

template <typename In, typename Out> cudaError_t launch(const SubnetGrad& g, cudaStream_t stream) {
  const int64_t splits = (g.tokens + g.split_tokens - 1) / g.split_tokens;
  if (splits == 1) return multiply<In>(g, static_cast<Out*>(g.out), 1, stream);
  if (!g.parts) return cudaErrorInvalidValue;
  const cudaError_t error = multiply<In>(g, g.parts, splits, stream);
  if (error != cudaSuccess) return error;
  const int64_t fours = g.n_out * g.n_in / 4, blocks = (fours + THREADS - 1) / THREADS;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  sum_splits_kernel<Out><<<unsigned(blocks), THREADS, 0, stream>>>(
      reinterpret_cast<const float4*>(g.parts), static_cast<Four<Out>*>(g.out), fours, int(splits));
  return cudaGetLastError();
}

template <typename In> cudaError_t launch(const SubnetGrad& g, cudaStream_t stream) {
  switch (g.out_dtype) {
    case Dtype::fp32: return launch<In, float>(g, stream);
    case Dtype::bf16: return launch<In, __nv_bfloat16>(g, stream);
    case Dtype::fp16: return launch<In, __half>(g, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t subnet_grad(const SubnetGrad& g, cudaStream_t stream) {
  if (g.tokens <= 0 || g.split_tokens <= 0 || g.split_tokens % GRAD_STEP || g.n_out % UNIT || g.n_in % UNIT)
    return cudaErrorInvalidValue;
  if (g.n_out == 0 || g.n_in == 0) return cudaSuccess;
  switch (g.dtype) {
    case Dtype::bf16: return launch<__nv_bfloat16>(g, stream);
    case Dtype::fp16: return launch<__half>(g, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace losia
