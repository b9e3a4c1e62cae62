"""Write compact subnets into dense weights, many layers in one launch:  W[out_idx[i], in_idx[j]] = subnet[i, j]

Bytes, for a subnet of n entries in fp32 and a weight of e bytes: 4 n read and n e written; the writes are scattered,
so memory moves every 32-byte sector that holds an entry, once in and once out. For LLaMA-2 7B at p = 1/8
in bf16: 101 M entries, 0.4 GB of subnets and 2 x 1.4 GB of sectors, 0.8 ms at 4.3 TB/s. No arithmetic.

The shape: layers differ in size, so a table in device memory says where each layer's four tensors lie and how large
they are, and another which layer and which part of it each program writes: BLOCK_R rows x BLOCK_C columns of its
subnet, neighbouring lanes on neighbouring columns. The tables depend on the tensors' addresses alone, which stay for
a whole training run: they are made once and kept. To change the part, change the constants: any powers of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_R = 4
BLOCK_C = 512

# A layer's row in the table.
WEIGHT, SUBNET, OUT_IDX, IN_IDX, N_OUT, N_IN, STRIDE_R, STRIDE_C = range(8)


@triton.jit
def write_back_kernel(
    layers_ptr,  # (layers, 8) int64: addresses, sizes and strides
    parts_ptr,  # (programs, 2) int32: layer, and which part of it
    weight_like,  # any tensor of the weights' dtype
    subnet_like,  # any tensor of the subnets' dtype
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    layer = layers_ptr + tl.load(parts_ptr + 2 * tl.program_id(0)) * 8
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
    value = value.to(weight_like.dtype.element_ty)
    tl.store(weight + row[:, None] + column[None, :], value, mask=mask)


Key = tuple[int | torch.dtype, ...]
_tables: dict[Key, tuple[Tensor, Tensor]] = {}
_KEPT = 16  # models whose tables are kept


def write_back_(
    weights: Sequence[Tensor],
    subnets: Sequence[Tensor],
    out_idx: Sequence[Tensor],
    in_idx: Sequence[Tensor],
) -> None:
    """``W[Y_S][:, X_S] = subnet`` for each of several layers, rounded to nearest in the weight's dtype.

    Weights may have any strides; subnets and indices are contiguous. One launch for each pair of dtypes.

    Raises:
        ValueError: a subnet or an index that is not contiguous.
    """
    pairs: dict[tuple[torch.dtype, torch.dtype, int], list[int]] = {}
    for k, (weight, subnet) in enumerate(zip(weights, subnets, strict=True)):
        where = -1 if weight.device.index is None else weight.device.index
        pairs.setdefault((weight.dtype, subnet.dtype, where), []).append(k)
    for layers in pairs.values():
        chosen = [[group[k] for k in layers] for group in (weights, subnets, out_idx, in_idx)]
        _launch(*chosen)


def _launch(
    weights: list[Tensor], subnets: list[Tensor], out_idx: list[Tensor], in_idx: list[Tensor]
) -> None:
    columns = zip(weights, subnets, out_idx, in_idx, strict=True)
    key: Key = (
        weights[0].dtype,
        *(
            v
            for w, s, o, i in columns
            for v in (w.data_ptr(), s.data_ptr(), o.data_ptr(), i.data_ptr(), *s.shape, *w.stride())
        ),
    )
    tables = _tables.get(key)
    if tables is None:
        for what, group in (("subnet", subnets), ("out_idx", out_idx), ("in_idx", in_idx)):
            if strided := [t.stride() for t in group if not t.is_contiguous()]:
                raise ValueError(f"{what} must be contiguous, got strides {strided[0]}")
        while len(_tables) >= _KEPT:
            _tables.pop(next(iter(_tables)))
        tables = _tables[key] = _make_tables(key[1:], weights[0].device)
    layers, parts = tables
    if parts.shape[0] == 0:
        return
    with torch.cuda.device_of(weights[0]):
        write_back_kernel[(parts.shape[0],)](
            layers, parts, weights[0], subnets[0], BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=4
        )


def _make_tables(rows: Key, device: torch.device) -> tuple[Tensor, Tensor]:
    layers = torch.tensor(rows, dtype=torch.int64).view(-1, 8)
    n_out, n_in = layers[:, N_OUT], layers[:, N_IN]
    n_parts = -(-n_out // BLOCK_R) * -(-n_in // BLOCK_C)
    layer = torch.repeat_interleave(torch.arange(len(layers)), n_parts)
    first = (n_parts.cumsum(0) - n_parts)[layer]
    parts = torch.stack([layer, torch.arange(len(layer)) - first], 1).to(torch.int32)
    return layers.to(device), parts.contiguous().to(device)
