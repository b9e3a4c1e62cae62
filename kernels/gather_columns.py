"""Choose columns:  out[t, j] = x[t, in_idx[j]]        (x_S = x[:, X_S], what a layer keeps for its backward)

Bytes, for T tokens, n_in of `in` columns, e bytes an element: T n_in e written, 8 n_in of indices, and of x
every 32-byte sector that holds a chosen column. At e = 2 and one column in 8 chosen at random that is
1 - (7/8)^16 = 88 % of x; in aligned runs of 16 it is the chosen bytes alone. No arithmetic, so the time is
those bytes over the memory's bandwidth. (The device may fetch more: 64 bytes for each missing sector by default, so
that only runs of 32 move what was chosen alone.)

The shape: a program copies BLOCK_T tokens x BLOCK_C columns. Indices are sorted, so neighbouring lanes read
neighbouring sectors and each sector is fetched once; the indices are loaded once for BLOCK_T tokens, which puts
as many independent loads in flight for each lane. Runs of GROUP columns are promised to the compiler, which then
moves up to 16 bytes at once. Offsets are 32-bit wherever they fit: a gather has one address for each element.
To change the tile, change `_tile`, or add one to `candidates` and let `losia-pro tune` measure it: any powers of two
are correct, BLOCK_C of at least 16, the longest run that a load uses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .indexing import needs_int64
from .tiles import Device
from .tuned import lookup


@triton.jit
def gather_columns_kernel(
    x_ptr,  # (T, in), any strides
    idx_ptr,  # (n_runs GROUP,) int64
    out_ptr,  # (T, n_runs GROUP) contiguous
    T,
    n_runs,
    stride_t,
    stride_c,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INT64: tl.constexpr,
):
    n_in = n_runs * GROUP  # a multiple of GROUP in the compiler's eyes too
    # One axis, columns first: a grid's other axes end at 65535.
    column_blocks = tl.cdiv(n_in, BLOCK_C)
    t = (tl.program_id(0) // column_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = (tl.program_id(0) % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = tl.load(idx_ptr + j, mask=j < n_in, other=0)
    if INT64:
        t = t.to(tl.int64)
    else:
        column = column.to(tl.int32)
    if GROUP > 1:
        column = tl.max_contiguous(tl.multiple_of(column, GROUP), GROUP)
    mask = (t[:, None] < T) & (j[None, :] < n_in)
    value = tl.load(x_ptr + t[:, None] * stride_t + column[None, :] * stride_c, mask=mask)
    tl.store(out_ptr + t[:, None] * n_in + j[None, :], value, mask=mask)


def gather_columns(x: Tensor, in_idx: Tensor, group: int = 1) -> Tensor:
    """``x[:, X_S]``: ``x`` ``(T, in)``, ``in_idx`` ``(n_in,)`` int64, in aligned runs of ``group``; result
    ``(T, n_in)`` in ``x``'s dtype, contiguous. ``x`` may have any strides."""
    tokens, n_in = x.shape[0], in_idx.shape[0]
    in_idx = in_idx.contiguous()
    out = torch.empty(tokens, n_in, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    run = hardware_run(group)
    tuned = lookup(x.device, "gather_columns", x.dtype, n_in, run)
    block_t, block_c, warps = tuned or _tile(run, n_in)
    grid = (triton.cdiv(tokens, block_t) * triton.cdiv(n_in, block_c),)
    with torch.cuda.device_of(x):
        gather_columns_kernel[grid](
            x,
            in_idx,
            out,
            tokens,
            n_in // run,
            x.stride(0),
            x.stride(1),
            GROUP=run,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
            INT64=needs_int64(x, out),
            num_warps=warps,
        )
    return out


def hardware_run(group: int) -> int:
    """The largest power of two, of at most 16, that divides runs of ``group``: what a load can use."""
    return min(group & -group, 16)


def _tile(run: int, n_in: int) -> tuple[int, int, int]:
    """Tokens, columns and warps of a program: the fastest of those tried on an H200, and more tokens where a row
    is narrower than that."""
    tokens, columns = (2, 512) if run == 1 else (8, 256)
    width = min(columns, max(16, triton.next_power_of_2(n_in)))
    return tokens * columns // width, width, 8


def candidates(dtype: torch.dtype, device: Device) -> list[tuple[int, int, int]]:
    """What `losia-pro tune` measures: as `_tile` has it."""
    return [
        (1, 512, 4),
        (2, 256, 4),
        (2, 512, 8),
        (4, 256, 8),
        (4, 512, 8),
        (8, 128, 4),
        (8, 256, 8),
        (16, 128, 8),
        (16, 256, 8),
        (32, 64, 8),
    ]
