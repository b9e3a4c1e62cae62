"""Levers beyond the paper that no configuration can express: each acts on an attached controller, or wraps a function
of the package for as long as a run lasts. What pays may become part of the package.

``Method.lever`` has their settings by name:

- ``zero_decay``: AdamW's own, towards zero.
- ``optimizer``: "muon", ``torch.optim.Muon`` at AdamW's scale of update.
- ``carry``: at a re-selection Adam's moments of entries that stay are kept, and its count of steps; entries that are
  new begin with a first moment of 0 and the mean second moment of the last subnet, for with 0 the kept count would
  make their first updates three times too large.
- ``hysteresis``: at a re-selection the scores of rows and of columns now trained are multiplied by ``1 + hysteresis``.
- ``score``: "|g|" or "g^2", smoothed by ``beta1``, or "|w|", or "random", instead of the importance.
- ``at_once``, ``last_first``: how many groups are profiled in a slot, and whether from the last one on.
- ``inputs``: relative numbers of inputs by projection (1 if not named), at equal total size.
- ``weights``: "bfloat16", of the whole model.
- ``spanning``: the inputs are those whose span holds most of the inputs' second moments, greedily.
- ``norms``: the weights of the norms are trained too.
- ``data``: the share of a target's data that is used (``period_data.py``).
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losia_pro.config import IN_FACTOR, OUT_FACTOR
from losia_pro.optim import AdamW
from losia_pro.profile import Profile
from losia_pro.schedule import Schedule

from .methods import LINEARS, Lever, Method, losia

if TYPE_CHECKING:
    from .methods import Prepared

FIXED: dict[str, Any] = {"in_factor": IN_FACTOR, "out_factor": OUT_FACTOR, "period": None}
SLOTS: dict[str, Any] = {**FIXED, "period": 50}
OFTEN: dict[str, Any] = {**FIXED, "period": 10}  # at 50, a block moves once in 400 steps


def _pull(basis: dict[str, Any], start: int = -4, **lever: Any) -> Method:
    return losia(start=start, lever=lever, **basis)


def fast(**shape: Any) -> dict[str, Method]:
    """A shape as it is, and as steps are faster or smaller with it."""
    return {
        "single": losia(**shape),
        "groups of 8": losia(**shape, neuron_group=8),
        "groups of 16": losia(**shape, neuron_group=16),
        "shared inputs": losia(**shape, share_inputs=True),
        "groups of 16, shared": losia(**shape, neuron_group=16, share_inputs=True),
    }


BF16 = {"weights": "bfloat16"}
EIGHTH: dict[str, Any] = {**FIXED, "in_factor": 1 / 8}
SIXTEENTH: dict[str, Any] = {**FIXED, "in_factor": 1 / 16}
STUDIES: dict[str, dict[str, Method]] = {
    "base-decay": {
        "none": losia(**FIXED),
        "to base, 0.1": losia(**FIXED, base_decay=0.1),
        "to base, 0.5": losia(**FIXED, base_decay=0.5),
        "to base, 1": losia(**FIXED, base_decay=1.0),
        "to base, 2": losia(**FIXED, base_decay=2.0),
        "to zero, 0.1": _pull(FIXED, zero_decay=0.1),
        "1/8 x 1, to base, 0.5": losia(**EIGHTH, base_decay=0.5),
        "1/8 x 1, to base, 1": losia(**EIGHTH, base_decay=1.0),
    },
    "optimizer": {"AdamW": losia(**FIXED), "Muon": _pull(FIXED, optimizer="muon")},
    "carry": {
        f"{name}{', rewarmed' if rewarm else ''}": losia(
            **OFTEN, rewarm=rewarm, lever={"carry": True} if carry else {}
        )
        for carry, name in ((False, "afresh"), (True, "carried"))
        for rewarm in (False, True)
    },
    "hysteresis": {
        "none": losia(**OFTEN),
        **{f"h={h}": _pull(OFTEN, hysteresis=h) for h in (0.5, 2.0)},
    },
    "gradient-score": {
        "importance": losia(**SLOTS),
        "|g|": _pull({**SLOTS, "score": "i"}, score="|g|"),
        "g^2": _pull({**SLOTS, "score": "i"}, score="g^2"),
        "Adam's second moment": _pull({**SLOTS, "score": "i", "beta1": 0.999}, score="g^2"),
        "|w|": _pull(SLOTS, score="|w|"),
        "random": _pull(SLOTS, score="random"),
    },
    "slots": {
        "one at a time": losia(**SLOTS),
        "2 at once": _pull(SLOTS, at_once=2),
        "4 at once": _pull(SLOTS, at_once=4),
        "last first": _pull(SLOTS, last_first=True),
    },
    "budgets": {
        "equal": losia(**FIXED),
        "mlp twice": _pull(FIXED, inputs=dict.fromkeys(LINEARS[4:], 2)),
        "v, o, down twice": _pull(FIXED, inputs=dict.fromkeys(("v_proj", "o_proj", "down_proj"), 2)),
    },
    "bf16": {
        "fp32 subnets": _pull(FIXED, **BF16),
        "bf16 subnets": _pull({**FIXED, "subnet_dtype": "bfloat16"}, **BF16),
    },
    "sizes": {
        "3/32 x 1": losia(**FIXED),
        "1/32 x 1": losia(**{**FIXED, "in_factor": 1 / 32}),
        "1/16 x 1": losia(**SIXTEENTH),
        "1/8 x 1": losia(**EIGHTH),
        "1/4 x 1": losia(**{**FIXED, "in_factor": 1 / 4}),
        "1/8 x 1, Muon": _pull(EIGHTH, optimizer="muon"),
        "1/8 x 1, bf16 subnets": _pull({**EIGHTH, "subnet_dtype": "bfloat16"}, **BF16),
    },
    "sixteenths": {
        "1/16 x 1": losia(**SIXTEENTH),
        "1/8 x 1/2": losia(in_factor=1 / 8, out_factor=1 / 2, period=None),
        "1/4 x 1/4": losia(rank_factor=1 / 4, period=None),
        "1 x 1/16": losia(in_factor=1, out_factor=1 / 16, period=None),
    },
    "fast": fast(**FIXED),
    "start": {
        "random": losia(**FIXED),
        "by importance": losia(**FIXED, init="calibrate"),
        "spanning inputs": _pull(FIXED, spanning=True),
    },
    "besides": {
        "linears": losia(**FIXED),
        "and the head": losia(**FIXED, output_factor=1),
        "and the norms": _pull(FIXED, norms=True),
    },
}  # fmt: skip


# --- for as long as a run lasts ---------------------------------------------------------------------


@contextlib.contextmanager
def pulled(lever: Lever) -> Iterator[None]:
    """What a lever changes in the package itself; ended, all is as before."""
    with contextlib.ExitStack() as stack:

        def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
            old = getattr(owner, name)
            setattr(owner, name, make(old))
            stack.callback(setattr, owner, name, old)

        if "hysteresis" in lever:
            wrap(Profile, "score", lambda old: _with_hysteresis(old, lever["hysteresis"]))
        score = lever.get("score")
        if score in ("|g|", "g^2"):
            wrap(Profile, "update", lambda _: _gradient_only(1 if score == "|g|" else 2))
        if score == "|w|":
            wrap(Profile, "score", lambda _: lambda self: self.module.weight.detach().abs().float())
        if score == "random":
            wrap(Profile, "score", lambda _: lambda self: torch.rand_like(self.importance))
        if "carry" in lever:
            room = importlib.import_module("losia_pro.reselect")
            carrying = _Carrying()
            wrap(room, "relocate", carrying.relocate)
            wrap(room, "forget", lambda _: carrying.forget)
        if "inputs" in lever:
            room = importlib.import_module("losia_pro.controller")
            wrap(room, "subnet_sizes", lambda old: _budgets(old, lever["inputs"]))
        yield


def _with_hysteresis(score: Callable[[Profile], Tensor], h: float) -> Callable[[Profile], Tensor]:
    def raised(self: Profile) -> Tensor:
        s = score(self).clone()
        s[self.module.out_idx] *= 1 + h
        s[:, self.module.in_idx] *= 1 + h
        return s

    return raised


def _gradient_only(power: int) -> Callable[..., None]:
    @torch.no_grad()
    def update(self: Profile, scale: float = 1.0, reduce: Any = None) -> None:
        g = self._whole_grad() * scale
        self.importance.lerp_(g.abs().pow(power).to(self.importance.dtype), 1 - self.config.beta1)
        self.discard()

    return update


class _Carrying:
    """Adam's moments of entries that stay in a subnet which moves."""

    def __init__(self) -> None:
        self.last: dict[Tensor, tuple[Any, Tensor, Tensor]] = {}

    def relocate(self, old: Callable[..., Any]) -> Callable[..., Any]:
        def relocated(modules: Sequence[Any], config: Any) -> Any:
            for m in modules:
                self.last[m.subnet] = m, m.out_idx.clone(), m.in_idx.clone()
            return old(modules, config)

        return relocated

    def forget(self, optimizer: torch.optim.Optimizer, subnet: Tensor) -> None:
        module, old_out, old_in = self.last.pop(subnet)
        state = optimizer.state.get(subnet, {})
        for name, fresh in (("exp_avg", 0.0), ("exp_avg_sq", None)):
            if name in state:
                moment = state[name]
                dense = moment.new_full(
                    module.weight.shape, moment.mean().item() if fresh is None else fresh
                )
                dense[old_out[:, None], old_in] = moment
                moment.copy_(dense[module.out_idx[:, None], module.in_idx])


