"""What a user chooses: sizes, schedule, scores."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

IN_FACTOR, OUT_FACTOR = 3 / 32, 1.0  # of a subnet, by default
GROUP, FEWEST_GROUPS = 16, 3  # its inputs come in so many runs, at least, of so many neurons


@dataclass(frozen=True)
class LosiaConfig:
    """How LoSiA-Pro adapts a model.

    The defaults are chosen by ``benchmarks/results/quality-26m.json`` (26 M parameters, five targets, five seeds), of
    what takes no more time and memory than an eager step of LLaMA-2 7B with LoRA of rank 64: their loss is lower than
    that LoRA's on all five, and by five other seeds alone too (``quality-seeds-26m.json``). Share of full fine-tuning's
    gain, mean over the targets, and on the C++ target the old domain's loss after tuning (0.720 before):

    - 3/32 of the inputs in runs of 16, at random, and all outputs, with decay (the default): 95.7 %, 0.897;
    - with shared inputs: 95.6 %, 0.903; of single neurons: 95.8 %, 0.896;
    - of single neurons with a decay of 0.5: 96.3 %, 0.918; of 1: 94.9 %, 0.873; without: 95.7 %, 1.024;
    - with a decay of 0.5, a sixteenth of the inputs: 94.3 %, 0.892; an eighth, which takes more memory: 96.9 %, 0.941;
    - an eighth of both, without: 87.3 %, 0.983; that with moves every 10 steps: 87.2 %, 0.931;
    - LoRA of rank 8, at that width what rank 64 is to LLaMA-2 7B: 90.9 %, 0.947; of the default's size: 95.8 %, 1.000.

    Of this shape, subnets that move gained no more than those that stay (``quality-levers-26m.json``), so ``period``
    is None. The paper's square of an eighth is better on C++ where it moves every 5 to 20 steps
    (``quality-paper-26m.json``), and over the five targets no better.
    ``LosiaConfig.paper()`` has the published settings.

    Args:
        rank_factor: ``p``: a subnet has ``floor(in * p)`` inputs and ``floor(out * p)`` outputs. None: 3/32 of the
            inputs, and all outputs.
        in_factor, out_factor: override that for the inputs or the outputs alone.
        period: ``T``, the slot's length in optimizer steps: every ``T`` steps one block's subnets are
            chosen anew, and their learning rate is rewarmed over the next ``T``. None: subnets stay
            where they are and nothing is profiled.
        output_factor: ``p_o``: the output head keeps all inputs and ``floor(out * p_o)`` outputs; 0
            leaves it frozen. Of a head tied to the embedding, its gradient as a head counts.
        target_modules: names or suffixes of linears, or one string taken as a regular expression over the
            whole name ("all-linear": every linear but the output head), as PEFT reads them. None: every
            linear inside the repeated blocks. An expert's is ``experts.down_proj.3``; ``down_proj`` and
            ``experts`` name those of all experts.
        mode: "pro" computes the subnet's gradient alone; "dense" is plain LoSiA, which forms the full
            gradient and slices it (for ablations).
        init: first subnets "random" (the paper) or "calibrate": chosen by importance from the batches
            given to ``Losia.calibrate``.
        schedule: "async" profiles one group a slot; "sync", which needs a period, all of them in every slot (an
            ablation).
        strategy: which greedy answer of the localization is taken; see ``losia_pro.localize``.
        importance: "taylor" ``|g w - (g w)^2 / 2|``, "first" ``|g w|`` or "second" ``(g w)^2``.
        score: "iu" importance times uncertainty (the paper), "i" or "u" either alone.
        beta1, beta2: smoothing of importance and of uncertainty, in [0, 1); without the first, uncertainty is 0.
        rewarm: rewarm the learning rate of a moved group.
        base_decay: weight decay towards the base model instead of towards zero: after each step at learning rate
            ``lr``, ``subnet -= lr * base_decay * (subnet - base)``. For any optimizer, beside its own decay, which
            is best left at 0 then; keeps the base's values of the subnets on the device, in the weight's dtype.
        neuron_group: choose neurons in aligned runs of this many; sizes are rounded down to whole runs. None: with
            the default sizes, runs of 16 inputs where there are three or more (512 inputs); else single neurons.
        share_inputs: one ``X_S`` for linears of a block that read the same input (q, k, v; gate, up): gathered
            and kept once. Found in one forward on the model's ``dummy_inputs``, or ``attach``'s example.
        subnet_dtype: None keeps subnets in fp32 (fp64 for fp64 weights). "bfloat16", for bf16 weights: subnets,
            their gradients and so an optimizer's moments take half the memory, and updates need an optimizer
            that rounds them stochastically: ``losia_pro.optim.AdamW``.
        train_bias: also train the biases of the targeted linears, in full and in their own dtype; not those
            of experts.
        impl: "torch", "triton", "cuda", or None for the best available on each device.
        seed: of the random first subnets; the same on every rank and device.

    Raises:
        ValueError: for a value out of range, a schedule without a period, or scores that would be 0, naming it and what
            would do.
    """

    rank_factor: float | None = None
    period: int | None = None
    output_factor: float = 0.0
    target_modules: str | Sequence[str] | None = None
    in_factor: float | None = None
    out_factor: float | None = None
    neuron_group: int | None = None
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
    base_decay: float = 0.7
    subnet_dtype: Literal["bfloat16"] | None = None
    train_bias: bool = False
    impl: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (kind, fits, wanted) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and wanted.endswith("or None"):
                continue
            number: Any = numbers.Real if kind is float else numbers.Integral
            if not isinstance(value, number) or isinstance(value, bool) or not fits(value):
                raise ValueError(f"{name} must be {wanted}, got {value!r}")
            object.__setattr__(self, name, kind(value))  # a plain one: to_dict's values go to JSON
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not any(type(value) is type(a) and value == a for a in allowed):
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if self.schedule == "sync" and self.period is None:
            raise ValueError(
                "schedule='sync' profiles all groups in every slot, and with period=None there are no slots: give a "
                "period, or leave schedule at 'async'"
            )
        if self.beta1 == 0 and self.score != "i" and (self.period or self.init == "calibrate"):
            raise ValueError(
                "beta1=0 makes smoothed importance the step's own, so that uncertainty, and with it every score of "
                f"score={self.score!r}, is 0 and no subnet would move: give a beta1 above 0, or score='i'"
            )
        patterns = self.target_modules
        if patterns is not None and not isinstance(patterns, str):
            names = tuple(patterns) if isinstance(patterns, Iterable) else ()
            if not names or not all(isinstance(n, str) for n in names):
                raise ValueError(
                    "target_modules must be one string, or one or more names as a list of strings, "
                    f"got {patterns!r}"
                )
            object.__setattr__(self, "target_modules", names)

    @classmethod
    def paper(
        cls, task: Literal["instruction", "commonsense"] = "instruction", **changes: Any
    ) -> LosiaConfig:
        """The published settings: ``p = 1/8``, ``b1 = b2 = 0.85``, ``base_decay = 0``, the rest by the kind of task.

        - "instruction" (batch 4, length 2048): ``T = 150``, ``p_o = 1/8``;
        - "commonsense" (batch 16, length 256): ``T = 50``, and the output head in full, ``p_o = 1``.

        Both at learning rate 5e-5, after 10 % warm-up a cosine to a tenth of it. Those rates and periods are for
        runs of many thousand steps on 7B models: tune the rate, and take a shorter period for a short run, so
        that each block moves a few times.

        Args:
            task: which of the two.
            changes: any other setting, by name.

        Raises:
            ValueError: another task, or a setting out of range.

        Source: Wang et al., EMNLP 2025 (arXiv:2507.04487), and its released scripts ``run_losia_pro.sh`` and
        ``run_losia.sh``.
        """
        if task not in _PAPER:
            raise ValueError(f"task must be one of {tuple(_PAPER)}, got {task!r}")
        shared = {"rank_factor": 1 / 8, "beta1": 0.85, "beta2": 0.85, "base_decay": 0.0}
        return cls(**{**shared, **_PAPER[task], **changes})

    def group(self, in_features: int, head: bool = False) -> int:
        """How many neurons are in a run, of a targeted linear with that many inputs, or of the output head, which
        keeps them all."""
        if self.neuron_group is not None:
            return self.neuron_group
        sized = (self.rank_factor, self.in_factor, self.out_factor) != (None, None, None)
        few = subnet_size(in_features, IN_FACTOR) < FEWEST_GROUPS * GROUP
        return 1 if head or sized or few else GROUP

    def n_in(self, in_features: int) -> int:
        """``|X_S|`` of a targeted linear with that many inputs."""
        factor = _first(self.in_factor, self.rank_factor, IN_FACTOR)
        return subnet_size(in_features, factor, self.group(in_features))

    def n_out(self, out_features: int) -> int:
        """``|Y_S|`` of a targeted linear with that many outputs."""
        factor = _first(self.out_factor, self.rank_factor, OUT_FACTOR)
        return subnet_size(out_features, factor, self.neuron_group or 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for JSON; ``LosiaConfig(**d)`` reads them back."""
        d = dataclasses.asdict(self)
        if isinstance(self.target_modules, tuple):
            d["target_modules"] = list(self.target_modules)
        return d


