"""The methods that are compared: a table of named configurations, and how each makes a model trainable.

Each has the exponent its search for a learning rate starts at: the rate is ``10 ** (exponent / 2)``. LoRA and its
relatives act on the same linears as the subnets: all in the decoder layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import losia_pro
from losia_pro import LosiaConfig
from losia_pro.config import GROUP, IN_FACTOR, OUT_FACTOR

from .corpora import Part
from .model import training_loss

LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
CALIBRATION = 4  # batches
STUDY = 9  # the tier of what is no part of the table
SIZES = {"rank_factor", "in_factor", "out_factor"}
Lever = dict[str, Any]  # what levers.py does beside the configuration, by name


@dataclass(frozen=True)
class Method:
    """``tier``: those of a lower one are run first. ``area``: for LoRA, the share of the weights whose number
    its rank is made to match."""

    kind: str  # "full", "lora" or "losia"
    start: int
    tier: int
    settings: dict[str, Any] = field(default_factory=dict)
    area: float | None = None
    lever: Lever = field(default_factory=dict)

    def decides(self) -> str:
        """All of it that decides a run, defaults included; what is None is left out, so that an option that comes
        later and is None makes no other run of it."""
        settings = self.settings
        if self.kind == "losia":
            settings = LosiaConfig(**settings).to_dict()
            settings = {k: v for k, v in settings.items() if v is not None}
            sized = SIZES & settings.keys()
            if not sized:  # the default's, which may be another one day
                settings |= {"in_factor": IN_FACTOR, "out_factor": OUT_FACTOR}
            settings.setdefault("neuron_group", 1 if sized else GROUP)
            if {"in_factor", "out_factor"} <= settings.keys():
                settings.pop("rank_factor", None)  # overridden
            if not settings["base_decay"]:  # it came later
                del settings["base_decay"]
        parts = (self.kind, sorted(settings.items()), self.area)
        return repr((*parts, sorted(self.lever.items())) if self.lever else parts)


def losia(
    tier: int = STUDY, start: int = -4, lever: Lever | None = None, **settings: Any
) -> Method:
    """The paper's size and no decay, unless ``settings`` have others."""
    settings = {"rank_factor": 1 / 8, "base_decay": 0.0, **settings}
    return Method("losia", start, tier, settings, lever=lever or {})


def _lora(tier: int, start: int = -5, area: float | None = None, **settings: Any) -> Method:
    return Method("lora", start, tier, settings, area)


