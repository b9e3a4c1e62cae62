"""How a product's programs read their operands, and what they know of the device.

Both operands of a gradient lie token-major, ``(T, columns)``, and are read as tiles of BLOCK_K tokens x columns. On
sm_90 and sm_100 a tile comes by a bulk copy, which needs neither registers nor address arithmetic; elsewhere, where
Triton does not pipeline bulk copies, by ordinary loads.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tiles(NamedTuple):
    """A launch's shape: columns of dy, columns of x, tokens a step, warps, steps in flight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Device(NamedTuple):
    """``processors``: multiprocessors; ``memory``: bytes of shared memory that a program may have; ``bulk``:
    whether it has a copy engine for tiles."""

    processors: int
    memory: int
    bulk: bool


@functools.cache
def device_of(device: torch.device) -> Device:
    """What the kernels' host side needs to know of a device."""
    if device.type != "cuda":  # interpreted: enough programs to take every path
        return Device(4, 227 * 1024, True)
    p = torch.cuda.get_device_properties(device)
    memory = p.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Device(p.multi_processor_count, memory, p.major in (9, 10))


def fitting(
    shapes: list[tuple[int, int, int, int, int]], dtype: torch.dtype, device: Device
) -> list[Tiles]:
    """Those whose steps in flight fit the device's shared memory."""
    tiles = [Tiles(*shape) for shape in shapes]
    element = dtype.itemsize
    return [t for t in tiles if t.stages * (t.m + t.n) * t.k * element <= device.memory]


@triton.jit
def load_tile(
    operand,  # (T, N): a descriptor of blocks (BLOCK_K, BLOCK_N) where BULK, else a pointer
    t0,
    n0,
    T,
    N,
    stride_t,
    stride_n,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INT64: tl.constexpr,
    BULK: tl.constexpr,
):
    """The tile (BLOCK_K, BLOCK_N) at token t0 and column n0; what lies past T or N reads as zero."""
    if BULK:
        return operand.load([t0, n0])
    else:
        t, n = t0 + tl.arange(0, BLOCK_K), n0 + tl.arange(0, BLOCK_N)
        mask = (t[:, None] < T) & (n[None, :] < N)
        if INT64:
            t, n = t.to(tl.int64), n.to(tl.int64)
        return tl.load(
            operand + t[:, None] * stride_t + n[None, :] * stride_n, mask=mask, other=0.0
        )


def operand(t: Tensor, tokens: int, columns: int, bulk: bool) -> Any:
    """A matrix as ``load_tile`` takes it, for tiles of ``tokens`` x ``columns``.

    Bulk copies need rows that begin at multiples of 16 bytes; a matrix of which they don't is copied first. One
    without rows is never read, but a descriptor has to be of something.
    """
    if not bulk:
        return t
    if not t.shape[0]:
        t = t.new_empty(1, t.shape[1])
    unit = 16 // t.element_size()
    aligned = t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) % unit == 0
    if not aligned or t.data_ptr() % 16:
        rows = torch.empty(
            t.shape[0], -(-t.shape[1] // unit) * unit, dtype=t.dtype, device=t.device
        )
        t = rows[:, : t.shape[1]].copy_(t)
    return TensorDescriptor(t, list(t.shape), [t.stride(0), 1], [tokens, columns])
