"""Rewarming: after a move, a subnet's learning rate rises again from 0 (the paper: *Learning Rate Rewarming*).

The rising rate is a part of the step, by whatever optimizer: with ``factor`` of ``Schedule.rewarm``,

    subnet <- old + factor (new - old)

is the step at ``factor`` times the learning rate, and leaves schedulers and the optimizer's groups alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import decay, sharded

if TYPE_CHECKING:
    from .controller import Losia

# Of a group: its subnets, copies of them, the factor
Before = list[tuple[list[Tensor], list[Tensor], float]]


def before(losia: Losia) -> Before:
    """What an optimizer's step is about to change of the groups that are rewarming."""
    kept: Before = []
    for group in range(len(losia.groups)):
        factor = losia.schedule.rewarm(losia.step, group) if losia.config.rewarm else 1.0
        if factor < 1:
            subnets = [m.subnet.detach() for m in losia.group_modules(group).values()]
            kept.append((subnets, [sharded.local(s).clone() for s in subnets], factor))
    return kept


def after(losia: Losia, kept: Before) -> None:
    """Take the step that was made in part."""
    for k, (subnets, old, factor) in enumerate(kept):
        decay.lerp_(subnets, old, 1 - factor, losia.config.seed, losia.step, k, 1)