def _first(*factors: float | None) -> float:
    return next(f for f in factors if f is not None)


_PAPER: dict[str, dict[str, Any]] = {
    "instruction": {"period": 150, "output_factor": 1 / 8},
    "commonsense": {"period": 50, "output_factor": 1.0},
}

_Number = tuple[type[float] | type[int], Callable[[Any], bool], str]

_NUMBERS: dict[str, _Number] = {
    "rank_factor": (float, lambda v: 0 < v <= 1, "in (0, 1] or None"),
    "in_factor": (float, lambda v: 0 < v <= 1, "in (0, 1] or None"),
    "out_factor": (float, lambda v: 0 < v <= 1, "in (0, 1] or None"),
    "output_factor": (float, lambda v: 0 <= v <= 1, "in [0, 1]"),
    "period": (int, lambda v: v >= 1, "a whole number of optimizer steps >= 1 or None"),
    "base_decay": (float, lambda v: 0 <= v < math.inf, "a finite number >= 0"),
    "beta1": (float, lambda v: 0 <= v < 1, "in [0, 1)"),
    "beta2": (float, lambda v: 0 <= v < 1, "in [0, 1)"),
    "neuron_group": (int, lambda v: v >= 1, "a whole number >= 1 or None"),
    "seed": (int, lambda v: 0 <= v < 2**64, "a whole number in [0, 2**64)"),
}

_CHOICES: dict[str, tuple[str | bool | None, ...]] = {
    "mode": ("pro", "dense"),
    "init": ("random", "calibrate"),
    "schedule": ("async", "sync"),
    "strategy": ("best", "rows", "columns", "independent"),
    "importance": ("taylor", "first", "second"),
    "score": ("iu", "i", "u"),
    "impl": ("torch", "triton", "cuda", None),
    "share_inputs": (False, True),
    "rewarm": (False, True),
    "subnet_dtype": (None, "bfloat16"),
    "train_bias": (False, True),
}


def subnet_size(features: int, factor: float, group: int = 1) -> int:
    """``floor(features * factor)``, rounded down to a multiple of ``group`` unless it is all of them.

    The product is rounded to 9 digits first, so that e.g. 0.1 * 30 counts 3 and not 2. Zero when the
    layer is too small to slice.
    """
    n = int(round(features * factor, 9))
    return n if n == features else n - n % group
