"""Tables in device memory for one launch over many layers: where each subnet lies, and who writes which part of it.

A layer is a row of nine int64: the addresses of its weight, subnet, ``out_idx`` and ``in_idx``, the subnet's rows and
columns, the weight's strides in elements, and how many entries the subnets before it have. A part is two int32: a
layer, and which block of its subnet. Both depend on the tensors' addresses, sizes and dtypes alone, which stay for a
whole training run: tables are made once and kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LERPS = {  # of which dtype the others may be
    torch.bfloat16: (torch.bfloat16,),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
}

KEPT = 128  # sets of layers whose tables are kept; a sharded model has one for each block


class Table(NamedTuple):
    """What one launch needs: layers of one device and one pair of dtypes, in parts of ``rows`` x ``columns``."""

    layers: Tensor
    parts: Tensor
    rows: int
    columns: int
    weight: Tensor  # an empty one of the weights' dtype and device
    subnet: Tensor


_kept: dict[Any, list[Table]] = {}


def tables(
    weights: Sequence[Tensor],
    subnets: Sequence[Tensor],
    out_idx: Sequence[Tensor],
    in_idx: Sequence[Tensor],
    part: int,
    check: Callable[[], None],
) -> list[Table]:
    """The tables for parts of ``part`` entries, a power of two, in rows as wide as the widest subnet up to half of
    that; ``check`` is called before new ones are made.

    Raises:
        ValueError: a subnet or an index that is not contiguous.
    """
    check_contiguous(subnet=subnets, out_idx=out_idx, in_idx=in_idx)
    key = part, *[
        (w.data_ptr(), s.data_ptr(), o.data_ptr(), i.data_ptr(), s.shape, w.stride(), w.dtype, s.dtype)
        for w, s, o, i in zip(weights, subnets, out_idx, in_idx, strict=True)
    ]  # fmt: skip
    found = _kept.get(key)
    if found is None:
        check()
        pairs: dict[Any, list[int]] = {}
        first = [0]
        for k, (w, s) in enumerate(zip(weights, subnets, strict=True)):
            pairs.setdefault((w.device, w.dtype, s.dtype), []).append(k)
            first.append(first[-1] + s.numel())
        while len(_kept) >= KEPT:
            _kept.pop(next(iter(_kept)))
        found = _kept[key] = []
        for chosen in pairs.values():
            layers = [[group[k] for k in chosen] for group in (weights, subnets, out_idx, in_idx)]
            found.append(_make(layers, [first[k] for k in chosen], part))
    return found


def _make(group: list[list[Tensor]], first: list[int], part: int) -> Table:
    weights, subnets, _, _ = group
    layers = torch.tensor(
        [
            [w.data_ptr(), s.data_ptr(), o.data_ptr(), i.data_ptr(), *s.shape, *w.stride(), n]
            for w, s, o, i, n in zip(*group, first, strict=True)
        ]
    )
    n_out, n_in = layers[:, 4], layers[:, 5]
    columns = 1
    while columns < min(part // 2, int(n_in.max())):
        columns *= 2
    rows = part // columns
    n_parts = -(-n_out // rows) * -(-n_in // columns)
    layer = torch.repeat_interleave(torch.arange(len(layers)), n_parts)
    before = (n_parts.cumsum(0) - n_parts)[layer]
    parts = torch.stack([layer, torch.arange(len(layer)) - before], 1).to(torch.int32)
    device = weights[0].device
    empty = (t[0].new_empty(0) for t in (weights, subnets))
    return Table(layers.to(device), parts.contiguous().to(device), rows, columns, *empty)


def adamw_tables(
    tensors: Sequence[Sequence[Tensor]],
    steps: Sequence[int],
    keys: Sequence[int],
    lr: float,
    betas: tuple[float, float],
    part: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one launch of AdamW needs, for parts of ``part`` entries.

    ``tensors`` are parameters, gradients, first and second moments, contiguous, on one device. Gradients are new in
    every step, so the first two tables are made anew, and sent without a wait:

    - a row of six int64 for each parameter: the addresses of the four, its entries, its key;
    - ``lr / (1 - beta1^t)`` and ``(1 - beta2^t)^-1/2`` in fp32 for its number of steps ``t``;
    - who does which part: two int32 each, a parameter, and which block of it.

    Raises:
        ValueError: a tensor that is not contiguous.
    """
    check_contiguous(
        parameter=tensors[0], gradient=tensors[1], exp_avg=tensors[2], exp_avg_sq=tensors[3]
    )
    device = tensors[0][0].device
    rows = [
        [*(t.data_ptr() for t in four), four[0].numel(), key]
        for *four, key in zip(*tensors, keys, strict=True)
    ]
    factors = [[lr / (1 - betas[0] ** t), (1 - betas[1] ** t) ** -0.5] for t in steps]
    return (
        torch.tensor(rows).to(device, non_blocking=True),
        torch.tensor(factors, dtype=torch.float32).to(device, non_blocking=True),
        _parts(tuple(p.numel() for p in tensors[0]), part, device),
    )


def lerp_tables(
    tensors: Sequence[Tensor],
    others: Sequence[Tensor],
    weight: float | Tensor,
    key: int,
    part: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one launch of an interpolation needs, for parts of ``part`` entries of tensors on one device, made anew
    and sent without a wait, as AdamW's:

    - a row of five int64 for each tensor: its address, the other's, its entries, those of the tensors before it, the
      key of all;
    - ``weight`` in fp32;
    - who does which part: two int32 each, a tensor, and which block of it.

    Raises:
        ValueError: a tensor that is not contiguous, and pairs of two sizes.
        TypeError: a pair of dtypes that is not in ``LERPS``, or not that of the first pair.
    """
    check_contiguous(tensor=tensors, other=others)
    rows, first = [], 0
    for t, other in zip(tensors, others, strict=True):
        if t.shape != other.shape:
            raise ValueError(
                f"other must be {tuple(t.shape)} as its tensor is, got {tuple(other.shape)}"
            )
        if other.dtype not in LERPS.get(t.dtype, ()):
            raise TypeError(
                "tensors must be in bf16 as their others are, or in fp32 with others in fp32, bf16 or fp16; "
                f"got {t.dtype} and {other.dtype}"
            )
        if (t.dtype, other.dtype) != (tensors[0].dtype, others[0].dtype):
            raise TypeError(
                f"all pairs must be in {tensors[0].dtype} and {others[0].dtype} as the first is, "
                f"got {t.dtype} and {other.dtype}"
            )
        rows.append([t.data_ptr(), other.data_ptr(), t.numel(), first, key])
        first += t.numel()
    device = tensors[0].device
    return (
        torch.tensor(rows).to(device, non_blocking=True),
        torch.as_tensor(weight, dtype=torch.float32).to(device, non_blocking=True),
        _parts(tuple(t.numel() for t in tensors), part, device),
    )


def check_contiguous(**kinds: Sequence[Tensor | None]) -> None:
    """Raise a ValueError, with their name, for tensors that a kernel would read wrongly."""
    for what, kind in kinds.items():
        if strided := [t.stride() for t in kind if t is not None and not t.is_contiguous()]:
            raise ValueError(f"{what} must be contiguous, got strides {strided[0]}")


@functools.lru_cache(maxsize=KEPT)
def _parts(sizes: tuple[int, ...], part: int, device: torch.device) -> Tensor:
    counts = torch.tensor([-(-n // part) for n in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    block = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, block], 1).to(torch.int32).to(device)
