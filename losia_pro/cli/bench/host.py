"""Host time of a converted linear: forward and backward together, beyond a frozen ``nn.Linear``'s.

A chain of linears so small that the device is never the slower of the two; the wall clock is read when the last
launch has been made, before the device has finished. Both chains take turns.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from losia_pro import SubnetLinear

from .kernel_tables import figures
from .timing import MAX_ROUNDS, stats, synchronize

LAYERS, WIDTH, TOKENS = 16, 64, 8
REPEATS = 3  # of all rounds


def measure(how: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The row of ``how``: "eager", "compiled" for both chains under ``torch.compile``, or "graphs" for the same
    replayed as CUDA graphs."""
    samples: dict[str, Callable[[], float]] = {}
    for name, converted in (("F.linear", False), ("SubnetLinear", True)):
        chain, trained = _chain(converted, device, dtype)
        run: Callable[[Tensor], Tensor] = chain
        if how != "eager":
            run = torch.compile(chain, mode="reduce-overhead" if how == "graphs" else "default")
        x = torch.randn(TOKENS, WIDTH, device=device, dtype=dtype, requires_grad=True)
        samples[name] = _sampler(run, x, [x, *trained], device)
    times: dict[str, list[float]] = {name: [] for name in samples}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(REPEATS * MAX_ROUNDS):
            for name, sample in samples.items():
                times[name].append(sample())
    finally:
        if collecting:
            gc.enable()
    found = {name: stats(t) for name, t in times.items()}
    beyond = [a - b for a, b in zip(times["SubnetLinear"], times["F.linear"], strict=True)]
    return {
        "op": "host",
        "selection": how,
        "candidates": {name: figures(s) for name, s in found.items()},
        "beyond": figures(stats(beyond)),
        "timed_by": "wall clock of the host, a linear",
    }


def _chain(
    converted: bool, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, list[Tensor]]:
    linears: list[nn.Module] = []
    trained: list[Tensor] = []
    for _ in range(LAYERS):
        linear: nn.Linear = nn.Linear(WIDTH, WIDTH, bias=False, device=device, dtype=dtype)
        linear.requires_grad_(False)
        if converted:
            linear = SubnetLinear.from_linear(linear)
            trained.append(linear.subnet)
        linears.append(linear)
    return nn.Sequential(*linears), trained


def _sampler(
    run: Callable[[Tensor], Tensor], x: Tensor, leaves: list[Tensor], device: torch.device
) -> Callable[[], float]:
    dy = torch.ones_like(x)

    def sample() -> float:
        for leaf in leaves:
            leaf.grad = None
        synchronize(device)
        start = time.perf_counter()
        run(x).backward(dy)
        took = time.perf_counter() - start
        synchronize(device)
        return took * 1e6 / LAYERS

    for _ in range(5):
        sample()
    missing = [leaf for leaf in leaves if leaf.grad is None]
    assert not missing, f"{len(missing)} of {len(leaves)} leaves have no gradient"
    return sample
