// The kernels' entry points: raw device pointers, sizes in elements, a stream; no torch, so one build serves
// every version of it. Each returns the launch's error and never synchronises.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace losia {

enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// out[t, j] = x[t, in_idx[j]]; out is (tokens, n_in) contiguous; itemsize is 2, 4 or 8 bytes.
cudaError_t gather_columns(const void* x, const int64_t* in_idx, void* out, int64_t tokens, int64_t n_in,
                           int64_t stride_t, int64_t stride_c, int itemsize, cudaStream_t stream);

// out[m, n] = sum_t dy[t, out_idx[m]] x_sub[t, n], accumulated in fp32; out is (n_out, n_in) contiguous.
// parts holds splits x n_out x n_in floats, unused where splits is 1.
cudaError_t subnet_grad(const void* dy, const void* x_sub, const int64_t* out_idx, void* out, float* parts,
                        int64_t tokens, int64_t n_out, int64_t n_in, int64_t dy_stride_t,
                        int64_t dy_stride_c, int64_t x_stride_t, int64_t x_stride_c, int splits,
                        Dtype in_dtype, Dtype out_dtype, cudaStream_t stream);

// The output columns and rows that a block of subnet_grad computes: how many splits fill a device follows.
int subnet_grad_tile();

}  // namespace losia