FIXED: dict[str, Any] = {"period": None}
CALIBRATED: dict[str, Any] = {"period": None, "init": "calibrate"}
PAPER = LosiaConfig.paper()
PUBLISHED = {k: getattr(PAPER, k) for k in ("rank_factor", "output_factor", "beta1", "beta2")}
METHODS = {
    "full": Method("full", -6, 1),
    "lora-r8": _lora(1, r=8),
    "lora-as-1/8": _lora(1, area=1 / 64),
    "losia-paper-T10": losia(1, **PUBLISHED, period=10),  # each block moves about as often as there
    "losia-1/8": losia(1, rank_factor=1 / 8, **FIXED),
    "losia-1/4": losia(1, rank_factor=1 / 4, **FIXED),
    "losia-1/16x1": losia(1, in_factor=1 / 16, out_factor=1, **FIXED),
    "losia-default": Method("losia", -4, 1),
    "losia-default-shared": Method("losia", -4, 1, {"share_inputs": True}),
    "losia-single": Method("losia", -4, 1, {"neuron_group": 1}),
    "losia-single-decay-0.5": Method("losia", -4, 1, {"neuron_group": 1, "base_decay": 0.5}),
    "losia-single-decay-1": Method("losia", -4, 1, {"neuron_group": 1, "base_decay": 1.0}),
    "losia-single-no-decay": Method("losia", -4, 1, {"neuron_group": 1, "base_decay": 0.0}),
    "losia-1/16x1-decay": losia(1, in_factor=1 / 16, out_factor=1, base_decay=0.5, **FIXED),
    "lora-as-3/32x1": _lora(1, area=3 / 32),
    "losia-1/8x1-decay": losia(1, in_factor=1 / 8, out_factor=1, base_decay=0.5, **FIXED),
    "lora-r8-decay": replace(_lora(1, r=8), lever={"zero_decay": 0.5}),
    "losia-1/8x1": losia(1, in_factor=1 / 8, out_factor=1, **FIXED),
    "losia-1/16x1-calibrated": losia(1, in_factor=1 / 16, out_factor=1, **CALIBRATED),
    "lora-as-1/4": _lora(2, area=1 / 16),
    "losia-1/4-calibrated": losia(2, rank_factor=1 / 4, **CALIBRATED),
    "losia-1/4-g16": losia(2, rank_factor=1 / 4, neuron_group=16, **FIXED),
    "losia-1/4-T10": losia(2, rank_factor=1 / 4, period=10),
    "lora-r12": _lora(2, r=12),  # of the larger model's hidden size, what 8 is of the other's
    "dora-r8": _lora(2, r=8, use_dora=True),
    "pissa-r8": _lora(2, start=-6, r=8, lora_alpha=8, init_lora_weights="pissa_niter_16"),
    "losia-paper-T50": losia(3, **PUBLISHED, period=50),
    "losia-1/4-T50": losia(3, rank_factor=1 / 4, period=50),
    "losia-1/8-calibrated": losia(3, rank_factor=1 / 8, **CALIBRATED),
    "losia-1/4-g8": losia(3, rank_factor=1 / 4, neuron_group=8, **FIXED),
    "losia-1/64x1": losia(3, in_factor=1 / 64, out_factor=1, **FIXED),
    "losia-1x1/16": losia(3, in_factor=1, out_factor=1 / 16, **FIXED),
}


@dataclass
class Prepared:
    model: nn.Module
    parameters: list[Tensor]
    losia: losia_pro.Losia | None = None
    rank: int | None = None

    def finish(self) -> Any:
        """A plain model with the tuned weights, all of them trainable."""
        plain: Any = self.model
        if self.losia is not None:
            plain = self.losia.detach()
        elif self.rank is not None:
            plain = plain.merge_and_unload()
        return plain.requires_grad_(True)

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.parameters)


def prepare(method: Method, model: Any, seed: int, first: Callable[[], list[Part]]) -> Prepared:
    """Make ``model`` trainable. ``first()`` gives the first batches, for a calibrated start."""
    if method.kind == "full":
        return Prepared(model, list(model.parameters()))
    if method.kind == "losia":
        config = LosiaConfig(**method.settings, seed=seed)
        if "weights" in method.lever:
            model.to(getattr(torch, method.lever["weights"]))
        losia = losia_pro.attach(model, config)
        if config.init == "calibrate":
            losia.calibrate(first(), training_loss)
        return Prepared(model, list(losia.parameters()), losia)
    from peft import LoraConfig, get_peft_model

    settings = dict(method.settings)
    rank = settings.setdefault("r", method.area and _rank_of_area(model, method.area))
    settings.setdefault("lora_alpha", 2 * rank)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=LINEARS, lora_dropout=0.0, **settings)
    with warnings.catch_warnings():  # PEFT asks transformers for a name that has since changed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted = get_peft_model(model, config)
    return Prepared(adapted, [p for p in adapted.parameters() if p.requires_grad], rank=rank)


def _rank_of_area(model: nn.Module, area: float) -> int:
    """The rank that trains about as many values as subnets with this share of the weights."""
    shapes = [m.weight.shape for n, m in model.named_modules() if n.endswith(tuple(LINEARS))]
    return max(1, round(area * sum(out * into for out, into in shapes) / sum(map(sum, shapes))))
