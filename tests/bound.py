"""A model attached and bound to an optimizer, and looks at what it holds: shared by several tests."""

from __future__ import annotations

import torch
import toys

import losia_pro
from losia_pro import LosiaConfig
from losia_pro.sharded import whole

LR = 1e-2


def attached(config=None, dtype=torch.float64, model=None, optimizer=None, scaler=None):
    model = model or toys.stack(dtype)
    losia = losia_pro.attach(model, config or LosiaConfig(rank_factor=1 / 4, period=4))
    make = optimizer or (lambda p: torch.optim.AdamW(p, lr=LR))
    optimizer = make(losia.parameters())
    losia.bind(optimizer, scaler=scaler)
    return model, losia, optimizer


def profiles(losia) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        n: (whole(m.profile.importance).cpu().clone(), whole(m.profile.uncertainty).cpu().clone())
        for n, m in losia.modules.items()
        if m.profile is not None
    }


def backward(model, batch, scale=1.0):
    (toys.loss_of(model, batch) * scale).backward()


def hooks(optimizer) -> int:
    """How many hooks ``optimizer.step`` runs."""
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