def _budgets(sizes_of: Callable[..., Any], inputs: dict[str, float]) -> Callable[..., Any]:
    def budgets(linears: Any, head: Any, config: Any) -> dict[str, tuple[int, int]]:
        sizes = sizes_of(linears, head, config)
        share = {n: inputs.get(n.rpartition(".")[2], 1) if n != head else 1 for n in sizes}
        total = sum(out * into for out, into in sizes.values())
        scale = total / sum(share[n] * out * into for n, (out, into) in sizes.items())
        return {
            n: (out, max(1, round(into * share[n] * scale))) for n, (out, into) in sizes.items()
        }

    return budgets  # fmt: skip


# --- on a controller --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slots(Schedule):
    """A slot profiles ``at_once`` groups, in the layers' order or from the last one on."""

    at_once: int = 1
    last_first: bool = False

    def profiled(self, step: int) -> tuple[int, ...]:
        if self.period is None:
            return ()
        slot = step // self.period % math.ceil(self.n_groups / self.at_once)
        first = slot * self.at_once
        groups = range(first, min(first + self.at_once, self.n_groups))
        return tuple(sorted(self.n_groups - 1 - g for g in groups) if self.last_first else groups)


def optimizer_of(lever: Lever, prepared: Prepared, lr: float, fused: bool) -> torch.optim.Optimizer:
    """The optimizer that trains ``prepared``, bound to its controller.

    Raises:
        RuntimeError: this PyTorch has no Muon.
    """
    parameters, controller = prepared.parameters, prepared.losia
    optimizer: torch.optim.Optimizer
    if lever.get("optimizer") == "muon":
        muon: Any = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise RuntimeError(
                f"torch {torch.__version__} has no torch.optim.Muon; 2.9 and later do"
            )
        optimizer = muon(parameters, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    else:
        kind: Any = torch.optim.AdamW
        if controller is not None and controller.config.subnet_dtype:
            kind = AdamW
        optimizer = kind(parameters, lr=lr, weight_decay=lever.get("zero_decay", 0.0), fused=fused)
    if controller is None:
        return optimizer
    if "at_once" in lever or "last_first" in lever:
        old = controller.schedule
        controller.schedule = Slots(
            old.n_groups, old.period, old.synchronous, lever.get("at_once", 1), lever.get("last_first", False)
        )  # fmt: skip
    controller.bind(optimizer)
    return optimizer
