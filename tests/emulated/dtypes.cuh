// csrc/dtypes.cuh for a CPU.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 { uint16_t bits; };
struct __half { _Float16 value; };

namespace losia {

inline float widen(float v) { return v; }
inline float widen(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline float widen(__half v) { return float(v.value); }

template <typename To> To convert(float v);
template <> inline float convert(float v) { return v; }
template <> inline __half convert(float v) { return {_Float16(v)}; }
template <> inline __nv_bfloat16 convert(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return {uint16_t(v == v ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FC0)};
}

}  // namespace losia
