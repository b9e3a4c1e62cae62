// Eight neighbouring entries, loaded and stored 16 bytes at a time; they begin at a multiple of 16 bytes.
#pragma once

#include <cuda_runtime.h>

namespace losia {

constexpr int EIGHT = 8;

template <typename T> union Eight {
  static constexpr int UNITS = EIGHT * sizeof(T) / sizeof(uint4);
  uint4 units[UNITS];
  T of[EIGHT];

  // `leaves`: these bytes are marked as first to leave L2.
  __device__ explicit Eight(const T* from, bool leaves = false) {
    const uint4* at = reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int k = 0; k < UNITS; ++k) units[k] = leaves ? __ldcs(at + k) : at[k];
  }
  __device__ void store(T* to, bool leaves = false) const {
    uint4* at = reinterpret_cast<uint4*>(to);
#pragma unroll
    for (int k = 0; k < UNITS; ++k) {
      if (leaves)
        __stcs(at + k, units[k]);
      else
        at[k] = units[k];
    }
  }
};

}  // namespace losia
