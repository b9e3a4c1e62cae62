"""The ways to tune that are compared, by name, and how each makes a model ready.

floor              all weights frozen, no optimizer: forward and the gradient with respect to the inputs
losia-pro          p = 1/8, subnets that stay; parts may follow, each after a dash: default (LosiaConfig()'s sizes,
                   runs and decay instead), gN (neuron_group=N), AxB (in_factor=A, out_factor=B), rect (1/64x1), shared
                   (share_inputs), bf16 (subnet_dtype="bfloat16"), torch (plain PyTorch slicing), or any field of
                   LosiaConfig as key=value; +profile keeps one layer profiled all the time
lora-rN            LoRA of rank N, lean: adapters in the weights' dtype, no dropout
lora-peft-rN       LoRA as PEFT defaults and is usually trained: fp32 adapters under autocast, dropout 0.05
dora-rN            the same with use_dora
full               every weight
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import losia_pro
from losia_pro.profile import Profile

from ..errors import CliError

DEFAULT = (
    "floor losia-pro-default losia-pro losia-pro+profile losia-pro-g8 losia-pro-g16 losia-pro-g16-shared "
    "losia-pro-rect losia-pro-torch lora-r16 lora-r64 lora-peft-r16 lora-peft-r64 dora-r64 full"
).split()
PARTS: dict[str, dict[str, Any]] = {
    "shared": {"share_inputs": True},
    "rect": {"in_factor": 1 / 64, "out_factor": 1.0},
    "bf16": {"subnet_dtype": "bfloat16"},
    "torch": {"impl": "torch"},
}
FOREVER = 10**9  # optimizer steps: a slot that no benchmark reaches the end of
LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


class Skip(Exception):
    """A method that this model, version or installation does not have."""


@dataclass
class Prepared:
    """A model ready for training: ``check`` raises if its method did not do what its name says."""

    model: nn.Module
    parameters: list[nn.Parameter] = field(default_factory=list)
    autocast: bool = False
    losia: losia_pro.Losia | None = None
    check: Callable[[], None] = lambda: None


Prepare = Callable[[Any], Prepared]


def parse(name: str) -> Prepare:
    """What a method's name stands for.

    Raises:
        CliError: no such method.
    """
    if name == "floor":
        return _floor
    if name == "full":
        return _full
    if lora := re.fullmatch(r"(lora|lora-peft|dora)-r([1-9]\d*)", name):
        kind, rank = lora.groups()
        return lambda model: _lora(model, kind, int(rank))
    base, _, suffix = name.partition("+")
    first, *parts = base.removeprefix("losia-pro").split("-")
    if not base.startswith("losia-pro") or first or suffix not in ("", "profile"):
        raise CliError(f"--methods {name}: is none of {', '.join(DEFAULT)} (see --help for more)")
    default = "default" in parts
    settings: dict[str, Any] = {} if default else {"rank_factor": 1 / 8, "base_decay": 0.0}
    settings["period"] = FOREVER if suffix else None
    for part in parts:
        settings |= {} if part == "default" else _part(name, part)
    return lambda model: _losia(model, settings)


def _part(name: str, part: str) -> dict[str, Any]:
    if group := re.fullmatch(r"g([1-9]\d*)", part):
        return {"neuron_group": int(group[1])}
    if part in PARTS:
        return PARTS[part]
    if shape := re.fullmatch(r"([\d./]+)x([\d./]+)", part):
        return {"in_factor": _value(shape[1]), "out_factor": _value(shape[2])}
    key, equals, text = part.partition("=")
    if not equals:
        raise CliError(
            f"--methods {name}: {part!r} is none of gN, AxB, {', '.join(PARTS)}, FIELD=VALUE"
        )
    return {key: _value(text)}


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    above, slash, below = text.partition("/")
    for read in (int, float):
        try:
            return read(above) / read(below) if slash else read(text)
        except (ValueError, ZeroDivisionError):
            continue
    return text


def _floor(model: Any) -> Prepared:
    model.requires_grad_(False)
    return Prepared(model)


def _full(model: Any) -> Prepared:
    model.requires_grad_(True)
    return Prepared(model, list(model.parameters()))


def _losia(model: Any, settings: dict[str, Any]) -> Prepared:
    try:
        config = losia_pro.LosiaConfig(**settings)
        losia = losia_pro.attach(model, config)
    except (TypeError, ValueError) as error:
        raise Skip(str(error)) from error

    def check() -> None:
        for name, m in losia.modules.items():
            block = m.weight.detach()[m.out_idx[:, None], m.in_idx]
            if not torch.equal(block, m.subnet.detach().to(block.dtype)):
                raise AssertionError(f"{name}: the subnet was not written into the weight")
        profiles = [m.profile for m in losia.modules.values() if isinstance(m.profile, Profile)]
        if config.period and not profiles:
            raise AssertionError("no layer is profiled")
        if not all(bool(p.importance.any()) for p in profiles):
            raise AssertionError("a profiled layer has no importance")

    return Prepared(model, losia.parameters(), losia=losia, check=check)


def _lora(model: Any, kind: str, rank: int) -> Prepared:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Skip("needs the package peft") from error
    lean = kind == "lora"
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0 if lean else 0.05,
        target_modules=LINEARS,
        use_dora=kind == "dora",
    )
    weights = next(model.parameters()).dtype
    with warnings.catch_warnings():  # PEFT asks transformers for a name that has since changed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=not lean)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    matrices = {p.dtype for p in parameters if p.dim() == 2}
    if matrices != {weights if lean else torch.float32}:
        raise AssertionError(f"{kind}: the adapters are {matrices}, not what the name says")
    per_layer = 2 * len(LINEARS) * model.config.num_hidden_layers
    if sum(p.dim() == 2 for p in parameters) != per_layer:
        raise AssertionError(f"{kind}: not {per_layer} adapter matrices")
    return Prepared(adapted, parameters, autocast=not lean)
