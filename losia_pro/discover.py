"""Which linears of a model are adapted, and in which groups: found by structure, not by name."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from .config import LosiaConfig, subnet_size
from .linear import SubnetLinear

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Targets:
    """Names of the linears to adapt: one list a group, and the trained output head, if any.

    ``groups`` are the schedule's slots in order: the repeated blocks, then linears outside of them, each
    on its own. A trained head is the last group.
    """

    groups: list[list[str]]
    head: str | None


def find_targets(model: nn.Module, config: LosiaConfig) -> Targets:
    """Find the linears that ``config`` asks for.

    Repeated blocks are the children of an outermost ``ModuleList`` or ``Sequential`` of which two or more
    have the same class and hold linears. Only modules of the exact type ``nn.Linear`` count: a subclass
    may read its weight in ways that a replacement would not see.

    Raises:
        ValueError: nothing found, a pattern that matches nothing, an attached model, no output head, a
            model that is a linear itself.
    """
    if any(isinstance(m, SubnetLinear) for m in model.modules()):
        raise ValueError("the model is attached already; call detach() on its Losia first")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model is itself a linear, which cannot be swapped in place; use "
            "SubnetLinear.from_linear, or put it into an nn.Sequential"
        )
    linears = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    if not linears:
        raise ValueError(f"{type(model).__name__} holds no nn.Linear to adapt")
    blocks = repeated_blocks(model)
    head = _output_head(model, linears, blocks)

    chosen = _match(model, linears, blocks, head, config)
    trained_head = None
    if config.output_factor > 0:
        if head is None:
            raise ValueError(
                f"output_factor = {config.output_factor}, but {type(model).__name__} has no output head: "
                "no get_output_embeddings() and no nn.Linear outside its blocks; use output_factor=0"
            )
        trained_head = head
        chosen = [name for name in chosen if name != head]

    members: dict[str, list[str]] = {}
    for name in chosen:
        block = next((b for b in blocks if name.startswith(b + ".")), None)
        members.setdefault(block or name, []).append(name)
    inside = [members[b] for b in blocks if b in members]
    outside = [group for key, group in members.items() if key not in blocks]
    groups = inside + outside
    if trained_head is not None:
        groups.append([trained_head])
    if not groups:
        raise ValueError(
            f"{type(model).__name__} holds no nn.Linear besides its output head {head}; train that with "
            "output_factor"
        )
    return Targets(groups, trained_head)


def repeated_blocks(model: nn.Module) -> list[str]:
    """Names of the modules that repeat, in order; empty if none do."""
    blocks: list[str] = []
    for name, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        if any(name.startswith(b + ".") for b in blocks):
            continue
        with_linears = {
            child_name: child
            for child_name, child in container.named_children()
            if any(type(m) is nn.Linear for m in child.modules() if m is not child)
        }
        kinds = Counter(type(child) for child in with_linears.values())
        if kinds and max(kinds.values()) >= 2:
            prefix = name + "." if name else ""
            blocks.extend(prefix + child_name for child_name in with_linears)
    return blocks


def _output_head(model: nn.Module, linears: list[str], blocks: list[str]) -> str | None:
    """The module that maps features to outputs: the model's own answer, else the last linear that
    stands outside the repeated blocks."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None:
        for name, module in model.named_modules():
            if module is head:
                return name if name in linears else None
    outside = [n for n in linears if not any(n.startswith(b + ".") for b in blocks)]
    return outside[-1] if outside and blocks else None


def _match(
    model: nn.Module,
    linears: list[str],
    blocks: list[str],
    head: str | None,
    config: LosiaConfig,
) -> list[str]:
    patterns = config.target_modules
    if patterns is None:
        inside = [n for n in linears if any(n.startswith(b + ".") for b in blocks)]
        return inside if blocks else [n for n in linears if n != head]
    if patterns == "all-linear":
        return [n for n in linears if n != head]
    # A shared module has several names, all of which may be asked for; it goes by its first.
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(m): n for n, m in reversed(modules.items())}
    if isinstance(patterns, str):
        try:
            matched = {patterns: [n for n in modules if re.fullmatch(patterns, n)]}
        except re.error as error:
            raise ValueError(
                f"target_modules: {patterns!r} is not a regular expression ({error}); names go into a list"
            ) from error
    else:
        matched = {p: [n for n in modules if n == p or n.endswith("." + p)] for p in patterns}
    for pattern, names in matched.items():
        if not any(first[id(modules[n])] in linears for n in names):
            found = sorted({type(modules[n]).__name__ for n in names})
            raise ValueError(
                f"target_modules: {pattern!r} matches "
                + (f"no nn.Linear, only {', '.join(found)}" if found else "no module")
                + f"; linears are e.g. {', '.join(linears[:8])}"
            )
    wanted = {first[id(modules[n])] for names in matched.values() for n in names}
    return [n for n in linears if n in wanted]


def subnet_sizes(
    linears: dict[str, nn.Module], head: str | None, config: LosiaConfig
) -> dict[str, tuple[int, int]]:
    """``(n_out, n_in)`` of each target; the head keeps all its inputs.

    Raises:
        ValueError: a layer too small to slice, by name.
    """
    sizes = {}
    for name, linear in linears.items():
        assert isinstance(linear, nn.Linear)
        if name == head:
            n_out = subnet_size(linear.out_features, config.output_factor, config.neuron_group)
            n_in = linear.in_features
        else:
            n_out, n_in = (
                config.n_out(linear.out_features),
                config.n_in(linear.in_features),
            )
        if n_out < 1 or n_in < 1:
            raise ValueError(
                f"{name} is too small to slice: {linear.in_features} inputs and {linear.out_features} "
                f"outputs leave a subnet of {n_in} inputs and {n_out} outputs; raise rank_factor (or "
                "in_factor, out_factor, output_factor), or leave it out with target_modules"
            )
        sizes[name] = n_out, n_in
    return sizes


def check_weights(linears: dict[str, nn.Module], subnet_dtype: str | None = None) -> None:
    """Raise a ValueError, by name, for a weight that cannot be tuned in place, or not in this dtype."""
    owners: dict[int, str] = {}
    for name, linear in linears.items():
        weight = linear.weight
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{name} computes its weight from other parameters (weight_norm, pruning); make it a plain "
                "one, or leave the layer out with target_modules"
            )
        if weight.is_meta:
            raise ValueError(
                f"{name} is on the meta device; load the model's weights before attach()"
            )
        if weight.dtype not in DTYPES:
            raise ValueError(
                f"{name} has {weight.dtype} weights; only those of fp16, bf16, fp32 or fp64 can be tuned"
            )
        if subnet_dtype == "bfloat16" != str(weight.dtype).removeprefix("torch."):
            raise ValueError(
                f'subnet_dtype="bfloat16" is for bf16 weights, and {name} has {weight.dtype}: what its entries hold '
                "would be lost; leave subnet_dtype out, or load the model in bf16"
            )
        if id(weight) in owners:
            raise ValueError(
                f"{name} and {owners[id(weight)]} share one weight; two subnets in it would overwrite "
                "each other: leave one out with target_modules"
            )
        owners[id(weight)] = name
