"""Which neurons a subnet has: at random at first, then moved, its exact values kept where it stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import sharded

if TYPE_CHECKING:
    from .linear import SubnetLinear


@torch.no_grad()
def select_together(
    modules: Sequence[SubnetLinear], out_idx: Sequence[Tensor], in_idx: Tensor
) -> None:
    """``SubnetLinear.select`` for all the linears that share their inputs; one that shares none is alone."""
    rows = [checked_idx(m, "out_idx", idx) for m, idx in zip(modules, out_idx, strict=True)]
    columns = [checked_idx(m, "in_idx", in_idx) for m in modules]
    kept = []
    for m, out, into in zip(modules, rows, columns, strict=True):
        m.write_back()
        at_row, row_stays = _positions(out, m.out_idx)
        at_column, column_stays = _positions(into, m.in_idx)
        subnet = sharded.whole(m.subnet)
        kept.append((subnet[at_row[:, None], at_column], row_stays[:, None] & column_stays))
    for m, out, into, (exact, stays) in zip(modules, rows, columns, kept, strict=True):
        m.out_idx.copy_(out)
        m.in_idx.copy_(into)
        m._guard.selected()
        sharded.assign_(m.subnet, torch.where(stays, exact, m._block()))
        m.mark_written()
        if m.touched.blocks:  # it is of a model that is attached
            m.touched.add(m.weight, m.out_idx, m.in_idx)


def random_neurons(
    size: int, n: int, group: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """``n`` of ``size`` neurons in aligned runs of ``group``, sorted, on the CPU."""
    runs = torch.randperm(size // group, generator=generator, device="cpu")[: n // group]
    return (runs.sort().values[:, None] * group + torch.arange(group, device=runs.device)).flatten()


def groups_of(features: tuple[int, int], chosen: tuple[int, int], group: int) -> tuple[int, int]:
    """The aligned runs in which so many of the outputs and of the inputs are chosen: where it is all, one of all."""
    (out, into), (n_out, n_in) = features, chosen
    return out if n_out == out else group, into if n_in == into else group


def are_runs(idx: Tensor, group: int) -> bool:
    """Whether indices come in aligned runs ``[k group, (k + 1) group)``; reads them on the host."""
    runs = idx.view(-1, group)
    first = runs[:, :1]
    whole = first + torch.arange(group, device=idx.device)
    return group == 1 or (not bool((first % group).any()) and torch.equal(runs, whole))


def checked_idx(module: SubnetLinear, name: str, idx: Tensor) -> Tensor:
    """Indices for a linear's ``out_idx`` or ``in_idx``, sorted, or a ValueError that says what is wrong with them."""
    current, side = getattr(module, name), ("out_idx", "in_idx").index(name)
    size, group = module.weight.shape[side], module.groups[side]
    if idx.dtype != torch.int64 or idx.shape != current.shape:
        raise ValueError(
            f"{name} must be int64 of shape {tuple(current.shape)}, got {idx.dtype} {tuple(idx.shape)}"
        )
    if idx.device != current.device:
        raise ValueError(f"{name} must be on {current.device}, got {idx.device}")
    idx = idx.sort().values
    if int(idx[0]) < 0 or int(idx[-1]) >= size:
        raise ValueError(f"{name} must be within [0, {size}), got {int(idx[0])}..{int(idx[-1])}")
    if bool((idx[1:] == idx[:-1]).any()):
        raise ValueError(f"{name} holds duplicates; each neuron can be chosen once")
    if not are_runs(idx, group):
        raise ValueError(
            f"{name} must be aligned runs of {group} neurons, got {idx.tolist()[:9]}..."
        )
    return idx


def _positions(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """For each of ``new``, where it stands in the sorted ``old`` (clamped), and whether it is there."""
    at = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
    return at, old[at] == new
