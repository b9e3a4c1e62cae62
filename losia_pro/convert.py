"""A model's linear maps take subnets, and become plain again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .config import LosiaConfig
from .kinds import stand_in
from .linear import SubnetLinear
from .selection import random_neurons
from .shared import SharedInputs
from .views import SubnetView, View

Swap = tuple[nn.Module, nn.Module]  # a layer, and what takes its place


def convert(
    linears: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int]],
    sets: Sequence[Sequence[str]],
    config: LosiaConfig,
) -> tuple[dict[str, SubnetLinear], list[Swap]]:
    """A ``SubnetLinear`` for each linear, with random first subnets: the same on every rank and device.

    Args:
        linears: the layers by name.
        sizes: ``(n_out, n_in)`` of each.
        sets: their names, one list for those that share their inputs.

    Returns:
        They by name, and the layers to replace.
    """
    generator = torch.Generator().manual_seed(config.seed)
    shared: dict[str, SharedInputs] = {}
    for names in sets:
        size, n_in = linears[names[0]].in_features, sizes[names[0]][1]
        if len(names) > 1 and n_in < size:
            inputs = SharedInputs(random_neurons(size, n_in, config.group(size), generator))
            shared |= dict.fromkeys(names, inputs)
    new = {
        name: (SubnetView if isinstance(linear, View) else SubnetLinear).from_linear(
            linear,
            n_out=sizes[name][0],
            n_in=sizes[name][1],
            neuron_group=config.group(linear.in_features, sizes[name][1] == linear.in_features),
            shared=shared.get(name),
            subnet_dtype=torch.bfloat16 if config.subnet_dtype else None,
            train_bias=config.train_bias,
            mode=config.mode,
            impl=config.impl,
            generator=generator,
        )
        for name, linear in linears.items()
    }
    return new, _swaps(linears, new)


def _swaps(linears: Mapping[str, Any], new: Mapping[str, SubnetLinear]) -> list[Swap]:
    swaps: list[Swap] = []
    units: dict[int, tuple[nn.Module, dict[str, SubnetView]]] = {}
    for name, linear in linears.items():
        module = new[name]
        if isinstance(module, SubnetView):
            key = linear.key
            units.setdefault(id(linear.owner), (linear.owner, {}))[1][key] = module
        else:
            swaps.append((linear, module))
    return swaps + [(layer, stand_in(layer, held)) for layer, held in units.values()]


def replace(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Put modules in the place of others, wherever they stand (a shared module stands in several)."""
    new = {id(a): b for a, b in swaps}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, name, new[id(child)])


def take_places(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Put stand-ins in their layers' places. A layer set aside has its stand-in's parameters, whatever they become: the
    whole ones that ``fully_shard`` or a conversion replaces would stay in memory."""
    replace(model, swaps)
    for layer, module in swaps:
        layer._parameters = module._parameters


def restore(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Undo ``take_places``: the layers are back, with the parameters that their stand-ins have now."""
    for layer, module in swaps:
        layer._parameters = {n: p for n, p in module._parameters.items() if n != "subnet"}
        layer.train(module.training)
    replace(model, [(b, a) for a, b in swaps])
