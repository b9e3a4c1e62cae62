// One step of AdamW on bf16 tensors, many in one launch, each result rounded stochastically to bf16:
//
//   m = m + (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr decay) p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
//
// Bytes: 14 an entry, four tensors read and three written. About 60 operations an entry, 40 of them the three roundings'
// random bits.
//
// The shape: a block takes ADAMW_PART neighbouring entries of one tensor, a thread two of them at a time, which are 4
// bytes; a tensor that does not begin at a multiple of 4 bytes, and an odd last entry, go one by one. ADAMW_PART, in
// losia.h, may be any multiple of 2 THREADS.
#include <climits>

#include "dtypes.cuh"
#include "losia.h"
#include "rounding.cuh"

namespace losia {
namespace {

constexpr int THREADS = 256;
static_assert(ADAMW_PART % (2 * THREADS) == 0, "every thread takes as many pairs");

struct Entry {
  __nv_bfloat16 p, g, m, v;
};

__device__ inline void step(Entry& e, uint32_t n, uint64_t key, float lr, float scale, const AdamW& c) {
  const float g = widen(e.g) * c.sign;
  const float m = widen(e.m) + c.rest1 * (g - widen(e.m));
  const float v = widen(e.v) * c.beta2 + c.rest2 * g * g;
  const float p = widen(e.p) * c.keep - lr * (m / (sqrtf(v) * scale + c.eps));
  const uint32_t random = noise(n, key);
  e.p = to_bf16(p, random);
  e.m = to_bf16(m, random >> 16);
  e.v = to_bf16(v, mix(random));
}

__global__ void __launch_bounds__(THREADS)
    adamw_kernel(const int64_t* __restrict__ tensors, const float* __restrict__ factors,
                 const int32_t* __restrict__ parts, AdamW c) {
  const int64_t which = parts[2 * blockIdx.x];
  const int64_t* tensor = tensors + which * 6;
  const float lr = factors[2 * which], scale = factors[2 * which + 1];
  __nv_bfloat16* p = reinterpret_cast<__nv_bfloat16*>(tensor[0]);
  const __nv_bfloat16* g = reinterpret_cast<const __nv_bfloat16*>(tensor[1]);
  __nv_bfloat16* m = reinterpret_cast<__nv_bfloat16*>(tensor[2]);
  __nv_bfloat16* v = reinterpret_cast<__nv_bfloat16*>(tensor[3]);
  const int64_t numel = tensor[4], first = int64_t(parts[2 * blockIdx.x + 1]) * ADAMW_PART;
  const uint64_t key = tensor[5];
  const bool pairs = ((tensor[0] | tensor[1] | tensor[2] | tensor[3]) & 3) == 0;
#pragma unroll
  for (int k = 2 * threadIdx.x; k < ADAMW_PART; k += 2 * THREADS) {
    const int64_t n = first + k;
    if (pairs && n + 1 < numel) {
      __nv_bfloat162* const p2 = reinterpret_cast<__nv_bfloat162*>(p + n);
      __nv_bfloat162* const m2 = reinterpret_cast<__nv_bfloat162*>(m + n);
      __nv_bfloat162* const v2 = reinterpret_cast<__nv_bfloat162*>(v + n);
      const __nv_bfloat162 pp = *p2, gg = *reinterpret_cast<const __nv_bfloat162*>(g + n), mm = *m2, vv = *v2;
      Entry a{pp.x, gg.x, mm.x, vv.x}, b{pp.y, gg.y, mm.y, vv.y};
      step(a, uint32_t(n), key, lr, scale, c);
      step(b, uint32_t(n + 1), key, lr, scale, c);
      *p2 = __nv_bfloat162(a.p, b.p);
      *m2 = __nv_bfloat162(a.m, b.m);
      *v2 = __nv_bfloat162(a.v, b.v);
    } else {
      for (int64_t i = n; i < n + 2 && i < numel; ++i) {
        Entry e{p[i], g[i], m[i], v[i]};
        step(e, uint32_t(i), key, lr, scale, c);
        p[i] = e.p, m[i] = e.m, v[i] = e.v;
      }
    }
  }
}

}  // namespace

cudaError_t adamw(const int64_t* tensors, const float* factors, const int32_t* parts, int64_t n_parts,
                  const AdamW& constants, cudaStream_t stream) {
  if (n_parts == 0) return cudaSuccess;
  if (n_parts > INT_MAX) return cudaErrorInvalidConfiguration;
  adamw_kernel<<<unsigned(n_parts), THREADS, 0, stream>>>(tensors, factors, parts, constants);
  return cudaGetLastError();
}

}  // namespace losia
