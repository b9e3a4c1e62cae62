"""Where a step's time over the floor goes, by GPU kernel: both profiled, and set side by side by name.

A kernel here is whatever the device does: copies and fills too. Its name is cut before its template arguments and
parameters, and kernels of one short name are added up. Floor and method are matched by exact name: a kernel that
Inductor numbers otherwise, or a product for which the library takes another kernel, appears once as more and once
as less. No difference is lost: what is not listed is in the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from ..errors import CliError
from .table import number, table
from .timing import synchronize

STEPS = 3
LEAST_MS = 0.2  # of a difference that is listed
MOST = 25  # kernels in a list
WIDTH = 80  # characters of a name
NOT_SHOWN = [
    "Kernels are matched by name; one that is named otherwise in the floor appears once as more, once as less.",
    "Kernels' times are of profiled steps, and overlap where streams do; the GPU's waiting is not among them.",
]


class Kernel(NamedTuple):
    """Of one step."""

    calls: float
    ms: float


Kernels = dict[str, Kernel]
NONE = Kernel(0.0, 0.0)


def ready(device: torch.device) -> None:
    """Load the profiler before the first step is timed: it may cost something, and does so for all rows alike.

    Raises:
        CliError: the device has no kernels, or the profiler sees none.
    """
    if device.type != "cuda":
        raise CliError(f"--breakdown: takes a CUDA device; {device} has no kernels to tell apart")
    x = torch.ones(2**20, device=device)
    kernels_of(x.neg_, device)


def kernels_of(step: Callable[[], object], device: torch.device) -> Kernels:
    """The kernels of a step, from ``STEPS`` more of them under PyTorch's profiler.

    Raises:
        CliError: the profiler saw none.
    """
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        synchronize(device)
    events = [
        (event.name, event.self_device_time_total / 1e3)
        for event in profiler.events() or []
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    if not events:
        raise CliError(f"--breakdown: PyTorch's profiler sees no kernels on {device}")
    return by_name(events, STEPS)


def by_name(events: Iterable[tuple[str, float]], steps: int) -> Kernels:
    """Launches of several steps, each a name and milliseconds, added up by short name, per step."""
    sums: Kernels = {}
    for name, ms in events:
        before = sums.get(short(name), NONE)
        sums[short(name)] = Kernel(before.calls + 1, before.ms + ms)
    return {name: Kernel(k.calls / steps, k.ms / steps) for name, k in sums.items()}


def short(name: str) -> str:
    """``at::native::copy`` of ``void at::native::(anonymous namespace)::copy<4>(int)``."""
    plain = (
        name.replace("(anonymous namespace)::", "").replace("<unnamed>::", "").removeprefix("void ")
    )
    return (plain.split("<")[0].split("(")[0].strip() or name)[:WIDTH]


def figures(kernels: Kernels, floor: Kernels | None) -> dict[str, Any]:
    """A row's part of the record: its longest kernels, and those that differ most from the floor's.

    ``kernels_ms - floor_kernels_ms`` is the sum of ``ms - floor_ms`` over those listed, plus ``rest_ms``.
    """
    longest = sorted(kernels, key=lambda name: kernels[name].ms, reverse=True)[:MOST]
    result: dict[str, Any] = {
        "kernels_ms": _total(kernels),
        "kernels": [_row(name, kernels[name]) for name in longest],
    }
    if floor is None:
        return result | dict.fromkeys(("floor_kernels_ms", "over_floor", "rest_ms"))
    over = {
        name: kernels.get(name, NONE).ms - floor.get(name, NONE).ms
        for name in dict.fromkeys([*kernels, *floor])
    }
    ordered = sorted(over, key=lambda name: abs(over[name]), reverse=True)
    listed = [name for name in ordered[:MOST] if abs(over[name]) >= LEAST_MS]
    return result | {
        "floor_kernels_ms": _total(floor),
        "over_floor": [
            _row(name, kernels.get(name, NONE)) | {"floor_ms": round(floor.get(name, NONE).ms, 3)}
            for name in listed
        ],
        "rest_ms": round(sum(over[name] for name in ordered[len(listed) :]), 3),
    }


def _total(kernels: Kernels) -> float:
    return round(sum(kernel.ms for kernel in kernels.values()), 3)


def _row(name: str, kernel: Kernel) -> dict[str, Any]:
    return {"kernel": name, "calls": round(kernel.calls, 2), "ms": round(kernel.ms, 3)}


def said(row: dict[str, Any]) -> str:
    """A row's kernels over the floor's as a table, which adds up."""

    def line(name: str, calls: str, ms: float, floor_ms: float) -> list[str]:
        return [name, calls, number(ms, 4), number(floor_ms, 4), f"{ms - floor_ms:+.2f}"]

    lines = [
        line(k["kernel"], f"{k['calls']:g}", k["ms"], k["floor_ms"]) for k in row["over_floor"]
    ]
    lines.append(["the rest", "", "", "", f"{row['rest_ms']:+.2f}"])
    lines.append(line("all kernels", "", row["kernels_ms"], row["floor_kernels_ms"]))
    lines.append(line("the step, timed", "", row["median_ms"], row["floor_ms"]))
    return table([f"{row['method']}, by kernel", "calls", "ms", "floor ms", "difference"], lines)
