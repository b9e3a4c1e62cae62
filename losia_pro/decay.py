"""Decay towards the base model: weight decay for weights that were good before training.

After an optimizer's step at learning rate ``lr``, decoupled from it as AdamW's decay is (Loshchilov and Hutter, ICLR
2019), but towards the base's values ``subnet_0`` and not towards zero:

    subnet <- subnet - lr decay (subnet - subnet_0)

Entries that the loss does not hold away come back, so that less is forgotten of what the model could do before
(L2-SP: Li, Grandvalet and Davoine, ICML 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import rounding, sharded
from .dispatch import function

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
        places = module.out_idx._version, module.in_idx._version
        state = (module.touched, *places, mine.shape, mine.device)
        kept = self._kept.get(module)
        if kept is None or kept[0] != state:
            values = module.touched.values_at(module.out_idx, module.in_idx)
            if sharded.is_sharded(module.subnet):  # copied: a view would keep the others' rows
                values = values[sharded.rows(module.subnet)].clone()
            kept = self._kept[module] = state, values.to(mine.device)
        return kept[1]


@torch.no_grad()
def pull(losia: Losia, optimizer: torch.optim.Optimizer) -> None:
    """Let every subnet that has a gradient decay once, at its own learning rate, and exactly not at all where it is
    the base's: those of one of the optimizer's groups together."""
    group_of = {id(p): k for k, g in enumerate(optimizer.param_groups) for p in g["params"]}
    alike: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    for module in losia.modules.values():
        if module.subnet.grad is None:
            continue
        subnet, base = module.subnet.detach(), losia._anchors.of(module)
        if torch.promote_types(subnet.dtype, base.dtype) != subnet.dtype:
            base = base.to(subnet.dtype)  # of a model that was cast to less
        subnets, bases = alike.setdefault(group_of[id(module.subnet)], ([], []))
        subnets.append(subnet)
        bases.append(base)
    for k, (group, (subnets, bases)) in enumerate(alike.items()):
        amount = optimizer.param_groups[group]["lr"] * losia.config.base_decay
        lerp_(subnets, bases, amount, losia.config.seed, losia.step, k, 2)


def lerp_(
    subnets: Sequence[Tensor], others: Sequence[Tensor], weight: float | Tensor, *numbers: int
) -> None:
    """``torch_ops.lerp_`` on subnets, where ``others`` hold the rows that this process trains; those of one device and
    one pair of dtypes together.

    The key is of ``numbers``, of which of those it is, and for sharded subnets of their first rows here: as AdamW's,
    shards have random bits of their own, while what several processes hold stays the same on all of them.
    """
    alike: dict[object, tuple[list[Tensor], list[Tensor], list[int]]] = {}
    for subnet, other in zip(subnets, others, strict=True):
        in_parts = sharded.is_sharded(subnet)
        kind = in_parts, other.device, subnet.dtype, other.dtype
        own, towards, first = alike.setdefault(kind, ([], [], []))
        own.append(sharded.local(subnet))
        towards.append(other)
        first += [sharded.rows(subnet).start] if in_parts else []
    for k, (own, towards, first) in enumerate(alike.values()):
        # A CUDA graph keeps nothing that is copied from the host, as the kernels' tables are; PyTorch's has their bits.
        captured = own[0].is_cuda and torch.cuda.is_current_stream_capturing()
        key = rounding.key_of(*numbers, k, *first)
        function("lerp_", own[0], "torch" if captured else None)(own, towards, weight, key)
