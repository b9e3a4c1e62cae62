"""Which linears of a model are adapted, and in which groups: found by structure, not by name."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from .config import LosiaConfig, subnet_size
from .kinds import join, linears_of, named_modules, refuse, refuse_quantized
from .linear import SubnetLinear
from .sharded import is_sharded
from .views import AnyLinear, View

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Targets:
    """Names of the linears to adapt: one list a group, and the trained output head, if any.

    ``groups`` are the schedule's slots in order: the repeated blocks, then linears outside of them, each
    on its own. A trained head is the last group. ``linears`` has each by name, in that order.
    """

    groups: list[list[str]]
    head: str | None
    linears: dict[str, AnyLinear]


def find_targets(model: nn.Module, config: LosiaConfig) -> Targets:
    """Find the linears that ``config`` asks for.

    Repeated blocks are the children of an outermost ``ModuleList`` or ``Sequential`` of which two or more
    have the same class and hold linears (see ``kinds.linears_of``). Left alone unless they are named: the
    output head, and linears of a block with one output, which are gates.

    Raises:
        ValueError: nothing found, a pattern that matches nothing, an attached model, no output head, a
            model that is a linear itself, one with adapters or quantized weights.
    """
    if any(isinstance(m, SubnetLinear) for m in model.modules()):
        raise ValueError("the model is attached already; call detach() on its Losia first")
    refuse(model)
    refuse_quantized(model)
    if isinstance(model, nn.Linear) or linears_of(model):
        raise ValueError(
            "the model is itself a linear, which cannot be swapped in place; use "
            "SubnetLinear.from_linear, or put it into an nn.Sequential"
        )
    found = {
        join(path, key): linear
        for path, module in named_modules(model)
        for key, linear in linears_of(module).items()
    }
    linears = list(found)
    if not linears:
        raise ValueError(f"{type(model).__name__} holds no nn.Linear to adapt{_left_alone(model)}")
    blocks = repeated_blocks(model)
    block_of = _block_of(model, blocks)
    head = _output_head(model, linears, block_of)

    chosen = _match(model, found, block_of, head, config)
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
        members.setdefault(block_of.get(name, name), []).append(name)
    inside = [members[b] for b in blocks if b in members]
    outside = [group for key, group in members.items() if key not in blocks]
    groups = inside + outside
    if trained_head is not None:
        groups.append([trained_head])
    if not groups:
        raise ValueError(
            f"{type(model).__name__} holds no nn.Linear besides its output head {head}{_left_alone(model)}; train that "
            "with output_factor"
        )
    if config.target_modules is None:
        _warn_of_the_rest(model, blocks, [found[n] for n in chosen])
    return Targets(groups, trained_head, {n: found[n] for group in groups for n in group})


def _left_alone(model: nn.Module) -> str:
    """What is like a linear and no ``nn.Linear``, in brackets."""
    kinds = sorted(
        {type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear)} - {"Linear"}
    )
    return (
        f" ({', '.join(kinds)}: subclasses, which may read their weight in ways of their own)"
        * bool(kinds)
    )


def _warn_of_the_rest(model: nn.Module, blocks: list[str], chosen: list[AnyLinear]) -> None:
    """Say so if most of the blocks' parameters are in layers of other kinds, mixtures that are not known say."""
    inside = {
        f"{name}.{key}": p
        for name, module in named_modules(model)
        if any(f"{name}.".startswith(b + ".") for b in blocks)
        for key, p in module.named_parameters(recurse=False)
    }
    adapted = {id(_stored(m)) for m in chosen}
    rest = {name: p.numel() for name, p in inside.items() if id(p) not in adapted}
    share = sum(rest.values()) / max(1, sum(p.numel() for p in inside.values()))
    if share > 1 / 2:
        largest = max(rest, key=lambda name: rest[name])
        warnings.warn(
            f"{share:.0%} of the parameters in {type(model).__name__}'s blocks are not linears that can be adapted, "
            f"and stay frozen: {largest} {tuple(inside[largest].shape)} is the largest",
            UserWarning,
            stacklevel=5,
        )


