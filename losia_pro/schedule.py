"""Asynchronous periodic localization: which groups are profiled, moved and rewarmed at which step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Time in slots of ``period`` optimizer steps; slot ``l`` profiles group ``l mod n_groups``.

    Steps count from 0: step ``i`` is the ``i``-th call of ``optimizer.step()``. A group is a decoder
    block, or the output head as the last group (paper: *asynchronous periodic localization*). Pure: the
    same arguments always give the same answer, so nothing of it needs saving.

    Args:
        n_groups: how many groups there are.
        period: the slot's length ``T`` in optimizer steps; None keeps every subnet where it is.
        synchronous: profile and move all groups in every slot (an ablation).
    """

    n_groups: int
    period: int | None
    synchronous: bool = False

    def profiled(self, step: int) -> tuple[int, ...]:
        """Groups whose importance is accumulated from the gradients of ``step``."""
        if self.period is None:
            return ()
        if self.synchronous:
            return tuple(range(self.n_groups))
        return (step // self.period % self.n_groups,)

    def reselected(self, step: int) -> tuple[int, ...]:
        """Groups that are moved right after ``step``: those profiled in a slot that ends with it."""
        if self.period is None or (step + 1) % self.period:
            return ()
        return self.profiled(step)

    def rewarm(self, step: int, group: int) -> float:
        """Factor on the learning rate of ``group`` at ``step``: ``1/T, 2/T, ..., 1`` over the ``T`` steps
        after each re-selection, and 1 otherwise (so also before the group's first)."""
        if self.period is None:
            return 1.0
        slot, done = divmod(step, self.period)
        if slot == 0 or group not in self.profiled((slot - 1) * self.period):
            return 1.0
        return (done + 1) / self.period
