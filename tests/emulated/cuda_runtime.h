// Enough of CUDA to run a kernel of csrc/ on a CPU, one thread after the other: for kernels whose threads neither wait
// for one another nor share memory. tests/test_cuda_emulated.py compiles kernels over it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline dim3 blockIdx(0), gridDim(1), blockDim(1), threadIdx(0);

namespace emulated {

inline const char* broken = "";  // the rule that was broken first

inline bool require(bool holds, const char* what) {
  if (!holds && !*broken) broken = what;
  return holds;
}

// The 16 bytes at an address; others where it is no multiple of 16.
template <typename T> T* whole(T* at) {
  static std::remove_const_t<T> other;
  return require(uintptr_t(at) % 16 == 0, "no multiple of 16 bytes") ? at : &other;
}

template <typename... Parameters> auto run(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared, void*) {
  return [=](auto... arguments) {
    if (!require(shared == 0, "shared memory")) return;
    if (!require(block.x * block.y <= 1024, "more threads than a block has")) return;
    gridDim = grid, blockDim = block;
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
          for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(arguments...);
  };
}

}  // namespace emulated

inline uint4 __ldcs(const uint4* from) { return *emulated::whole(from); }
inline void __stcs(uint4* to, uint4 value) { *emulated::whole(to) = value; }
