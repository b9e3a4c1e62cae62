"""The subnet's gradient:  out[m, n] = sum_t dy[t, out_idx[m]] x_sub[t, n]        (dy[:, Y_S]^T x_S)

Flops: 2 T n_out n_in. Bytes, e an element: T n_in e of x_sub, and of dy every 32-byte sector that holds a
chosen column (88 % of it at e = 2 and one in 8 chosen; the chosen bytes alone in aligned runs of 16). For
4096 x 4096, T = 8192, bf16: 4.3 GFLOP, 5 us of a Hopper GPU's matrix units, and 68 MB, 16 us of its memory, of
single neurons, or 17 MB, 4 us, of aligned runs.

The shape: a tiled product whose sum runs over tokens. Both operands lie token-major, so a tile of either is
loaded as BLOCK_K tokens x columns, and the product transposes the first. n_out x n_in is small (512 x 512)
and T long, so the tokens are split over SPLIT programs a tile to fill the device; each writes its partial sum
in fp32, and `sum_splits_kernel` adds them in a fixed order: no atomics, the same bits every run. Letting the last
program of a tile add them up, in one launch, took up to 1.43 times as long on an H200, since it reads the parts alone.

The processors are filled once: with one program each, or with PROGRAMS of fp32 operands, whose steps have only other
programs of their processor to hide their waits behind. So the parts take 4 BLOCK_M BLOCK_N bytes a program at most, in
the tiles of `_tiles` 9 MB on 132 processors, however many tokens there are. Of fp32 operands, BLOCK_K terms are summed
at a time and their sums added up: one chain of many multiply-adds errs more than a library's product does, and with
short chains no split has to be short.

Three ways to dy's columns, each where it was the fastest on an H200 at most shapes:
- aligned runs (GROUP > 1) are gathered inside the product, in 16-byte loads that the compiler pipelines;
- all columns are the library's product, which needs no gather;
- single neurons are gathered first, by `gather_columns`, and multiplied by the library: inside the product each of the
  n_in / BLOCK_N column tiles would gather dy again, in 2-byte loads that cannot be pipelined. (`fused=True` does
  that, to measure it.) The same for runs where x_sub is too wide for the first way.
A launch shape that `losia-pro tune` found to be faster than the second or the third is taken instead of them.
To change the tile, change `_tiles`, or add one to `candidates` and let `losia-pro tune` measure it: any powers of two
of at least 16 are correct; a stage of the pipeline takes (BLOCK_M + BLOCK_N) BLOCK_K e bytes of shared memory, and a
consumer GPU has 99 KiB in all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gathering import gathering_pays
from ..torch_ops import check_operands, product
from .gather_columns import gather_columns, hardware_run
from .indexing import INTERPRETED, needs_int64
from .tiles import Device, Tiles, device_of, fitting, load_tile, operand
from .tuned import lookup

PROGRAMS = 4  # a processor's, of fp32 operands


@triton.jit
def subnet_grad_kernel(
    dy_ptr,  # (T, out)
    x,  # (T, N): as load_tile takes it
    idx_ptr,  # (M,) int64: columns of dy, in aligned runs of GROUP
    out_ptr,  # (SPLIT, M, N) contiguous
    T,
    M,
    N,
    T_SPLIT,  # tokens each split sums over, a multiple of BLOCK_K
    stride_dt,
    stride_dc,
    stride_xt,
    stride_xc,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INT64: tl.constexpr,
    BULK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    split = tl.program_id(1)
    blocks_n = tl.cdiv(N, BLOCK_N)
    m0 = (tl.program_id(0) // blocks_n) * BLOCK_M
    n0 = (tl.program_id(0) % blocks_n) * BLOCK_N
    m, n, k = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    M = M // GROUP * GROUP  # tells the compiler that masks change between runs only
    column = tl.load(idx_ptr + m, mask=m < M, other=0)
    if INT64:
        k = k.to(tl.int64)
    else:
        column = column.to(tl.int32)
    if GROUP > 1:
        column = tl.max_contiguous(tl.multiple_of(column, GROUP), GROUP)
    first = split * T_SPLIT
    last = tl.minimum(first + T_SPLIT, T)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # What lies past T, M or N reads as zero on both sides, so nothing that is not chosen can leak a NaN.
    for start in range(first, last, BLOCK_K):
        t = start + k
        a = tl.load(
            dy_ptr + t[:, None] * stride_dt + column[None, :] * stride_dc,
            mask=(t[:, None] < T) & (m[None, :] < M),
            other=0.0,
        )
        b = load_tile(x, start, n0, T, N, stride_xt, stride_xc, BLOCK_K, BLOCK_N, INT64, BULK)
        if UPCAST:  # Triton's interpreter computes a wrong tl.dot of bf16
            a, b = a.to(tl.float32), b.to(tl.float32)
        if a.dtype == tl.float32:  # max_num_imprecise_acc: or Triton sums into acc all the same
            acc += tl.dot(tl.trans(a), b, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
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
    dy: Tensor,
    x_sub: Tensor,
    out_idx: Tensor,
    out_dtype: torch.dtype,
    group: int = 1,
    *,
    fused: bool | None = None,
) -> Tensor:
    """``dy[:, Y_S]^T x_S`` with fp32 accumulation, the same bits every run.

    ``dy`` ``(T, out)``, ``x_sub`` ``(T, n_in)``, ``out_idx`` ``(n_out,)`` int64; result ``(n_out, n_in)`` in
    ``out_dtype``. Both operands may have any strides. ``out_idx`` comes in aligned runs of ``group``; where
    that is the number of ``dy``'s columns, all of them are chosen, in order. ``fused`` decides whether this
    kernel gathers and multiplies or `gather_columns` and the library do: to measure.

    Raises:
        TypeError: a dtype other than fp32, bf16 or fp16, or operands of two dtypes.
    """
    check_operands("triton", dy, x_sub, out_dtype)
    tokens, n_out, n_in = dy.shape[0], out_idx.shape[0], x_sub.shape[1]
    if tokens == 0 or n_out == 0 or n_in == 0:
        return torch.zeros(n_out, n_in, dtype=out_dtype, device=dy.device)
    whole = group == n_out == dy.shape[1]
    run = hardware_run(group)
    tuned = None
    if run > 1:
        key = n_out, n_in, group if whole else run
        tuned = lookup(dy.device, "subnet_grad", dy.dtype, *key)
    if fused is None:
        fused = tuned is not None or (not whole and run > 1 and gathering_pays(n_out, n_in))
    if not fused:
        return product(dy if whole else gather_columns(dy, out_idx, group), x_sub, out_dtype)
    device = device_of(dy.device)
    tiles = Tiles(*(tuned or _tiles(dy.dtype, n_in, device)))
    blocks = triton.cdiv(n_out, tiles.m) * triton.cdiv(n_in, tiles.n)
    programs = device.processors * (PROGRAMS if dy.dtype == torch.float32 else 1)
    split_tokens = _split_tokens(tokens, blocks, tiles.k, programs)
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
            operand(x_sub, tiles.k, tiles.n, device.bulk),
            out_idx.contiguous(),
            parts,
            tokens,
            n_out,
            n_in,
            split_tokens,
            *dy.stride(),
            *x_sub.stride(),
            GROUP=run,
            BLOCK_M=tiles.m,
            BLOCK_N=tiles.n,
            BLOCK_K=tiles.k,
            INT64=needs_int64(dy, x_sub),
            BULK=device.bulk,
            UPCAST=INTERPRETED,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if splits > 1:
            sum_splits_kernel[(triton.cdiv(out.numel(), 1024),)](
                parts, out, out.numel(), splits, BLOCK=1024
            )
    return out.to(out_dtype)


def _tiles(dtype: torch.dtype, n_in: int, device: Device) -> Tiles:
    """The fastest tile of those tried on an H200, and smaller ones where shared memory is small. fp32 has no
    matrix units in IEEE precision, so fewer outputs a program."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 3)
    if device.memory < 160 * 1024:  # sm_86, sm_89, sm_120
        return Tiles(64, 64, 64, 4, 3) if n_in <= 64 else Tiles(64, 128, 64, 4, 3)
    return Tiles(64, 256, 64, 8, 4) if n_in > 128 else Tiles(64, 128, 64, 4, 4)


def candidates(dtype: torch.dtype, device: Device) -> list[Tiles]:
    """What `losia-pro tune` measures."""
    if dtype == torch.float32:
        shapes = [(64, 64, 32, 4, 3), (32, 64, 32, 4, 3), (64, 128, 32, 8, 3), (64, 64, 32, 8, 2)]
    else:
        shapes = [
            (64, 256, 64, 8, 4),
            (64, 256, 64, 8, 3),
            (64, 128, 64, 4, 4),
            (64, 128, 64, 4, 3),
            (64, 128, 64, 8, 4),
            (64, 64, 64, 4, 4),
            (64, 64, 64, 4, 3),
            (64, 128, 128, 8, 3),
            (128, 64, 64, 4, 4),
            (128, 128, 64, 8, 3),
            (128, 256, 64, 8, 3),
        ]
    return fitting(shapes, dtype, device)


def _split_tokens(tokens: int, blocks: int, block_k: int, programs: int) -> int:
    """Tokens per split: as many splits as make ``programs`` in all, of at least 4 steps each."""
    splits = max(1, min(programs // blocks, tokens // (4 * block_k)))
    return -(-tokens // (splits * block_k)) * block_k
