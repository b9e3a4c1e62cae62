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
        self._x: weakref.ref[Tensor] | None = None
        self._state: tuple[object, ...] = ()
        self._columns: Tensor | None = None

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
        if self._columns is None or self._x is None or self._x() is not x or self._state != state:
            self._columns = gather(flat)
            self._x, self._state = weakref.ref(x, self._forget), state
        return self._columns
