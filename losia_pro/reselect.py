"""A group's re-selection: its subnets move to where the score is, and their optimizer state starts afresh."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .optimizer import forget
from .profile import Move, relocate

if TYPE_CHECKING:
    from .controller import Losia


class Reselection(NamedTuple):
    """One linear's move: after ``step`` optimizer steps, ``group``'s linear ``name``.

    ``score_kept`` is the share of the linear's whole score that its new subnet holds, ``overlap`` the
    share of the new subnet's entries that were in the last; both in [0, 1].
    """

    step: int
    group: int
    name: str
    score_kept: float
    overlap: float


def reselect(losia: Losia, group: int) -> None:
    """Move the subnets of a profiled group, and end its profiles.

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
            losia.history.append(Reselection(losia.step, group, name, *move))
            if moves is None:  # no gradient came: nothing speaks for another place
                continue
            module = losia.modules[name]
            module.touched.add(module.weight, module.out_idx, module.in_idx)
            if losia._optimizer is not None:
                forget(losia._optimizer, module.subnet)
    if losia._ranks:
        losia._ranks.check_moved(losia.group_modules(group), losia.step)
