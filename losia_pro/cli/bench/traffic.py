"""What an operation cannot do without: bytes of memory and floating-point operations.

The least time is the larger of bytes over the device's copy bandwidth and flops over its matrix-product
rate, both measured in the same run. Memory moves whole sectors (32 bytes on a GPU, a cache line of 64 on a CPU):
of a gathered matrix every sector that holds a chosen column counts, in each row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class Limits:
    """A device's measured rates: bytes a second, read and written together, and flops a second."""

    bandwidth: float
    flops: float
    sector: int
    l2: int


@dataclass(frozen=True)
class Traffic:
    bytes: float
    flops: float

    def least_us(self, limits: Limits) -> float:
        return 1e6 * max(self.bytes / limits.bandwidth, self.flops / limits.flops)


def touched(idx: Tensor, element: int, features: int, sector: int) -> int:
    """Bytes of one row of ``features`` columns that are moved to read the columns ``idx``."""
    sectors = int((idx * element // sector).unique().numel())
    return min(sectors * sector, features * element)


def gather_columns(tokens: int, row: int, n_in: int, element: int) -> Traffic:
    """``x[:, X_S]``: ``row`` touched bytes of each token read, the chosen columns written."""
    return Traffic(tokens * (row + n_in * element) + n_in * INDEX, 0)


def subnet_grad(
    tokens: int, row: int, n_out: int, n_in: int, element: int, result: int = 4
) -> Traffic:
    """``dy[:, Y_S]^T x_S``: ``row`` touched bytes of ``dy`` and all of ``x_S`` read, the result written;
    ``2 T n_out n_in`` flops."""
    moved = tokens * (row + n_in * element) + n_out * n_in * result + n_out * INDEX
    return Traffic(moved, 2 * tokens * n_out * n_in)


def importance_update(tokens: int, out: int, into: int, element: int, score: int) -> Traffic:
    """``dy``, ``x`` and ``W`` read, importance and uncertainty, of ``score`` bytes an entry, read and
    written; ``2 T out in`` flops of the product."""
    moved = tokens * (out + into) * element + out * into * (element + 4 * score)
    return Traffic(moved, 2 * tokens * out * into)


def write_back(row: int, n_out: int, n_in: int, subnet: int) -> Traffic:
    """One layer: the subnet read, ``row`` touched bytes of each chosen row of ``W`` written. A sector that
    is written in part costs some memories a read too, which is not counted."""
    return Traffic(n_out * (n_in * subnet + row) + (n_out + n_in) * INDEX, 0)


def adamw(entries: int) -> Traffic:
    """A step on bf16 tensors: parameter, gradient and two moments read, all but the gradient written."""
    return Traffic(14 * entries, 0)


def lerp(entries: int, element: int, other: int) -> Traffic:
    """Tensors and others read, tensors written."""
    return Traffic(entries * (2 * element + other), 0)


def dense_gradient(tokens: int, out: int, into: int, element: int) -> Traffic:
    """``dy^T x`` alone, in the operands' dtype."""
    return Traffic((tokens * (out + into) + out * into) * element, 2 * tokens * out * into)
