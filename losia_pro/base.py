"""The base model's values of all that training may change: an exact record, and the way back to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from . import sharded

if TYPE_CHECKING:
    from .controller import Losia
    from .linear import SubnetLinear

Block = tuple[Tensor, Tensor]


class Touched:
    """Where one linear may differ from its base model, and what the base has there, on the CPU.

    Attributes:
        blocks: each place as ``(out_idx, in_idx)``, in the order they came.
        values: for each, the base's values of its entries that are in no place before it, row by row, in
            the weight's dtype: an entry is kept once, however often a subnet comes back to it.
        bias: the base's bias, if it may differ.
        swapped: whether the linear has the base's values now, and ``values`` and ``bias`` the tuned ones.
        loaded: whether the linear's state dict was loaded since.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.values: list[Tensor] = []
        self.bias: Tensor | None = None
        self.swapped = self.loaded = False

    @torch.no_grad()
    def add(self, weight: Tensor, out_idx: Tensor, in_idx: Tensor) -> None:
        """Record a place of ``weight`` ``(out, in)``, before anything is written there, unless all its entries
        are recorded."""
        self.blocks.append((out_idx.cpu().clone(), in_idx.cpu().clone()))
        at, new = self._entries(len(self.blocks) - 1, out_idx.device)
        values = sharded.read(weight, at)  # by all ranks, also if they differ: that is found later
        if new.any():
            self.values.append(values[new].cpu())
        else:
            self.blocks.pop()

    def add_bias(self, bias: Tensor) -> None:
        """Record the bias, unless it is recorded."""
        if self.bias is None:
            self.bias = sharded.whole(bias).cpu().clone()

    def _entries(self, k: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Block ``k`` as an index, and which of its entries are in no block before it."""
        out_idx, in_idx = (idx.to(device) for idx in self.blocks[k])
        seen = torch.zeros(len(out_idx), len(in_idx), dtype=torch.bool, device=device)
        for rows, columns in self.blocks[:k]:
            row, column = (
                torch.isin(out_idx, rows.to(device)),
                torch.isin(in_idx, columns.to(device)),
            )
            seen |= row[:, None] & column
        return (out_idx[:, None], in_idx), ~seen

    @torch.no_grad()
    def values_at(self, out_idx: Tensor, in_idx: Tensor) -> Tensor:
        """What the base has at a place all of whose entries are recorded; in the weight's dtype, on the indices'
        device."""
        shape, device = (len(out_idx), len(in_idx)), out_idx.device
        place = out_idx.cpu(), in_idx.cpu()
        for known, values in zip(self.blocks, self.values, strict=True):  # most often the only one
            if values.numel() == shape[0] * shape[1] and all(map(torch.equal, known, place)):
                return values.view(shape).to(device)
        found = self.values[-1].new_empty(shape, device=device)
        for k, values in enumerate(self.values):
            (rows, columns), new = self._entries(k, device)
            block = found.new_empty(new.shape).masked_scatter_(new, values.to(found))
            row, column = (_places(a, b) for a, b in ((rows[:, 0], out_idx), (columns, in_idx)))
            to, at = ((row[i][:, None], column[i]) for i in (1, 0))
            found[to] = torch.where(new[at], block[at], found[to])
        return found

    @torch.no_grad()
    def swap(self, weight: Tensor, bias: Tensor | None) -> None:
        """Exchange the values here with those of the linear."""
        for k, values in enumerate(self.values):
            at, new = self._entries(k, weight.device)
            now = sharded.read(weight, at)
            new = new.to(now.device)
            sharded.write_(weight, at, now.masked_scatter(new, values.to(now)))
            self.values[k] = now[new].cpu()
        if self.bias is not None and bias is not None:
            now = sharded.whole(bias).cpu().clone()
            sharded.assign_(bias, self.bias)
            self.bias = now
        self.swapped = not self.swapped

    def refuse_base(self) -> None:
        """Raise a RuntimeError where only the tuned values will do, and the base's are in place."""
        if self.swapped:
            raise RuntimeError(
                "inside losia.base() the model has its base values and is only called, under torch.no_grad(); "
                "train, save, load and detach it after the block"
            )


def _places(of: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Where in ``of``, and where in ``among``, the numbers are that both have; both are sorted."""
    return torch.isin(of, among).nonzero()[:, 0], torch.isin(among, of).nonzero()[:, 0]


@torch.no_grad()
def holds(module: SubnetLinear) -> bool:
    """Whether a linear has been touched where its subnet is alone, and has the base's values there; collective."""
    touched, bias = module.touched, module.bias
    if len(touched.blocks) > 1:
        return False
    now = sharded.read(module.weight, (module.out_idx[:, None], module.in_idx))
    same = torch.equal(now, touched.values_at(module.out_idx, module.in_idx).to(now.device))
    if touched.bias is not None and bias is not None:
        same &= torch.equal(sharded.whole(bias).cpu(), touched.bias)
    return same


def warn_of_loaded(losia: Losia) -> None:
    """Say, at the first step, that the model has other weights than those that ``base_decay`` pulls towards; not of
    sharded ones, which ranks may have loaded differently and could only compare together."""
    if losia.step or not losia.config.base_decay:
        return
    mine = {n: m for n, m in losia.modules.items() if not sharded.is_sharded(m.weight)}
    loaded = (n for n, m in mine.items() if m.touched.loaded and not holds(m))
    if name := next(loaded, None):
        warnings.warn(
            f"weights were loaded after attach(), e.g. {name}'s, and base_decay pulls towards those of before: call "
            "attach() once the model has its weights, or to go on with a run load the state of its Losia too",
            UserWarning,
            stacklevel=2,
        )


def record(losia: Losia, names: Iterable[str]) -> None:
    """Begin anew: these linears have been touched nowhere, and will be where their subnets are."""
    for m in (losia.modules[n] for n in names):
        m.touched = Touched()
        m.touched.add(m.weight, m.out_idx, m.in_idx)
        if m.bias is not None and losia.config.train_bias:
            m.touched.add_bias(m.bias)


def refuse(losia: Losia) -> None:
    """Raise a RuntimeError within ``losia.base()``."""
    for m in losia.modules.values():
        m.touched.refuse_base()


def refuse_detached(losia: Losia) -> None:
    """Raise a RuntimeError after ``detach``: the subnets are in no model, but would be written into its weights."""
    if losia._detached:
        raise RuntimeError(
            "detached already, so this Losia has no subnets to train or load; attach() the model again"
        )


@torch.no_grad()
def reset(losia: Losia) -> None:
    """Put the base's values back for good: as if nothing had been trained, the subnets where they are."""
    refuse(losia)
    refuse_detached(losia)
    sharded.settle(losia.model)
    for m in losia.modules.values():
        m.touched.swap(m.weight, m.bias)
        sharded.assign_(m.subnet, m._block())
        m.mark_written()
    record(losia, losia.modules)


class BaseValues:
    """See ``Losia.base``."""

    def __init__(self, losia: Losia) -> None:
        self.model, self.modules = losia.model, list(losia.modules.values())

    def __enter__(self) -> None:
        self._within_another = any(m.touched.swapped for m in self.modules)
        if self._within_another:
            return
        sharded.settle(self.model)
        tensors = [t for m in self.modules for t in (m.weight, m.bias) if t is not None]
        # The values come back bit for bit, so a graph from before is good again after; within, autograd sees
        # that they are others.
        self._versions = _unsafe_preserve_version_counter(tuple(tensors))
        try:
            for m in self.modules:
                m.touched.swap(m.weight, m.bias)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self._within_another:
            return
        sharded.settle(self.model)
        with self._versions:
            for m in self.modules:
                if m.touched.swapped:
                    m.touched.swap(m.weight, m.bias)
