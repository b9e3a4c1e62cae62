// Enough of CUDA to run a kernel of csrc/ on a CPU: threads are fibers that take turns, and change places only where
// they wait for one another. Shared memory begins as NaN. tests/test_cuda_emulated.py compiles kernels over it.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct alignas(16) uint4 { unsigned x, y, z, w; };

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
template <typename Kernel> cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

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

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  bool done = false;
};

struct Warp {  // what its 32 threads bring to an operation of all of them, and what they get
  int arrived = 0, generation = 0;
  uint64_t in[32][16];
  uint64_t out[32][16];
};

inline char shared[99 * 1024] alignas(1024);
inline bool eager;  // asynchronous copies: at once, or not before they are waited for
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline int current, barrier_arrived, barrier_generation;
inline std::function<void()> body;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

// All of the warp's threads meet here; the last to come does the work.
template <typename Work> void together(Warp& warp, Work work) {
  const int generation = warp.generation;
  if (++warp.arrived == 32) {
    work(warp);
    warp.arrived = 0;
    ++warp.generation;
  }
  while (warp.generation == generation) yield();
}

inline void entry() {
  body();
  fibers[current].done = true;
  yield();
}

}  // namespace emulated

inline uint4 __ldcs(const uint4* from) { return *emulated::whole(from); }
inline void __stcs(uint4* to, uint4 value) { *emulated::whole(to) = value; }

inline dim3 blockIdx(0), gridDim(1), blockDim(1);
inline struct {
  operator int() const { return emulated::current; }
  struct { operator unsigned() const { return unsigned(emulated::current) % blockDim.x; } } x;
  struct { operator unsigned() const { return unsigned(emulated::current) / blockDim.x; } } y;
} threadIdx;

inline void __syncthreads() {
  using namespace emulated;
  const int generation = barrier_generation;
  if (++barrier_arrived == int(fibers.size())) {
    barrier_arrived = 0;
    ++barrier_generation;
  }
  while (barrier_generation == generation) yield();
}

namespace emulated {

inline void (*begin_block)() = [] {};

template <typename... Parameters> auto run(void (*kernel)(Parameters...), dim3 grid, dim3 block, int bytes, void*) {
  return [=](auto... arguments) {
    if (!require(bytes <= int(sizeof(shared)), "more shared memory than every device has")) return;
    gridDim = grid, blockDim = block;
    const int threads = int(block.x * block.y);
    if (!require(threads <= 1024, "more threads than a block has")) return;
    body = [=] { kernel(arguments...); };
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        std::memset(shared, 0xFF, sizeof(shared));
        begin_block();
        fibers = std::vector<Fiber>(threads);
        warps = std::vector<Warp>((threads + 31) / 32);
        for (Fiber& fiber : fibers) {
          getcontext(&fiber.context);
          fiber.context.uc_stack = {fiber.stack.get(), 0, 1 << 16};
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, entry, 0);
        }
        for (int running = threads; running;) {
          running = 0;
          for (current = 0; current < threads; ++current)
            if (!fibers[current].done) {
              swapcontext(&scheduler, &fibers[current].context);
              running += !fibers[current].done;
            }
        }
      }
  };
}

}  // namespace emulated
