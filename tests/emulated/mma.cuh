// csrc/mma.cuh for a CPU, as the PTX ISA defines those instructions; it is a broken rule that 8 lanes share banks.
#pragma once

#include <map>
#include <utility>

#include "dtypes.cuh"

namespace emulated {

struct Copy { uint32_t to; const void* from; };
struct Copies {  // of a thread
  std::vector<std::vector<Copy>> groups{1};
  int begun = 0;
};
inline std::map<int, Copies> copies;
inline std::map<std::pair<int, int>, int> banks;  // that lanes wrote to, by eight lanes and their n-th copy

struct Range { const void *begin, *end; };
inline Range readable[2];  // what may be copied from

inline const bool cleared = (begin_block = [] { copies.clear(), banks.clear(); }, true);

inline void complete(const Copy& copy) {
  if (copy.from) std::memcpy(shared + copy.to, copy.from, 16);
  else std::memset(shared + copy.to, 0, 16);
}

// A unit's address; 0 where it is none.
inline uint32_t unit_at(int& seen, uint32_t address) {
  const int bank = 1 << address / 16 % 8;
  require(!(seen & bank), "8 lanes share banks");
  seen |= bank;
  const bool right = address % 16 == 0 && address + 16 <= sizeof(shared);
  return require(right, "not a unit of 16 bytes of shared memory") ? address : 0;
}

}  // namespace emulated

namespace losia {

inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const char*>(p) - emulated::shared); }

inline void copy_async(uint32_t to, const void* from, bool zero) {
  using namespace emulated;
  Copies& mine = copies[current];
  bool inside = zero;
  for (const Range& r : readable) inside |= r.begin <= from && static_cast<const char*>(from) + 16 <= r.end;
  require(zero || uintptr_t(from) % 16 == 0, "copied from no multiple of 16 bytes");
  require(inside, "copied from outside of the operands");
  const Copy copy{unit_at(banks[{current / 8, mine.begun++}], to), zero || !inside ? nullptr : from};
  if (eager) complete(copy);
  else mine.groups.back().push_back(copy);
}

inline void close_copies() { emulated::copies[emulated::current].groups.emplace_back(); }

template <int Open> void wait_copies() {
  auto& groups = emulated::copies[emulated::current].groups;  // the last one is not closed
  for (size_t i = 0; i + 1 + Open < groups.size(); ++i) {
    for (const auto& copy : groups[i]) emulated::complete(copy);
    groups[i].clear();
  }
}

inline void load_transposed(uint32_t (&to)[4], uint32_t row) {
  using namespace emulated;
  const int lane = current % 32;
  Warp& warp = warps[current / 32];
  warp.in[lane][0] = row;
  together(warp, [](Warp& w) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      int seen = 0;
      for (int r = 0; r < 8; ++r) w.in[matrix * 8 + r][0] = unit_at(seen, uint32_t(w.in[matrix * 8 + r][0]));
      for (int l = 0; l < 32; ++l) {
        uint16_t pair[2];  // of column l / 4, rows 2 (l % 4) and the next
        for (int i = 0; i < 2; ++i)
          std::memcpy(&pair[i], shared + w.in[matrix * 8 + l % 4 * 2 + i][0] + l / 4 * 2, 2);
        w.out[l][matrix] = pair[0] | uint32_t(pair[1]) << 16;
      }
    }
  });
  for (int matrix = 0; matrix < 4; ++matrix) to[matrix] = uint32_t(warp.out[lane][matrix]);
}

template <typename In> float half_of(uint64_t pair, int which) {
  const uint16_t bits = uint16_t(pair >> 16 * which);
  In value;
  std::memcpy(&value, &bits, 2);
  return widen(value);
}

template <typename In> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulated;
  const int lane = current % 32;
  Warp& warp = warps[current / 32];
  for (int i = 0; i < 4; ++i) warp.in[lane][i] = a[i];
  warp.in[lane][4] = b0, warp.in[lane][5] = b1;
  for (int i = 0; i < 4; ++i) std::memcpy(&warp.in[lane][6 + i], &c[i], 4);
  together(warp, [](Warp& w) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 2; ++i)
        for (int half = 0; half < 4; ++half) {
          a[l / 4 + half % 2 * 8][l % 4 * 2 + i + half / 2 * 8] = half_of<In>(w.in[l][half], i);
          if (half < 2) b[l % 4 * 2 + i + half * 8][l / 4] = half_of<In>(w.in[l][4 + half], i);
        }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        float sum;
        std::memcpy(&sum, &w.in[l][6 + i], 4);
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        std::memcpy(&w.out[l][i], &sum, 4);
      }
  });
  for (int i = 0; i < 4; ++i) std::memcpy(&c[i], &warp.out[lane][i], 4);
}

}  // namespace losia
