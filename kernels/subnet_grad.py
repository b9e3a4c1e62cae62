"""The subnet's gradient:  out[m, n] = sum_t dy[t, out_idx[m]] x_sub[t, n]        (dy[:, Y_S]^T x_S)

Flops: 2 T n_out n_in. Bytes, e an element: T n_in e of x_sub, and of dy every 32-byte sector that holds a
chosen column (88 % of it at e = 2 and one in 8 chosen). For 4096 x 4096, T = 8192, bf16: 4.3 GFLOP, 6 us of a
Hopper GPU's matrix units, and 68 MB, 16 us of its memory: the bytes decide.

The shape: a tiled product whose sum runs over tokens. Both operands lie token-major, so the tile of dy is
loaded as (BLOCK_M columns) x (BLOCK_K tokens), the transpose of how it is stored, and neighbouring lanes still
read neighbouring columns. n_out x n_in is small (512 x 512) and T long, so the tokens are split over SPLIT
programs a tile to fill the device; each writes its partial sum in fp32, and `sum_splits` adds them in a fixed
order: no atomics, the same bits every run.

dy is gathered first, by `gather_columns` (`fused=False`). Gathering inside the product (`fused=True`) reads
less, but each of the n_in / BLOCK_N column tiles gathers dy again, in 2-byte loads that cannot be pipelined.
To change the tile, change `_tiles`: any powers of two of at least 16 are correct; a stage of the pipeline
takes (BLOCK_M + BLOCK_N) BLOCK_K e bytes of shared memory, and a consumer GPU has 99 KiB in all.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gather_columns import gather_columns
from .indexing import INTERPRETED, needs_int64

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tiles(NamedTuple):
    """A launch's shape: columns of dy, columns of x_sub, tokens a step, warps, steps in flight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@triton.jit
def subnet_grad_kernel(
    dy_ptr,  # (T, out), any strides
    x_ptr,  # (T, N), any strides
    idx_ptr,  # (M,) int64: columns of dy; unused unless GATHER
    out_ptr,  # (SPLIT, M, N) contiguous
    T,
    M,
    N,
    T_SPLIT,  # tokens each split sums over, a multiple of BLOCK_K
    stride_dt,
    stride_dc,
    stride_xt,
    stride_xc,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INT64: tl.constexpr,
    UPCAST: tl.constexpr,
):
    split = tl.program_id(1)
    blocks_n = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if GATHER:
        column = tl.load(idx_ptr + m, mask=m < M, other=0)
    else:
        column = m
    if INT64:
        k, column, n_wide = k.to(tl.int64), column.to(tl.int64), n.to(tl.int64)
    else:
        column, n_wide = column.to(tl.int32), n
    first = split * T_SPLIT
    last = tl.minimum(first + T_SPLIT, T)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        t = start + k
        # Elements past T, M or N are zeros on both sides, so nothing that is not chosen can leak a NaN.
        a = tl.load(
            dy_ptr + t[None, :] * stride_dt + column[:, None] * stride_dc,
            mask=(t[None, :] < last) & (m[:, None] < M),
            other=0.0,
        )
        b = tl.load(
            x_ptr + t[:, None] * stride_xt + n_wide[None, :] * stride_xc,
            mask=(t[:, None] < last) & (n[None, :] < N),
            other=0.0,
        )
        if UPCAST:  # Triton's interpreter computes a wrong tl.dot of bf16
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    row = split.to(tl.int64) * M + m
    out = out_ptr + row[:, None] * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def sum_splits_kernel(parts_ptr, out_ptr, numel, SPLIT, BLOCK: tl.constexpr):
    """out[i] = sum_s parts[s, i], in the order of s."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = parts_ptr + i
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(SPLIT):
        acc += tl.load(part, mask=i < numel, other=0.0)
        part += numel
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), mask=i < numel)


def subnet_grad(
    dy: Tensor, x_sub: Tensor, out_idx: Tensor, out_dtype: torch.dtype, *, fused: bool = False
) -> Tensor:
    """``dy[:, Y_S]^T x_S`` with fp32 accumulation, the same bits every run.

    ``dy`` ``(T, out)``, ``x_sub`` ``(T, n_in)``, ``out_idx`` ``(n_out,)`` int64; result ``(n_out, n_in)`` in
    ``out_dtype``. Both operands may have any strides. ``fused`` gathers ``dy`` inside the product.

    Raises:
        TypeError: a dtype other than fp32, bf16 or fp16, or operands of two dtypes.
    """
    for what, dtype in (("dy", dy.dtype), ("x_sub", x_sub.dtype), ("out_dtype", out_dtype)):
        if dtype not in DTYPES:
            raise TypeError(
                f"the triton subnet_grad takes fp32, bf16 and fp16, got {what} {dtype}; use impl='torch'"
            )
    if dy.dtype != x_sub.dtype:
        raise TypeError(f"dy is {dy.dtype}, x_sub {x_sub.dtype}: they must be of one dtype")
    tokens, n_out, n_in = dy.shape[0], out_idx.shape[0], x_sub.shape[1]
    if tokens == 0 or n_out == 0 or n_in == 0:
        return torch.zeros(n_out, n_in, dtype=out_dtype, device=dy.device)
    if not fused:
        dy = gather_columns(dy, out_idx)
    tiles = _tiles(dy.dtype)
    blocks = triton.cdiv(n_out, tiles.m) * triton.cdiv(n_in, tiles.n)
    split_tokens = _split_tokens(tokens, blocks, tiles.k, _processors(dy.device))
    splits = triton.cdiv(tokens, split_tokens)
    # Triton's interpreter truncates to bf16 instead of rounding: let PyTorch round there.
    store_dtype = torch.float32 if INTERPRETED else out_dtype
    out = torch.empty(n_out, n_in, dtype=store_dtype, device=dy.device)
    parts = out
    if splits > 1:
        parts = torch.empty(splits, n_out, n_in, dtype=torch.float32, device=dy.device)
    with torch.cuda.device_of(dy):
        subnet_grad_kernel[(blocks, splits)](
            dy,
            x_sub,
            out_idx.contiguous(),
            parts,
            tokens,
            n_out,
            n_in,
            split_tokens,
            *dy.stride(),
            *x_sub.stride(),
            GATHER=fused,
            BLOCK_M=tiles.m,
            BLOCK_N=tiles.n,
            BLOCK_K=tiles.k,
            INT64=needs_int64(dy, x_sub),
            UPCAST=INTERPRETED,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if splits > 1:
            sum_splits_kernel[(triton.cdiv(out.numel(), 1024),)](
                parts, out, out.numel(), splits, BLOCK=1024
            )
    return out.to(out_dtype)


def _tiles(dtype: torch.dtype) -> Tiles:
    """The tile for operands of ``dtype``: fp32 has no matrix units in IEEE precision, so fewer per program."""
    return Tiles(64, 64, 32, 4, 3) if dtype == torch.float32 else Tiles(128, 128, 32, 8, 4)


def _split_tokens(tokens: int, blocks: int, block_k: int, processors: int) -> int:
    """Tokens per split: as many splits as fill the processors once, of at least 4 steps each."""
    splits = max(1, min(processors // blocks, tokens // (4 * block_k)))
    return -(-tokens // (splits * block_k)) * block_k


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # interpreted: enough to take the split path
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