def _stored(linear: AnyLinear) -> nn.Parameter | None:
    """The parameter that is a linear's weight or holds it, looked up: to ask a parametrized one for its weight
    computes it, and spectral_norm's changes."""
    return linear.stored if isinstance(linear, View) else linear._parameters.get("weight")


def repeated_blocks(model: nn.Module) -> list[str]:
    """Names of the modules that repeat, in order; empty if none do."""
    blocks: list[str] = []
    for name, container in named_modules(model):
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        if any(name.startswith(b + ".") for b in blocks):
            continue
        with_linears = {
            child_name: child
            for child_name, child in container.named_children()
            if any(linears_of(m) for m in child.modules() if m is not child)
        }
        kinds = Counter(type(child) for child in with_linears.values())
        if kinds and max(kinds.values()) >= 2:
            prefix = name + "." if name else ""
            blocks.extend(prefix + child_name for child_name in with_linears)
    return blocks


def _block_of(model: nn.Module, blocks: list[str]) -> dict[str, str]:
    """The block that a linear is in, by the linear's first name, under which it may stand elsewhere."""
    first = {id(m): n for n, m in named_modules(model)}
    return {
        join(first[id(module)], key): block
        for block in reversed(blocks)  # a linear of two is the first one's
        for module in model.get_submodule(block).modules()
        for key in linears_of(module)
    }


