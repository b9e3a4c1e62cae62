"""A profiled layer's step:  g = scale (dy^T x + grad);  I = importance of (g, W);  then, in place,

    importance  = beta1 importance  + (1 - beta1) I
    uncertainty = beta2 uncertainty + (1 - beta2) |I - importance|

Flops: 2 T out in. Bytes, e an element of dy, x and W: T (out + in) e and, for each of out x in entries, e of W and
4 k of importance and uncertainty, read and written with k bytes each (2 for 16-bit weights, else 4). For 4096 x 4096,
T = 8192, all in bf16: 275 GFLOP, 0.35 ms of a Hopper GPU's matrix units, and 0.30 GB, 0.07 ms of its memory: the
product decides, and the epilogue costs as much of its own time as does not overlap with another program's product.

The shape: a tiled product whose sum runs over tokens, both operands read token-major by bulk copies. The gradient
stays in registers: the epilogue reads W, importance and uncertainty of its tile, half of it at a time to keep to
the registers, and writes the latter two, so nothing of W's size is allocated. As many programs as processors go
through the tiles in turn, so that the operands of the next tile are on their way during an epilogue. Tiles are taken
in columns of GROUP_M, so that those in flight share operands in L2. To change the tile, change `_tiles`, or add one
to `candidates` and let `losia-pro tune` measure it: any powers of two of at least 16 are correct; a stage takes
(BLOCK_M + BLOCK_N) BLOCK_K e bytes of shared memory.

Of fp32 operands, BLOCK_K terms are summed at a time and their sums added up: one chain of T multiply-adds errs more
than a library's product does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import VARIANTS
from ..tables import check_contiguous
from ..torch_ops import PRODUCT_DTYPES
from .indexing import INTERPRETED, needs_int64
from .tiles import Device, Tiles, device_of, fitting, load_tile, operand
from .tuned import lookup

GROUP_M = 8


@triton.jit
def _update_half(
    g,  # (BLOCK_M, BLOCK_N / 2) of the gradient, at rows m and columns n
    m,
    n,
    M,
    N,
    importance_ptr,
    uncertainty_ptr,
    weight_ptr,
    grad_ptr,
    stride_wm,
    stride_wn,
    beta1,
    rest1,
    beta2,
    rest2,
    scale,
    VARIANT: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    INT64: tl.constexpr,
):
    if INT64:
        m, n = m.to(tl.int64), n.to(tl.int64)
    here = m[:, None] * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    if HAS_GRAD:
        g += tl.load(grad_ptr + here, mask=inside, other=0.0)
    weight = weight_ptr + m[:, None] * stride_wm + n[None, :] * stride_wn
    gw = g * scale * tl.load(weight, mask=inside, other=0.0).to(tl.float32)
    if VARIANT == 0:
        current = tl.abs(gw - 0.5 * gw * gw)
    elif VARIANT == 1:
        current = tl.abs(gw)
    else:
        current = gw * gw
    smoothed = tl.load(importance_ptr + here, mask=inside, other=0.0).to(tl.float32)
    smoothed = beta1 * smoothed + rest1 * current
    tl.store(importance_ptr + here, smoothed.to(importance_ptr.dtype.element_ty), mask=inside)
    uncertain = tl.load(uncertainty_ptr + here, mask=inside, other=0.0).to(tl.float32)
    uncertain = beta2 * uncertain + rest2 * tl.abs(current - smoothed)
    tl.store(uncertainty_ptr + here, uncertain.to(uncertainty_ptr.dtype.element_ty), mask=inside)


@triton.jit
def importance_update_kernel(
    dy,  # (T, M): as load_tile takes it
    x,  # (T, N): as load_tile takes it
    importance_ptr,  # (M, N), contiguous; in place
    uncertainty_ptr,  # (M, N), contiguous; in place
    weight_ptr,  # (M, N), any strides
    grad_ptr,  # (M, N), contiguous; unused unless HAS_GRAD
    T,
    M,
    N,
    stride_dt,
    stride_dc,
    stride_xt,
    stride_xc,
    stride_wm,
    stride_wn,
    beta1,
    rest1,
    beta2,
    rest2,
    scale,
    VARIANT: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INT64: tl.constexpr,
    BULK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, PROGRAMS, flatten=True):
        above = tile // (GROUP_M * blocks_n) * GROUP_M
        height = tl.minimum(blocks_m - above, GROUP_M)
        within = tile % (GROUP_M * blocks_n)
        m0 = (above + within % height) * BLOCK_M
        n0 = (within // height) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for t in range(0, T, BLOCK_K):
            a = load_tile(dy, t, m0, T, M, stride_dt, stride_dc, BLOCK_K, BLOCK_M, INT64, BULK)
            b = load_tile(x, t, n0, T, N, stride_xt, stride_xc, BLOCK_K, BLOCK_N, INT64, BULK)
            if UPCAST:  # Triton's interpreter computes a wrong tl.dot of bf16
                a, b = a.to(tl.float32), b.to(tl.float32)
            if a.dtype == tl.float32:  # max_num_imprecise_acc: or Triton sums into acc all the same
                acc += tl.dot(tl.trans(a), b, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
            else:
                acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N // 2)
        _update_half(
            left, m, n, M, N, importance_ptr, uncertainty_ptr, weight_ptr, grad_ptr,
            stride_wm, stride_wn, beta1, rest1, beta2, rest2, scale, VARIANT, HAS_GRAD, INT64,
        )  # fmt: skip
        _update_half(
            right, m, n + BLOCK_N // 2, M, N, importance_ptr, uncertainty_ptr, weight_ptr, grad_ptr,
            stride_wm, stride_wn, beta1, rest1, beta2, rest2, scale, VARIANT, HAS_GRAD, INT64,
        )  # fmt: skip


def importance_update_(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    dy: Tensor,
    x: Tensor,
    grad: Tensor | None,
    beta1: float,
    beta2: float,
    variant: str,
    scale: float = 1.0,
) -> None:
    """One step of smoothed importance and uncertainty, in place; ``torch_ops.importance_update_`` in one kernel.

    ``importance`` and ``uncertainty`` are ``(out, in)`` in fp32 or bf16, ``grad`` is so in fp32, all contiguous;
    ``weight`` is ``(out, in)``, and ``dy`` ``(T, out)`` and ``x`` ``(T, in)`` are of one dtype, with any strides.

    Raises:
        TypeError: operands of two dtypes, or of one other than fp32, bf16 and fp16; fp64 importance.
        ValueError: ``importance``, ``uncertainty`` or ``grad`` is not contiguous.
    """
    if (
        dy.dtype != x.dtype
        or dy.dtype not in PRODUCT_DTYPES
        or importance.dtype not in PRODUCT_DTYPES
    ):
        raise TypeError(
            "the triton importance_update_ takes dy and x of one dtype, fp32, bf16 or fp16, and such "
            f"importance; got {dy.dtype}, {x.dtype} and {importance.dtype}; use impl='torch'"
        )
    check_contiguous(importance=[importance], uncertainty=[uncertainty], grad=[grad])
    (n_out, n_in), tokens = weight.shape, dy.shape[0]
    if weight.numel() == 0:
        return
    device = device_of(dy.device)
    tuned = lookup(dy.device, "importance_update_", dy.dtype, n_out, n_in)
    tiles = Tiles(*(tuned or _tiles(dy.dtype, n_out, n_in, device)))
    n_tiles = triton.cdiv(n_out, tiles.m) * triton.cdiv(n_in, tiles.n)
    programs = min(device.processors, n_tiles)
    with torch.cuda.device_of(weight):
        importance_update_kernel[(programs,)](
            operand(dy, tiles.k, tiles.m, device.bulk),
            operand(x, tiles.k, tiles.n, device.bulk),
            importance,
            uncertainty,
            weight,
            importance if grad is None else grad,
            tokens,
            n_out,
            n_in,
            *dy.stride(),
            *x.stride(),
            *weight.stride(),
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            scale,
            VARIANT=VARIANTS.index(variant),
            HAS_GRAD=grad is not None,
            PROGRAMS=programs,
            GROUP_M=GROUP_M,
            BLOCK_M=tiles.m,
            BLOCK_N=tiles.n,
            BLOCK_K=tiles.k,
            INT64=needs_int64(weight, dy, x),
            BULK=device.bulk,
            UPCAST=INTERPRETED,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def _tiles(dtype: torch.dtype, n_out: int, n_in: int, device: Device) -> Tiles:
    """fp32 has no matrix units in IEEE precision, so fewer entries per program; and where large tiles would
    leave most processors idle, small ones."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 3)
    if device.memory < 160 * 1024:  # sm_86, sm_89, sm_120
        return Tiles(128, 128, 32, 8, 3)
    if 2 * triton.cdiv(n_out, 128) * triton.cdiv(n_in, 256) < device.processors:
        return Tiles(64, 64, 64, 4, 4)
    return Tiles(128, 256, 64, 8, 3)


def candidates(dtype: torch.dtype, device: Device) -> list[Tiles]:
    """What `losia-pro tune` measures."""
    if dtype == torch.float32:
        shapes = [(64, 64, 32, 4, 3), (64, 128, 32, 8, 3), (128, 64, 32, 8, 3), (64, 64, 32, 8, 2)]
    else:
        shapes = [
            (128, 256, 64, 8, 3),
            (256, 128, 64, 8, 3),
            (128, 128, 64, 8, 3),
            (128, 128, 64, 4, 3),
            (128, 128, 32, 8, 3),
            (64, 128, 64, 4, 4),
            (64, 128, 64, 4, 3),
            (64, 64, 64, 4, 4),
        ]
    return fitting(shapes, dtype, device)
