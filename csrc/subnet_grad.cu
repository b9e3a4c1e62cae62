// The subnet's gradient:  out[m, n] = sum_t dy[t, out_idx[m]] x_sub[t, n]
//
// Flops: 2 T n_out n_in. Bytes, e an element: T n_in e of x_sub, and of dy every 32-byte sector that holds a
// chosen column, each read once for every TILE columns of the other operand.
//
// The shape: the plain tiled product, right on every device and in every dtype: a block of 256 threads computes
// TILE x TILE outputs, 4 x 4 a thread, in fp32 arithmetic from shared memory, DEPTH tokens at a time. Both
// operands lie token-major, so a tile's row is a line of neighbouring columns and is loaded as such. The outputs
// are few and the tokens many, so blockIdx.y splits the tokens; the parts are summed by a second kernel in a
// fixed order, so the bits are the same every run. It uses no matrix units.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>

#include "losia.h"

namespace losia {
namespace {

constexpr int TILE = 64;
constexpr int DEPTH = 16;
constexpr int SIDE = 4;                            // outputs of a thread: SIDE x SIDE
constexpr int ACROSS = TILE / SIDE;                // threads along one side of the tile
constexpr int THREADS = ACROSS * ACROSS;
constexpr int CHAIN = 8;                           // tiles summed in one chain, so that a long sum stays exact
constexpr int LOADS = TILE * DEPTH / THREADS;      // elements of each operand that a thread loads
static_assert(THREADS % TILE == 0, "a thread always loads the same column");

__device__ float widen(float v) { return v; }
__device__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ float widen(__half v) { return __half2float(v); }

template <typename T> __device__ T narrow(float v);
template <> __device__ float narrow<float>(float v) { return v; }
template <> __device__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16(v); }
template <> __device__ __half narrow<__half>(float v) { return __float2half(v); }

template <typename In, typename Out>
__global__ void __launch_bounds__(THREADS)
    subnet_grad_kernel(const In* __restrict__ dy, const In* __restrict__ x_sub,
                       const int64_t* __restrict__ out_idx, Out* __restrict__ out, int64_t tokens, int64_t n_out,
                       int64_t n_in, int64_t dy_stride_t, int64_t dy_stride_c, int64_t x_stride_t,
                       int64_t x_stride_c, int64_t split_tokens, int blocks_n) {
  __shared__ float a[DEPTH][TILE];
  __shared__ float b[DEPTH][TILE];
  const int64_t m0 = int64_t(blockIdx.x / blocks_n) * TILE;
  const int64_t n0 = int64_t(blockIdx.x % blocks_n) * TILE;
  const int64_t first = int64_t(blockIdx.y) * split_tokens;
  const int64_t last = min(first + split_tokens, tokens);

  // Loading: this thread's column of each operand, and its first token within the tile.
  const int column = threadIdx.x % TILE;
  const int token = threadIdx.x / TILE;
  const bool has_m = m0 + column < n_out;
  const bool has_n = n0 + column < n_in;
  const In* dy_column = dy + (has_m ? out_idx[m0 + column] * dy_stride_c : 0);
  const In* x_column = x_sub + (has_n ? (n0 + column) * x_stride_c : 0);

  // Computing: outputs (row + ACROSS i, col + ACROSS j).
  const int row = threadIdx.x / ACROSS;
  const int col = threadIdx.x % ACROSS;
  float acc[SIDE][SIDE] = {}, chain[SIDE][SIDE] = {};

  int links = 0;
  for (int64_t t0 = first; t0 < last; t0 += DEPTH) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int k = token + i * (THREADS / TILE);
      const int64_t t = t0 + k;
      a[k][column] = t < last && has_m ? widen(dy_column[t * dy_stride_t]) : 0.f;
      b[k][column] = t < last && has_n ? widen(x_column[t * x_stride_t]) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {
      float u[SIDE], v[SIDE];
#pragma unroll
      for (int i = 0; i < SIDE; ++i) {
        u[i] = a[k][row + ACROSS * i];
        v[i] = b[k][col + ACROSS * i];
      }
#pragma unroll
      for (int i = 0; i < SIDE; ++i)
#pragma unroll
        for (int j = 0; j < SIDE; ++j) chain[i][j] = fmaf(u[i], v[j], chain[i][j]);
    }
    if (++links == CHAIN || t0 + DEPTH >= last) {
      links = 0;
#pragma unroll
      for (int i = 0; i < SIDE; ++i)
#pragma unroll
        for (int j = 0; j < SIDE; ++j) acc[i][j] += chain[i][j], chain[i][j] = 0.f;
    }
    __syncthreads();
  }