def _output_head(model: nn.Module, linears: list[str], block_of: dict[str, str]) -> str | None:
    """The module that maps features to outputs: the model's own answer, else the last linear that
    stands outside the repeated blocks."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None:
        for name, module in named_modules(model):
            if module is head:
                return name if name in linears else None
    outside = [n for n in linears if n not in block_of]
    return outside[-1] if outside and block_of else None


def _match(
    model: nn.Module,
    linears: dict[str, AnyLinear],
    block_of: dict[str, str],
    head: str | None,
    config: LosiaConfig,
) -> list[str]:
    patterns = config.target_modules
    if patterns in (None, "all-linear"):
        gates = {n for n in block_of if linears[n].out_features == 1}
        wanted = block_of.keys() if patterns is None and block_of else linears.keys() - {head}
        return [n for n in linears if n in wanted - gates]
    modules = dict(named_modules(model, remove_duplicate=False))
    named = _names(modules)
    if isinstance(patterns, str):
        try:
            matched = {patterns: [n for n in named if re.fullmatch(patterns, n)]}
        except re.error as error:
            raise ValueError(
                f"target_modules: {patterns!r} is not a regular expression ({error}); names go into a list"
            ) from error
    else:
        matched = {p: [n for n in named if n == p or n.endswith("." + p)] for p in patterns}
    for pattern, names in matched.items():
        if not any(named[n] for n in names):
            found = sorted({type(modules[n]).__name__ for n in names})
            raise ValueError(
                f"target_modules: {pattern!r} matches "
                + (f"no nn.Linear, only {', '.join(found)}" if found else "no module")
                + f"; linears are e.g. {', '.join(list(linears)[:8])}"
            )
    wanted = {linear for names in matched.values() for n in names for linear in named[n]}
    return [n for n in linears if n in wanted]


def _names(modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """What a pattern may name, and the linears that are meant: modules, parameters that hold several linears,
    and each of those. A shared module has several names; its linears go by the first."""
    first = {id(m): n for n, m in reversed(modules.items())}
    named: dict[str, list[str]] = {}
    for name, module in modules.items():
        held = {key: join(first[id(module)], key) for key in linears_of(module)}
        named[name] = list(held.values())
        for key in filter(None, held):
            for part in (key, key.rpartition(".")[0]):
                named.setdefault(join(name, part), []).append(held[key])
    return named


def subnet_sizes(
    linears: dict[str, AnyLinear], head: str | None, config: LosiaConfig
) -> dict[str, tuple[int, int]]:
    """``(n_out, n_in)`` of each target; the head keeps all its inputs.

    Raises:
        ValueError: a layer too small to slice, by name.
    """
    sizes = {}
    for name, linear in linears.items():
        if name == head:
            n_in = linear.in_features
            n_out = subnet_size(linear.out_features, config.output_factor, config.group(n_in, True))
        else:
            n_out, n_in = (
                config.n_out(linear.out_features),
                config.n_in(linear.in_features),
            )
        if n_out < 1 or n_in < 1:
            raise ValueError(
                f"{name} is too small to slice: {linear.in_features} inputs and {linear.out_features} "
                f"outputs leave a subnet of {n_in} inputs and {n_out} outputs; raise rank_factor (or "
                "in_factor, out_factor, output_factor), lower neuron_group, or leave it out with target_modules"
            )
        sizes[name] = n_out, n_in
    return sizes


def check_weights(linears: dict[str, AnyLinear], config: LosiaConfig) -> None:
    """Raise a ValueError, by name, for a weight that cannot be tuned in place, or not so."""
    owners: dict[tuple[int, int | None], str] = {}
    biases: dict[int, str] = {}
    for name, linear in linears.items():
        stored = _stored(linear)
        index = linear.index if isinstance(linear, View) else None
        own = isinstance(linear, View) or {"weight", "bias"} <= linear._parameters.keys()
        if not (own and isinstance(stored, nn.Parameter)):
            raise ValueError(
                f"{name} computes its weight or bias from other parameters (weight_norm, parametrizations, pruning); "
                "make them plain ones, or leave the layer out with target_modules"
            )
        if is_sharded(stored):
            raise ValueError(
                f"{name} is sharded already: attach() comes first, then fully_shard(); tensor parallelism is not "
                "supported"
            )
        if stored.is_meta:
            raise ValueError(
                f"{name} is on the meta device; load the model's weights before attach()"
            )
        if stored.is_inference() or torch.is_inference_mode_enabled():
            raise ValueError(
                f"{name} is of torch.inference_mode(), whose tensors cannot be trained; load the model and call "
                "attach() outside of it (torch.no_grad() will do)"
            )
        size = linear.out_features, linear.in_features
        if not isinstance(linear, View) and stored.shape != size:
            raise ValueError(
                f"{name}.weight is {tuple(stored.shape)}, not {size}: attach() takes whole weights; DeepSpeed's "
                "ZeRO-3, which keeps them in pieces, is not supported"
            )
        if stored.dtype not in DTYPES:
            raise ValueError(
                f"{name} has {stored.dtype} weights; only those of fp16, bf16, fp32 or fp64 can be tuned"
            )
        if config.subnet_dtype == "bfloat16" != str(stored.dtype).removeprefix("torch."):
            raise ValueError(
                f'subnet_dtype="bfloat16" is for bf16 weights, and {name} has {stored.dtype}: what its entries hold '
                "would be lost; leave subnet_dtype out, or load the model in bf16"
            )
        weight = stored.data_ptr() or id(stored), index  # two parameters may be of one memory
        if weight in owners:
            raise ValueError(
                f"{name} and {owners[weight]} share one weight; two subnets in it would overwrite "
                "each other: leave one out with target_modules; the gradient is then the other's alone"
            )
        if config.train_bias and index is not None and linear.bias is not None:
            raise ValueError(
                f"train_bias=True: the bias of {name} is part of a parameter of many, which is not trained; "
                "use train_bias=False, or leave it out with target_modules"
            )
        owners[weight] = name
        if config.train_bias and linear.bias is not None:
            other = biases.setdefault(linear.bias.data_ptr(), name)
            if other != name:
                raise ValueError(
                    f"train_bias=True: {name} and {other} share one bias, which would be trained and kept twice; use "
                    "train_bias=False, or leave one out with target_modules"
                )
