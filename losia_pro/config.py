"""What a user chooses: sizes, schedule, scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class LosiaConfig:
    """How LoSiA-Pro adapts a model.

    Args:
        rank_factor: ``p``: a subnet has ``floor(in * p)`` inputs and ``floor(out * p)`` outputs.
        in_factor, out_factor: override ``rank_factor`` for the inputs or the outputs alone.
        period: ``T``, the slot's length in optimizer steps: every ``T`` steps one block's subnets are
            chosen anew, and their learning rate is rewarmed over the next ``T``. None: subnets stay
            where they are and nothing is profiled.
        output_factor: ``p_o``: the output head keeps all inputs and ``floor(out * p_o)`` outputs; 0
            leaves it frozen.
        target_modules: names or suffixes of linears, or one string taken as a regular expression over the
            whole name ("all-linear": every linear but the output head), as PEFT reads them. None: every
            ``nn.Linear`` inside the repeated blocks.
        mode: "pro" computes the subnet's gradient alone; "dense" is plain LoSiA, which forms the full
            gradient and slices it (for ablations).
        init: first subnets "random" (the paper) or "calibrate": chosen by importance from the batches
            given to ``Losia.calibrate``.
        schedule: "async" profiles one group a slot; "sync" all of them in every slot (an ablation).
        strategy: which greedy answer of the localization is taken; see ``losia_pro.localize``.
        importance: "taylor" ``|g w - (g w)^2 / 2|``, "first" ``|g w|`` or "second" ``(g w)^2``.
        score: "iu" importance times uncertainty (the paper), "i" or "u" either alone.
        beta1, beta2: smoothing of importance and of uncertainty, in [0, 1).
        rewarm: rewarm the learning rate of a moved group.
        neuron_group: choose neurons in aligned runs of this many.
        share_inputs: one ``X_S`` for linears that read the same input.
        train_bias: also train the biases of the targeted linears, in full and in their own dtype.
        impl: "torch", "triton", "cuda", or None for the best available on each device.
        seed: of the random first subnets; the same on every rank and device.

    Raises:
        ValueError: for a value out of range, naming it and what would do.
    """

    rank_factor: float = 1 / 8
    period: int | None = 100
    output_factor: float = 0.0
    target_modules: str | Sequence[str] | None = None
    in_factor: float | None = None
    out_factor: float | None = None
    neuron_group: int = 1
    share_inputs: bool = False
    mode: Literal["pro", "dense"] = "pro"
    init: Literal["random", "calibrate"] = "random"
    schedule: Literal["async", "sync"] = "async"
    strategy: Literal["best", "rows", "columns", "independent"] = "best"
    importance: Literal["taylor", "first", "second"] = "taylor"
    score: Literal["iu", "i", "u"] = "iu"
    beta1: float = 0.85
    beta2: float = 0.85
    rewarm: bool = True
    train_bias: bool = False
    impl: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank_factor", "in_factor", "out_factor"):
            value = getattr(self, name)
            if value is None and name != "rank_factor":
                continue
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value!r}")
        if not 0 <= self.output_factor <= 1:
            raise ValueError(f"output_factor must be in [0, 1], got {self.output_factor!r}")
        if self.period is not None and (not isinstance(self.period, int) or self.period < 1):
            raise ValueError(
                f"period must be a number of optimizer steps >= 1, or None for fixed subnets; "
                f"got {self.period!r}"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.neuron_group < 1:
            raise ValueError(f"neuron_group must be >= 1, got {self.neuron_group!r}")
        if self.share_inputs:
            raise ValueError("share_inputs=True is not implemented yet; use share_inputs=False")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    def n_in(self, in_features: int) -> int:
        """``|X_S|`` of a targeted linear with that many inputs."""
        factor = self.rank_factor if self.in_factor is None else self.in_factor
        return subnet_size(in_features, factor, self.neuron_group)

    def n_out(self, out_features: int) -> int:
        """``|Y_S|`` of a targeted linear with that many outputs."""
        factor = self.rank_factor if self.out_factor is None else self.out_factor
        return subnet_size(out_features, factor, self.neuron_group)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for JSON; ``LosiaConfig(**d)`` reads them back."""
        d = dataclasses.asdict(self)
        if isinstance(self.target_modules, tuple):
            d["target_modules"] = list(self.target_modules)
        return d


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "mode": ("pro", "dense"),
    "init": ("random", "calibrate"),
    "schedule": ("async", "sync"),
    "strategy": ("best", "rows", "columns", "independent"),
    "importance": ("taylor", "first", "second"),
    "score": ("iu", "i", "u"),
    "impl": ("torch", "triton", "cuda", None),
}


def subnet_size(features: int, factor: float, group: int = 1) -> int:
    """``floor(features * factor)``, rounded down to a multiple of ``group`` unless it is all of them.

    The product is rounded to 9 digits first, so that e.g. 0.1 * 30 counts 3 and not 2. Zero when the
    layer is too small to slice.
    """
    n = int(round(features * factor, 9))
    return n if n == features else n - n % group
