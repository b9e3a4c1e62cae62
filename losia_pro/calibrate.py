"""A calibrated start: the first subnets by importance over a few batches, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import base
from .distributed import ranks_of
from .profile import Profile
from .reselect import reselect

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .controller import Losia


def calibrate(
    losia: Losia,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    groups_at_once: int | None,
    process_group: ProcessGroup | None,
) -> None:
    """See ``Losia.calibrate``."""
    base.refuse_detached(losia)
    if groups_at_once is not None and groups_at_once < 1:
        raise ValueError(
            f"groups_at_once must be None, for all, or at least 1, got {groups_at_once}"
        )
    if not isinstance(batches, Sized):  # an iterator is at its end after the first groups
        batches = list(batches)
    if not batches:
        raise ValueError("calibrate needs at least one batch")
    if losia.step:
        raise RuntimeError(
            f"calibrate() comes before training; {losia.step} steps were made already"
        )
    losia._ranks = ranks_of(losia, process_group)
    if losia._ranks:
        losia._ranks.check_start(losia, "at calibrate()", len(batches))
    loss_of = loss_fn or (lambda model, batch: model(**batch).loss)
    untouched = [n for n, m in losia.modules.items() if base.holds(m)]  # no delta was loaded there
    n_groups = len(losia.groups)
    at_once = groups_at_once or n_groups
    try:
        for first in range(0, n_groups, at_once):
            _profile_and_move(losia, range(first, min(first + at_once, n_groups)), batches, loss_of)
    finally:
        for module in losia.modules.values():
            module.profile = None
        losia.model.zero_grad(set_to_none=True)
        if losia._optimizer is not None:
            losia._set_profiled()
    base.record(losia, untouched)  # nothing was trained where the subnets were before
    losia._calibrated = True


def _profile_and_move(
    losia: Losia,
    groups: range,
    batches: Iterable[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
) -> None:
    for module in losia.modules.values():
        module.profile = None
    for group in groups:
        for module in losia.group_modules(group).values():
            module.profile = Profile(module, losia.config)
    for batch in batches:
        loss_of(losia.model, batch).backward()
        for profile in losia._profiles():
            profile.update(reduce=losia._ranks.mean_ if losia._ranks else None)
        losia.model.zero_grad(set_to_none=True)
    for group in groups:
        reselect(losia, group)
