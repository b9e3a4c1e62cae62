"""Decay towards the base model: weight decay for weights that were good before training.

After an optimizer's step at learning rate ``lr``, decoupled from it as AdamW's decay is (Loshchilov and Hutter, ICLR
2019), but towards the base's values ``subnet_0`` and not towards zero:

    subnet <- subnet - lr decay (subnet - subnet_0)

Entries that the loss does not hold away come back, so that less is forgotten of what the model could do before
(L2-SP: Li, Grandvalet and Davoine, ICML 2018).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import rounding, sharded

if TYPE_CHECKING:
    from .controller import Losia
    from .linear import SubnetLinear


class Anchors:
    """The base's values at each linear's subnet, in its weight's dtype: those rows that this process trains. They are
    looked up again once the subnet has moved or its device has changed."""

    def __init__(self) -> None:
        self._kept: dict[SubnetLinear, tuple[tuple[object, ...], Tensor]] = {}

    def of(self, module: SubnetLinear) -> Tensor:
        mine = sharded.local(module.subnet)
        state = (module.touched, module.out_idx._version, module.in_idx._version, mine.device)
        kept = self._kept.get(module)
        if kept is None or kept[0] != state:
            values = module.touched.values_at(module.out_idx, module.in_idx)
            values = values[sharded.rows(module.subnet)].to(mine.device)
            kept = self._kept[module] = state, values
        return kept[1]


@torch.no_grad()
def pull(losia: Losia, optimizer: torch.optim.Optimizer) -> None:
    """Let every subnet that has a gradient decay once, at its own learning rate."""
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for k, module in enumerate(losia.modules.values()):
        if module.subnet.grad is None:
            continue
        amount = rates[id(module.subnet)] * losia.config.base_decay
        subnet, base = sharded.local(module.subnet.detach()), losia.anchors.of(module)
        if isinstance(amount, Tensor):
            amount = amount.to(subnet.device, torch.promote_types(subnet.dtype, torch.float32))
        if subnet.dtype == torch.bfloat16:
            key = rounding.key_of(losia.config.seed, losia.step, k, 2)
            rounding.lerp_([subnet], [base], amount, key)
        else:
            subnet.lerp_(base.to(subnet.dtype), amount)  # exactly nothing where they are equal