  out += int64_t(blockIdx.y) * n_out * n_in;
#pragma unroll
  for (int i = 0; i < SIDE; ++i)
#pragma unroll
    for (int j = 0; j < SIDE; ++j) {
      const int64_t m = m0 + row + ACROSS * i, n = n0 + col + ACROSS * j;
      if (m < n_out && n < n_in) out[m * n_in + n] = narrow<Out>(acc[i][j]);
    }
}

template <typename Out>
__global__ void __launch_bounds__(THREADS)
    sum_splits_kernel(const float* __restrict__ parts, Out* __restrict__ out, int64_t numel, int splits) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= numel) return;
  float acc = 0.f;
  for (int s = 0; s < splits; ++s) acc += parts[s * numel + i];
  out[i] = narrow<Out>(acc);
}

struct Args {
  const void *dy, *x_sub;
  const int64_t* out_idx;
  void* out;
  float* parts;
  int64_t tokens, n_out, n_in, dy_stride_t, dy_stride_c, x_stride_t, x_stride_c;
  int splits;
  cudaStream_t stream;
};

template <typename In, typename Out>
cudaError_t product(const Args& p, Out* out) {
  const int64_t blocks_n = (p.n_in + TILE - 1) / TILE;
  const int64_t blocks = (p.n_out + TILE - 1) / TILE * blocks_n;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const int64_t split_tokens = (p.tokens + p.splits - 1) / p.splits;
  subnet_grad_kernel<In, Out><<<dim3(unsigned(blocks), p.splits), THREADS, 0, p.stream>>>(
      static_cast<const In*>(p.dy), static_cast<const In*>(p.x_sub), p.out_idx, out, p.tokens, p.n_out, p.n_in,
      p.dy_stride_t, p.dy_stride_c, p.x_stride_t, p.x_stride_c, split_tokens, int(blocks_n));
  return cudaGetLastError();
}

template <typename In, typename Out>
cudaError_t launch(const Args& p) {
  if (p.splits == 1) return product<In, Out>(p, static_cast<Out*>(p.out));
  const cudaError_t error = product<In, float>(p, p.parts);
  if (error != cudaSuccess) return error;
  const int64_t numel = p.n_out * p.n_in;
  const int64_t blocks = (numel + THREADS - 1) / THREADS;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  sum_splits_kernel<Out><<<unsigned(blocks), THREADS, 0, p.stream>>>(p.parts, static_cast<Out*>(p.out), numel,
                                                                     p.splits);
  return cudaGetLastError();
}

template <typename In>
cudaError_t choose_out(const Args& p, Dtype out_dtype) {
  switch (out_dtype) {
    case Dtype::fp32: return launch<In, float>(p);
    case Dtype::bf16: return launch<In, __nv_bfloat16>(p);
    case Dtype::fp16: return launch<In, __half>(p);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int subnet_grad_tile() { return TILE; }

cudaError_t subnet_grad(const void* dy, const void* x_sub, const int64_t* out_idx, void* out, float* parts,
                        int64_t tokens, int64_t n_out, int64_t n_in, int64_t dy_stride_t, int64_t dy_stride_c,
                        int64_t x_stride_t, int64_t x_stride_c, int splits, Dtype in_dtype, Dtype out_dtype,
                        cudaStream_t stream) {
  if (n_out == 0 || n_in == 0) return cudaSuccess;
  if (splits < 1 || splits > 65535) return cudaErrorInvalidValue;
  const Args p{dy,    x_sub, out_idx,     out,         parts,      tokens,     n_out,
               n_in,  dy_stride_t, dy_stride_c, x_stride_t, x_stride_c, splits, stream};
  switch (in_dtype) {
    case Dtype::fp32: return choose_out<float>(p, out_dtype);
    case Dtype::bf16: return choose_out<__nv_bfloat16>(p, out_dtype);
    case Dtype::fp16: return choose_out<__half>(p, out_dtype);
  }
  return cudaErrorInvalidValue;
}

}  // namespace losia
