"""The levers of ``levers.py`` that are pulled once, before the first step: where the subnets are, and what is trained
besides them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .corpora import Part
from .methods import Lever, Prepared
from .model import token_losses


def arrange(lever: Lever, prepared: Prepared, first: Callable[[], list[Part]]) -> None:
    """Before the first step: where the subnets are, and what is trained besides them."""
    if lever.get("spanning"):
        assert prepared.losia is not None
        for m, second in _second_moments(prepared, first()).items():
            m.select(m.out_idx.clone(), spanning(second, len(m.in_idx)))
    if lever.get("norms"):
        for m in prepared.model.modules():
            if type(m).__name__.endswith("RMSNorm"):
                prepared.parameters.extend(p.requires_grad_() for p in m.parameters())


@torch.no_grad()
def _second_moments(prepared: Prepared, parts: list[Part]) -> dict[Any, Tensor]:
    """``sum x^T x`` of each linear's inputs, in fp64."""
    found: dict[Any, Tensor] = {}

    def add(module: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).double()
        found[module] = x.T @ x + found.get(module, 0)

    hooks = [m.register_forward_pre_hook(add) for m in prepared.losia.modules.values()]  # type: ignore[union-attr]
    try:
        for part in parts:
            token_losses(prepared.model, part)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def spanning(second: Tensor, n: int) -> Tensor:
    """``n`` of the variables with these second moments: each next one is that of which most is left when those
    before it have explained what they can (a pivoted Cholesky decomposition)."""
    left = second.diagonal().clone()
    factor = second.new_zeros(len(second), n)
    chosen: list[int] = []
    for k in range(n):
        left[chosen] = -1.0
        pivot = int(left.argmax())
        column = second[:, pivot] - factor[:, :k] @ factor[pivot, :k]
        factor[:, k] = column / column[pivot].clamp_min(1e-300).sqrt()
        left -= factor[:, k] ** 2
        chosen.append(pivot)
    return torch.tensor(chosen, device=second.device).sort().values
