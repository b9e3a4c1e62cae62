"""A model's linears become ``SubnetLinear``, and plain again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .config import LosiaConfig
from .linear import SubnetLinear
from .selection import random_neurons
from .shared import SharedInputs


def convert(
    linears: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int]],
    sets: Sequence[Sequence[str]],
    config: LosiaConfig,
) -> dict[str, SubnetLinear]:
    """A ``SubnetLinear`` for each linear, with random first subnets: the same on every rank and device.

    Args:
        linears: the layers by name.
        sizes: ``(n_out, n_in)`` of each.
        sets: their names, one list for those that share their inputs.
    """
    generator = torch.Generator().manual_seed(config.seed)
    shared: dict[str, SharedInputs] = {}
    for names in sets:
        size, n_in = linears[names[0]].in_features, sizes[names[0]][1]
        if len(names) > 1 and n_in < size:
            inputs = SharedInputs(random_neurons(size, n_in, config.neuron_group, generator))
            shared |= dict.fromkeys(names, inputs)
    return {
        name: SubnetLinear.from_linear(
            linear,
            n_out=sizes[name][0],
            n_in=sizes[name][1],
            neuron_group=config.neuron_group,
            shared=shared.get(name),
            subnet_dtype=torch.bfloat16 if config.subnet_dtype else None,
            train_bias=config.train_bias,
            mode=config.mode,
            impl=config.impl,
            generator=generator,
        )
        for name, linear in linears.items()
    }


def replace(model: nn.Module, new: dict[int, Any]) -> None:
    """Put modules in the place of others, wherever they stand (a shared module stands in several)."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, name, new[id(child)])
