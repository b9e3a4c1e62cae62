"""Linears that read the same input, q, k and v say, with the same ``X_S``: gathered once, kept once."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class SharedInputs:
    """The common ``in_idx`` of some linears, and ``x[:, X_S]`` for as long as ``x`` lives.

    The first of them that is called gathers for all.
    """

    def __init__(self, in_idx: Tensor) -> None:
        self.in_idx = in_idx
        self._forget()

    def _forget(self, _: object = None) -> None:
        # Set and read as one: threads that call the layers at a time each have an x of their own.
        self._kept: tuple[weakref.ref[Tensor], tuple[object, ...], Tensor] | None = None

    def __getstate__(self) -> dict[str, Tensor]:
        return {"in_idx": self.in_idx}

    def __setstate__(self, state: dict[str, Tensor]) -> None:
        self.__init__(state["in_idx"])  # type: ignore[misc]

    def on(self, device: torch.device) -> Tensor:
        """``in_idx`` on ``device``: one tensor for all linears there."""
        self.in_idx = self.in_idx.to(device)
        return self.in_idx

    def columns(self, x: Tensor, flat: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """``gather(flat)``, or what it gave for the same ``x``; ``flat`` is ``x`` as ``(T, in)``, cast."""
        if torch._C._are_functorch_transforms_active():
            return gather(flat)
        version = 0 if x.is_inference() else x._version
        state = (version, flat.dtype, self.in_idx._version)
        kept = self._kept
        if kept is None or kept[0]() is not x or kept[1] != state:
            kept = self._kept = weakref.ref(x, self._forget), state, gather(flat)
        return kept[2]
