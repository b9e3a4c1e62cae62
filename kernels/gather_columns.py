"""Choose columns:  out[t, j] = x[t, in_idx[j]]        (x_S = x[:, X_S], what a layer keeps for its backward)

Bytes, for T tokens, n_in of `in` columns, e bytes an element: T n_in e written, 8 n_in of indices, and of x
every 32-byte sector that holds a chosen column. At e = 2 and one column in 8 chosen at random that is
1 - (7/8)^16 = 88 % of x. No arithmetic, so the time is those bytes over the memory's bandwidth.

The shape: a program copies BLOCK_T = 4 tokens x BLOCK_C = 512 columns. Indices are sorted, so neighbouring
lanes read neighbouring sectors and each sector is fetched once; the 512 indices are loaded once and used for
4 tokens, which puts 4 independent loads in flight for each lane. More tokens a program cost occupancy, fewer
reload the indices. Offsets are 32-bit wherever they fit: a gather has one address for each element.
To change the tile, change the two constants below: any powers of two are correct.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .indexing import needs_int64

BLOCK_T = 4
BLOCK_C = 512


@triton.jit
def gather_columns_kernel(
    x_ptr,  # (T, in), any strides
    idx_ptr,  # (n_in,) int64
    out_ptr,  # (T, n_in) contiguous
    T,
    n_in,
    stride_t,
    stride_c,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INT64: tl.constexpr,
):
    # One axis, columns first: a grid's other axes end at 65535.
    column_blocks = tl.cdiv(n_in, BLOCK_C)
    t = (tl.program_id(0) // column_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = (tl.program_id(0) % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = tl.load(idx_ptr + j, mask=j < n_in, other=0)
    if INT64:
        t = t.to(tl.int64)
    else:
        column = column.to(tl.int32)
    mask = (t[:, None] < T) & (j[None, :] < n_in)
    value = tl.load(x_ptr + t[:, None] * stride_t + column[None, :] * stride_c, mask=mask)
    tl.store(out_ptr + t[:, None] * n_in + j[None, :], value, mask=mask)


def gather_columns(x: Tensor, in_idx: Tensor) -> Tensor:
    """``x[:, X_S]``: ``x`` ``(T, in)``, ``in_idx`` ``(n_in,)`` int64; result ``(T, n_in)`` in ``x``'s dtype,
    contiguous. ``x`` may have any strides."""
    tokens, n_in = x.shape[0], in_idx.shape[0]
    in_idx = in_idx.contiguous()
    out = torch.empty(tokens, n_in, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(tokens, BLOCK_T) * triton.cdiv(n_in, BLOCK_C),)
    with torch.cuda.device_of(x):
        gather_columns_kernel[grid](
            x,
            in_idx,
            out,
            tokens,
            n_in,
            x.stride(0),
            x.stride(1),
            BLOCK_T=BLOCK_T,
            BLOCK_C=BLOCK_C,
            INT64=needs_int64(x, out),
            num_warps=4,
        )
    return out
