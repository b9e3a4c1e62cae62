"""A point of `bench kernels`: candidates that are checked, then timed together.

A candidate that is ours may err, against an fp64 truth, at most twice as much as PyTorch's own result of the same
dtypes; a copy not at all. PyTorch's own may lose one unit for each of the T additions and one for the rounding of
the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losia_pro import dispatch

from . import traffic
from .shapes import SELECTIONS, Selection
from .timing import Call, first_line, n_sets
from .traffic import Limits, Traffic

LIBRARY = "library"  # plain PyTorch: what the operation is compared with


class Way(NamedTuple):
    """An implementation of an operation; it is called ``within`` a context, where there is one."""

    name: str
    impl: str | None
    within: Callable[[], AbstractContextManager[object]] | None = None

    def judged(self, call: Call, check: Callable[[], float], allowed: float) -> Candidate:
        return judged(self._entered(call), self._entered(check), allowed)

    def _entered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        within = self.within
        if within is None:
            return function

        def entered(*args: Any) -> Any:
            with within():
                return function(*args)

        return entered


def implementations(op: str, device: torch.device) -> list[Way]:
    """The default choice and every implementation that can run."""
    usable = [Way(name, name) for name, can, _ in dispatch.explain(op, device) if can]
    return [Way("default", None), *usable]


@dataclass
class Setting:
    """What all points share."""

    device: torch.device
    dtype: torch.dtype
    limits: Limits
    selections: Sequence[Selection] = SELECTIONS
    ways: Callable[[str, torch.device], list[Way]] = implementations
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def randn(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype)

    def sets(self, bytes_a_set: int) -> int:
        """How many sets of inputs are rotated over; a CPU's caches are not evaded."""
        return n_sets(bytes_a_set, self.limits.l2) if self.device.type == "cuda" else 2

    def choose(self, selection: Selection, features: int, factor: float) -> tuple[Tensor, int, int]:
        """Indices on the device, their runs, and the bytes of a row that they touch."""
        idx, group = selection.choose(features, factor, self.generator)
        element = self.dtype.itemsize
        row = traffic.touched(idx, element, features, self.limits.sector)
        return idx.to(self.device), group, row


@dataclass
class Candidate:
    """A way to compute an operation; ``error`` beyond ``allowed``, or a ``failure``, and it is not timed."""

    call: Call
    error: float = float("nan")
    allowed: float = 0.0
    failure: str = ""

    @property
    def wrong(self) -> str:
        if self.failure or self.error <= self.allowed:
            return self.failure
        return f"error {self.error:.2e} where {self.allowed:.2e} is allowed"


@dataclass
class Case:
    """One row of the results: an operation on one selection."""

    key: dict[str, Any]  # op, selection, in, out, tokens, n_in, n_out
    library: str  # what the plain PyTorch is
    traffic: Traffic
    candidates: dict[str, Candidate]


@dataclass
class Point:
    """Cases that are timed together, on ``sets`` sets of inputs."""

    sets: int
    cases: list[Case]
    graphs: bool = True  # else as called from the host


def error(result: Tensor, truth: Tensor) -> float:
    """``||result - truth|| / ||truth||`` in fp64."""
    truth = truth.double()
    return float((result.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def sum_allowed(tokens: int, result: torch.dtype) -> float:
    return float(tokens * torch.finfo(torch.float32).eps + torch.finfo(result).eps)


def judged(call: Call, check: Callable[[], float], allowed: float) -> Candidate:
    """The candidate with its error; whatever it raises is recorded instead."""
    try:
        return Candidate(call, check(), allowed)
    except Exception as raised:  # noqa: BLE001 - a refused dtype, a compiler that fails, a kernel that crashes
        return Candidate(call, failure=first_line(raised))


def error_of(call: Call, truth: Tensor) -> float:
    result = call(0)
    assert isinstance(result, Tensor)
    return error(result, truth)


def unequal(call: Call, truth: Tensor) -> float:
    result = call(0)
    assert isinstance(result, Tensor)
    return float(not torch.equal(result, truth))
