"""What every kernel's host side decides: 32-bit or 64-bit offsets, and whether it is interpreted."""

from __future__ import annotations

import os

from torch import Tensor

# Triton reads the same variable when a kernel is defined; it then runs on the CPU, as NumPy.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_INT32_LIMIT = 2**31


def needs_int64(*tensors: Tensor) -> bool:
    """Whether any element of any of the tensors lies 2^31 or more elements past its first.

    Offsets of 32 bits halve the registers and the arithmetic of a gather, which has an address for each
    element; past 2^31 they would wrap.
    """
    return any(_span(t) >= _INT32_LIMIT for t in tensors)


def _span(t: Tensor) -> int:
    """The distance, in elements, between a tensor's first element and its last in memory."""
    return sum(
        (size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True) if size
    )
