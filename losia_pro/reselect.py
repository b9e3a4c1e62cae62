"""A group's re-selection: its subnets move to where the score is, and their optimizer state starts afresh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import sharded
from .optimizer import forget
from .profile import Move, relocate

if TYPE_CHECKING:
    from .controller import Losia
    from .linear import SubnetLinear


class Reselection(NamedTuple):
    """One linear's move: after ``step`` optimizer steps, ``group``'s linear ``name``.

    ``score_kept`` is the share of the linear's whole score that its new subnet holds, ``overlap`` the
    share of the new subnet's entries that were in the last. ``lost_to_rounding``: of the entries that the last
    step before changed, the share whose dense weight stayed as it was, because the update is below what its dtype
    resolves; the subnet keeps it, where a parameter of that dtype would have lost it. All in [0, 1].
    """

    step: int
    group: int
    name: str
    score_kept: float
    overlap: float
    lost_to_rounding: float


@torch.no_grad()
def lost_to_rounding(module: SubnetLinear, before: Tensor) -> float:
    """The share of the changes from ``before`` (``subnet``'s shape) to the subnet that leave the dense weight as it
    is; to be called before the write-back."""
    subnet = sharded.whole(module.subnet)
    changed = subnet != sharded.whole(before)
    rounded = subnet.to(module.weight.dtype)
    now = sharded.read(module.weight, (module.out_idx[:, None], module.in_idx))
    lost, all_changed = (
        torch.stack([changed & (rounded == now), changed]).flatten(1).sum(1).tolist()
    )
    return lost / all_changed if all_changed else 0.0


def reselect(losia: Losia, group: int, lost: Mapping[str, float] | None = None) -> None:
    """Move the subnets of a profiled group, and end its profiles.

    Args:
        lost: what ``lost_to_rounding`` says of each linear.

    Raises:
        RuntimeError: data-parallel ranks that differ.
    """
    if losia._ranks:
        losia._ranks.check_profiled(losia.group_modules(group), losia.step)
    for names in losia.sets:
        if names[0] not in losia.groups[group]:
            continue
        moves = relocate([losia.modules[n] for n in names], losia.config)
        for name, move in zip(names, moves or [Move(0.0, 1.0)] * len(names), strict=True):
            share = (lost or {}).get(name, 0.0)
            losia.history.append(Reselection(losia.step, group, name, *move, share))
            if moves is None:  # no gradient came: nothing speaks for another place
                continue
            if losia._optimizer is not None:
                forget(losia._optimizer, losia.modules[name].subnet)
    if losia._ranks:
        losia._ranks.check_moved(losia.group_modules(group), losia.step)
