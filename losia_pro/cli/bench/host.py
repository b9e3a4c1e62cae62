"""Host time of a converted linear: forward and backward together, beyond a frozen ``nn.Linear``'s.

A chain of linears so small that the device is never the slower of the two; the wall clock is read when the last
launch has been made, before the device has finished. The chains take turns. Between the two, the least that a layer
with a trained block can cost: an ``autograd.Function`` that makes the launches which any such layer needs, and
nothing else.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losia_pro import SubnetLinear

from .kernel_tables import figures
from .timing import MAX_ROUNDS, stats, synchronize

LINEAR, LEAST, CONVERTED = CHAINS = ("F.linear", "least Function", "SubnetLinear")
LAYERS, WIDTH, TOKENS = 16, 64, 8
REPEATS = 3  # of all rounds


def measure(how: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The row of ``how``: "eager", "compiled" for the chains under ``torch.compile``, or "graphs" for the same
    replayed as CUDA graphs."""
    samples: dict[str, Callable[[], float]] = {}
    for name in CHAINS:
        chain, trained = _chain(name, device, dtype)
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

    def beyond(other: str) -> dict[str, Any]:
        pairs = zip(times[CONVERTED], times[other], strict=True)
        return figures(stats([a - b for a, b in pairs]))

    return {
        "op": "host",
        "selection": how,
        "candidates": {name: figures(s) for name, s in found.items()},
        "beyond": beyond(LINEAR),
        "beyond_least": beyond(LEAST),
        "timed_by": "wall clock of the host, a linear",
    }


def _chain(name: str, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    layers: list[nn.Module] = []
    trained: list[Tensor] = []
    for _ in range(LAYERS):
        linear = nn.Linear(WIDTH, WIDTH, bias=False, device=device, dtype=dtype)
        layer: nn.Module = linear.requires_grad_(False)
        if name != LINEAR:
            converted = SubnetLinear.from_linear(linear)
            layer = converted if name == CONVERTED else Least(converted)
            trained.append(layer.subnet)
        layers.append(layer)
    return nn.Sequential(*layers), trained


class Least(nn.Module):
    """What ``layer`` computes, and nothing that it checks, chooses or offers; the subnet in the weight's dtype."""

    def __init__(self, layer: SubnetLinear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.subnet = nn.Parameter(layer.subnet.detach().to(layer.weight.dtype))
        # Buffers, as the layer's are: CUDA graphs copy other tensors.
        self.register_buffer("out_idx", layer.out_idx)
        self.register_buffer("in_idx", layer.in_idx)

    def forward(self, x: Tensor) -> Tensor:
        own: dict[str, Any] = self._parameters  # sooner than self.weight
        idx: dict[str, Any] = self._buffers
        apply = LeastFunction.apply if torch.compiler.is_compiling() else _apply
        return apply(x, own["weight"], own["subnet"], idx["out_idx"], idx["in_idx"])  # type: ignore[no-any-return]


class LeastFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, subnet: Tensor, out_idx: Tensor, in_idx: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight, out_idx, x.index_select(1, in_idx))
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, out_idx, x_sub = ctx.saved_tensors
        return dy @ weight, None, dy.index_select(1, out_idx).T @ x_sub, None, None


_apply = super(torch.autograd.Function, LeastFunction).apply  # type: ignore[misc]  # as SubnetLinear calls its own


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
