// Where csrc/subnet_grad.cu keeps what: a step's two operands in shared memory, the product in registers.
//
// An operand's tile is GRAD_STEP tokens x GRAD_TILE columns of 2 bytes, token-major: 16 units of 16 bytes a row, unit
// u of row r at unit u ^ (r % 8) of that row. So neither 8 neighbouring units of a row (what 8 lanes copy) nor one
// unit of 8 neighbouring rows (what 8 lanes of load_transposed name) share banks.
//
// Eight warps: two slices of a step's tokens x 2 x 2 of the tile; a warp's part is 64 x 64, of fragments 16 x 8.
#pragma once

#include "losia.h"

namespace losia {

constexpr int THREADS = 256;
constexpr int SLICES = 2;
constexpr int SLICE_THREADS = THREADS / SLICES;
constexpr int UNIT = 8;                       // elements in 16 bytes
constexpr int ROW_UNITS = GRAD_TILE / UNIT;   // 16
constexpr int ROW_BYTES = 2 * GRAD_TILE;      // 256
constexpr int TILE_BYTES = GRAD_STEP * ROW_BYTES;
constexpr int STAGE_BYTES = 2 * TILE_BYTES;   // dy's tile, then x_sub's
constexpr int WARP_TILE = 64;
constexpr int FRAGMENTS_M = WARP_TILE / 16, FRAGMENTS_N = WARP_TILE / 8;
static_assert(ROW_UNITS == 16 && GRAD_TILE == 2 * WARP_TILE && GRAD_STEP % (16 * SLICES) == 0, "as described above");

// The byte of a tile where unit u of row r begins.
__host__ __device__ constexpr int place(int r, int u) { return r * ROW_BYTES + (u ^ r % 8) * 16; }

// A thread copies one unit of COPIES rows.
constexpr int COPY_ROWS = THREADS / ROW_UNITS;       // 16, of which 2 by a warp
constexpr int COPIES = GRAD_STEP / COPY_ROWS;
__host__ __device__ constexpr int copied_unit(int thread) { return thread % ROW_UNITS; }
__host__ __device__ constexpr int copied_row(int thread, int i) { return thread / ROW_UNITS + i * COPY_ROWS; }

// Which part of the tile, and of a step's tokens, is a thread's warp's.
__host__ __device__ constexpr int slice_of(int thread) { return thread / SLICE_THREADS; }
__host__ __device__ constexpr int warp_m(int thread) { return thread / 64 % 2 * WARP_TILE; }
__host__ __device__ constexpr int warp_n(int thread) { return thread / 32 % 2 * WARP_TILE; }

// Fragment a of mma (m16 x k16) is four 8 x 8 matrices: (m, k) = (0, 0), (8, 0), (0, 8), (8, 8). Lane l holds of each
// m = l / 4 and k = 2 (l % 4) + {0, 1}: what load_transposed gives of rows k and columns m. The byte of dy's tile
// that lane l names, for the fragment at token k and column m:
__host__ __device__ constexpr int row_of_a(int lane, int k, int m) {
  return place(k + lane / 16 * 8 + lane % 8, m / UNIT + lane / 8 % 2);
}

// Fragment b (k16 x n8) is two: k = 0, 8. Lane l holds n = l / 4 and k = 2 (l % 4) + {0, 1}. Two neighbouring
// fragments are loaded at once: (n, k) = (0, 0), (0, 8), (8, 0), (8, 8). The byte of x_sub's tile that lane l names:
__host__ __device__ constexpr int row_of_b(int lane, int k, int n) {
  return place(k + lane / 8 % 2 * 8 + lane % 8, n / UNIT + lane / 16);
}

// Registers 0 and 1 of fragment c (m16 x n8) are this row, this column and the next; registers 2 and 3 lie 8 rows on.
__host__ __device__ constexpr int row_of_c(int lane) { return lane / 4; }
__host__ __device__ constexpr int column_of_c(int lane) { return lane % 4 * 2; }

}  // namespace losia
