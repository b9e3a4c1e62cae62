"""How the changed entries of one linear lie in a delta's file.

In the smaller of two forms, with absolute values in the weight's dtype:

- blocks: ``<name>.out_idx.<k>``, ``<name>.in_idx.<k>`` (int64) and ``<name>.values.<k>``, one for each place
  its subnet was in;
- bitmap: ``<name>.mask`` (uint8, one bit an entry, row-major, least significant bit first) and
  ``<name>.values``, the marked entries in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .base import Block
from .sharded import Index

if TYPE_CHECKING:
    from .views import AnyLinear

FORMS = ("blocks", "bitmap")


def encode(
    weight: Tensor, blocks: list[Block], form: str | None = None
) -> tuple[str, dict[str, Tensor]]:
    """The form, by default the smaller one, and the tensors of the entries of ``weight`` in any of the blocks."""
    mask = torch.zeros(weight.shape, dtype=torch.bool, device="cpu")
    block_bytes = 0
    for rows, columns in blocks:
        mask[rows[:, None], columns] = True
        n = rows.numel() * columns.numel()
        block_bytes += n * weight.element_size() + 8 * (rows.numel() + columns.numel())
    bitmap_bytes = int(mask.sum()) * weight.element_size() + -(-mask.numel() // 8)
    if form == "blocks" or form is None and block_bytes <= bitmap_bytes:
        parts = {}
        for k, (rows, columns) in enumerate(blocks):
            on = rows.to(weight.device), columns.to(weight.device)
            parts[f"out_idx.{k}"], parts[f"in_idx.{k}"] = rows.clone(), columns.clone()
            parts[f"values.{k}"] = weight[on[0][:, None], on[1]].cpu().contiguous()
        return "blocks", parts
    bits = nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    packed = (bits << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(1, dtype=torch.uint8)
    return "bitmap", {"mask": packed, "values": weight[mask.to(weight.device)].cpu()}


def _unpack(packed: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> places & 1).bool().flatten()


def check_entries(
    linear: AnyLinear, form: str, name: str, tensors: Mapping[str, Tensor]
) -> set[str]:
    """The names of one module's tensors; a ValueError if one is missing or does not fit the module."""
    known: set[str] = set()
    weight = linear.weight

    def take(part: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
        key = f"{name}.{part}"
        if key not in tensors:
            raise ValueError(f"malformed delta: {key} is missing")
        t = tensors[key]
        fits = t.dim() == len(shape) and all(
            n in (None, m) for n, m in zip(shape, t.shape, strict=True)
        )
        if t.dtype != dtype or not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(
                f"malformed delta: {key} is {t.dtype} {tuple(t.shape)}, not {dtype} ({wanted})"
            )
        known.add(key)
        return t

    def take_indices(part: str, size: int) -> int:
        idx = take(part, torch.int64, None)
        ordered = bool((idx[1:] > idx[:-1]).all())
        if not (len(idx) and ordered and int(idx[0]) >= 0 and int(idx[-1]) < size):
            raise ValueError(
                f"malformed delta: {name}.{part} is not of ascending indices below {size}"
            )
        return len(idx)

    if form == "bitmap":
        bits = _unpack(take("mask", torch.uint8, -(-weight.numel() // 8)))
        if bool(bits[weight.numel() :].any()):
            raise ValueError(f"malformed delta: {name}.mask marks entries beyond the last")
        take("values", weight.dtype, int(bits.sum()))
    else:
        k = 0
        while k == 0 or any(f"{name}.{p}.{k}" in tensors for p in ("out_idx", "in_idx", "values")):
            n_out = take_indices(f"out_idx.{k}", weight.shape[0])
            n_in = take_indices(f"in_idx.{k}", weight.shape[1])
            take(f"values.{k}", weight.dtype, n_out, n_in)
            k += 1
    if f"{name}.bias" in tensors:
        if linear.bias is None:
            raise ValueError(f"the delta holds a bias of {name}, which has none in this model")
        take("bias", linear.bias.dtype, *linear.bias.shape)
    return known


def decode(weight: Tensor, name: str, tensors: Mapping[str, Tensor]) -> list[tuple[Index, Tensor]]:
    """One module's entries, checked before: where in ``weight``, and their values, on its device."""
    device = weight.device
    if f"{name}.mask" in tensors:
        bits = _unpack(tensors[f"{name}.mask"])
        mask = bits[: weight.numel()].view(weight.shape)
        return [(mask.to(device), tensors[f"{name}.values"].to(device))]
    entries: list[tuple[Index, Tensor]] = []
    while f"{name}.out_idx.{len(entries)}" in tensors:
        rows, columns, values = (
            tensors[f"{name}.{part}.{len(entries)}"].to(device)
            for part in ("out_idx", "in_idx", "values")
        )
        entries.append(((rows[:, None], columns), values))
    return entries


def bounds(at: Index) -> Block:
    """The rows and columns of entries: a block that holds them all."""
    if isinstance(at, tuple):
        return at[0].flatten(), at[1]
    return at.any(1).nonzero().flatten(), at.any(0).nonzero().flatten()
