"""Write compact subnets into dense weights, many layers in one launch:  W[out_idx[i], in_idx[j]] = subnet[i, j]

Bytes, for a subnet of n entries in fp32 and a weight of e bytes: 4 n read and n e written; the writes are scattered,
so memory moves every 32-byte sector that holds an entry, once in and once out. For LLaMA-2 7B at p = 1/8
in bf16: 101 M entries, 0.4 GB of subnets and 2 x 1.4 GB of sectors, 0.8 ms at 4.3 TB/s. No arithmetic, but for about
25 integer operations an entry where it is rounded stochastically (`losia_pro/rounding.py`).

The shape: a program writes one part, PART entries of a layer's subnet in rows as wide as the subnets need, neighbouring
lanes on neighbouring columns; tables in device memory say which (`losia_pro/tables.py`). To change it, change
PART: any power of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tables import tables
from .rounding import noise, to_bf16

PART = 2048


@triton.jit(do_not_specialize=["key"])
def write_back_kernel(
    layers_ptr,  # (layers, 9) int64: addresses, sizes, strides, entries before
    parts_ptr,  # (programs, 2) int32: layer, and which part of it
    weight_like,  # any tensor of the weights' dtype
    subnet_like,  # any tensor of the subnets' dtype
    key,
    STOCHASTIC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    layer = layers_ptr + tl.load(parts_ptr + 2 * tl.program_id(0)) * 9
    part = tl.load(parts_ptr + 2 * tl.program_id(0) + 1)
    weight = tl.load(layer + 0).to(weight_like.dtype)
    subnet = tl.load(layer + 1).to(subnet_like.dtype)
    out_idx = tl.load(layer + 2).to(tl.pointer_type(tl.int64))
    in_idx = tl.load(layer + 3).to(tl.pointer_type(tl.int64))
    n_out, n_in = tl.load(layer + 4), tl.load(layer + 5)
    column_parts = tl.cdiv(n_in, BLOCK_C)
    i = (part // column_parts) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = (part % column_parts) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.load(out_idx + i, mask=i < n_out, other=0) * tl.load(layer + 6)
    column = tl.load(in_idx + j, mask=j < n_in, other=0) * tl.load(layer + 7)
    mask = (i[:, None] < n_out) & (j[None, :] < n_in)
    value = tl.load(subnet + i[:, None] * n_in + j[None, :], mask=mask)
    if STOCHASTIC:
        n = tl.load(layer + 8) + i[:, None] * n_in + j[None, :]
        value = to_bf16(value, noise(n, key))
    value = value.to(weight_like.dtype.element_ty)
    tl.store(weight + row[:, None] + column[None, :], value, mask=mask)


def write_back_(
    weights: Sequence[Tensor],
    subnets: Sequence[Tensor],
    out_idx: Sequence[Tensor],
    in_idx: Sequence[Tensor],
    check: Callable[[], None],
    key: int | None = None,
) -> None:
    """``W[Y_S][:, X_S] = subnet`` for each of several layers, rounded to nearest in the weight's dtype; with a
    ``key``, fp32 stochastically to bf16.

    Weights may have any strides; subnets and indices are contiguous. One launch for each pair of dtypes. ``check``
    judges layers that were not written before.

    Raises:
        ValueError: a subnet or an index that is not contiguous.
    """
    for table in tables(weights, subnets, out_idx, in_idx, PART, check):
        n_parts = table.parts.shape[0]
        pair = table.weight.dtype, table.subnet.dtype
        stochastic = key is not None and pair == (torch.bfloat16, torch.float32)
        if n_parts:
            with torch.cuda.device_of(table.layers):
                write_back_kernel[(n_parts,)](
                    table.layers, table.parts, table.weight, table.subnet, key or 0,
                    STOCHASTIC=stochastic, BLOCK_R=table.rows, BLOCK_C=table.columns, num_warps=8,
                )  # fmt: skip
