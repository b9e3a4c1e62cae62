// The kernels' entry points: raw device pointers, sizes and strides, a stream; no torch, so one build serves every
// version of it. Each returns the launch's error and never synchronises. Products are the library's: these are the
// memory-bound parts around them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace losia {

enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2, fp64 = 3 };

// out[t, j] = x[t, in_idx[j]] for n_in columns that come in aligned runs of `step` elements, moved `unit` bytes at a
// time (step elements: 2, 4, 8 or 16 bytes); strides in bytes; out is (tokens, n_in) contiguous. A unit of 16 needs
// rows of x and of out that begin at multiples of 16, and columns that are neighbours in memory.
cudaError_t gather_columns(const void* x, const int64_t* in_idx, void* out, int64_t tokens, int64_t n_in,
                           int64_t stride_t, int64_t stride_c, int unit, int step, cudaStream_t stream);

// One optimizer step of a profiled layer's rows: g = scale (product + grad), I = importance of (g, weight), then
// importance = beta1 importance + (1 - beta1) I, uncertainty = beta2 uncertainty + (1 - beta2) |I - importance|.
// All are (rows, columns) contiguous but the weight; product and grad (may be null) are fp32.
struct ImportanceUpdate {
  void *importance, *uncertainty;
  const void* weight;
  const float *product, *grad;
  int64_t rows, columns, weight_stride_r, weight_stride_c;
  float beta1, rest1, beta2, rest2, scale;  // rest1 = 1 - beta1, rest2 = 1 - beta2
  int variant;  // 0: |gw - (gw)^2 / 2|, 1: |gw|, 2: (gw)^2
  Dtype weight_dtype, kept_dtype;
};
cudaError_t importance_update(const ImportanceUpdate& update, cudaStream_t stream);

// weight[out_idx[i], in_idx[j]] = subnet[i, j] for many layers of one pair of dtypes. A layer is a row of nine int64:
// the four addresses, the subnet's rows and columns, the weight's strides in elements, how many entries the subnets
// before it have. A part is two int32: a layer, and which block of its subnet, row-major: 2^log2_columns columns, at
// most PART in all. A key other than 0 rounds fp32 stochastically to bf16.
constexpr int PART = 2048;
cudaError_t write_back(const int64_t* layers, const int32_t* parts, int64_t n_parts, int log2_columns, Dtype weight,
                       Dtype subnet, uint64_t key, cudaStream_t stream);

// One step of AdamW on bf16 tensors, computed in fp32 and rounded stochastically; csrc/adamw.cu has the equation. A
// tensor is a row of six int64: the addresses of parameter, gradient and moments, their entries, the key of their
// random bits; and of two floats: lr / (1 - beta1^t), (1 - beta2^t)^-1/2. A part is two int32: a tensor, and which
// block of ADAMW_PART entries.
struct AdamW {
  float keep, rest1, beta2, rest2, eps, sign;  // 1 - lr decay, 1 - beta1, beta2, 1 - beta2, eps, -1 to maximize
};
constexpr int ADAMW_PART = 2048;
cudaError_t adamw(const int64_t* tensors, const float* factors, const int32_t* parts, int64_t n_parts,
                  const AdamW& constants, cudaStream_t stream);

// t = t + weight (other - t), computed in fp32: on bf16 tensors, others too, rounded stochastically, or on fp32 ones with
// others in fp32, bf16 or fp16; csrc/lerp.cu has the equation. A tensor is a row of five int64: the addresses of t and
// other, their entries, those of the tensors before, the key of the random bits. A part is two int32: a tensor, and
// which block of LERP_PART entries.
constexpr int LERP_PART = 2048;
cudaError_t lerp(const int64_t* tensors, const float* weight, const int32_t* parts, int64_t n_parts, Dtype t,
                 Dtype other, cudaStream_t stream);

}  // namespace losia
