"""The paper's bound on what one SGD step loses by training some entries alone, against what it does lose.

``python -m benchmarks.quality --study bound``: for each target one batch's gradient at the base model. In every
linear of the decoder layers, with its inputs ``x`` ``(M, in)`` and its gradient ``G``:

    error = 1/M || x (W - lr G)^T - x (W - lr 1_P G)^T ||_F^2   <=   lr^2 / M || 1_{not in P} G ||_F^2 || x ||_F^2

``P`` is chosen in four ways, at four sizes. The rate is the one, half a decade apart, at which the step on all entries
lowers the batch's loss most; of that lowering, the share that the step on ``P`` in all linears gives is measured too.
Weights and products are fp64. Writes JSON; ``python -m benchmarks.draw_quality_bound`` draws it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import math
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losia_pro
from losia_pro import LosiaConfig, reference
from losia_pro.cli.bench import device as devices
from losia_pro.cli.bench.record import revision, versions
from losia_pro.cli.bench.table import table

from . import choice, corpora, model
from .corpora import Domain, Part
from .methods import CALIBRATION
from .plan import Row, rate
from .settings import Setting
from .sources import PYTHON
from .training import batch_size

STUDY = "bound"
SIZES = {
    "1/16": 1 / 16,
    "1/8": 1 / 8,
    "1/4": 1 / 4,
    "1/2": 1 / 2,
}  # the shares of inputs and of outputs
RANDOM, LOCALIZED, GREEDY, LARGEST = WAYS = (  # the last one's entries are no subnet
    "random",
    "localized by the score of batches before",
    "localized by this gradient's squares",
    "largest |gradient|",
)
RATES = range(-8, 7)  # exponents of the learning rate, in half decades
NOT_SHOWN = [
    "One batch a target and one step: nothing about many steps, or another optimizer.",
    "Each linear's error is at the inputs that the base model gives it, as the bound has it.",
]
Masks = dict[str, Tensor]


def run(args: argparse.Namespace, setting: Setting, device: torch.device) -> int:
    """The study's record, and its sentence."""
    begun = time.perf_counter()
    domains, about = corpora.build(setting, *choice.wanted(args))
    targets = choice.targets(args, domains)
    base = model.build(setting, device)
    folder = args.base / corpora.base_digest(setting, about)
    if not model.load(base, folder):
        base = model.pretrain(setting, domains[PYTHON]["train"].to(device), device.type == "cuda")
        model.save(base, folder)
    rows: list[Row] = []
    for target in targets:
        rows += measure(setting, base, domains[target], target)
        print(f"{time.perf_counter() - begun:6.1f} s  {target}", flush=True)
    record = {
        "benchmark": "error-bound",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "setting": dataclasses.asdict(setting),
        "device": devices.describe(device),
        "versions": versions(),
        "revision": args.revision or revision(),
        "corpora": {t: about[t] for t in targets},
        "base": model.digest(base),
        "layers": names(base),
        "not_shown": NOT_SHOWN,
        "seconds": round(time.perf_counter() - begun, 1),
        "sentence": sentence(rows),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    args.output.write_text(f'{json.dumps(record, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    print(f"\n{text(rows)}\n\n{record['sentence']}\nrecorded in {args.output}")
    return 0


def measure(setting: Setting, base: nn.Module, domain: Domain, target: str) -> list[Row]:
    """A row for each way to choose ``P`` and each size; ``error`` and ``bound`` by layer, ``holds`` in so many."""
    size, data = batch_size(setting, target), domain["train"].to(next(base.parameters()).device)
    *before, batch = model.batches(data, size, CALIBRATION + 1, seed=0)
    net = copy.deepcopy(base).double()
    step = Step(net, batch, names(base))
    rows = []
    for name, p in SIZES.items():
        for way in WAYS:
            masks = step.masks(base, p, way, before)
            errors, bounds = step.errors(masks), step.bounds(masks)
            rows.append(
                {
                    "target": target, "p": name, "way": way, "lr": step.lr,
                    "loss_before": step.before, "loss_full": step.full, "loss": step.loss(masks),
                    "gradient_kept": step.kept(masks),
                    "error": [float(f"{v:.4g}") for v in errors.values()],
                    "bound": [float(f"{v:.4g}") for v in bounds.values()],
                    "holds": sum(errors[n] <= bounds[n] for n in errors),
                }
            )  # fmt: skip
    return rows


class Step:
    """One SGD step of the linears of these names, at the rate that lowers the loss most; ``net`` stays as it is."""

    def __init__(self, net: nn.Module, batch: Part, names: list[str]) -> None:
        self.net, self.batch = net, batch
        self.linears: dict[str, Any] = {n: net.get_submodule(n) for n in names}
        self.x: Masks = {}
        hooks = [
            m.register_forward_pre_hook(lambda _, x, n=n: self.x.update({n: x[0].detach()}))
            for n, m in self.linears.items()
        ]
        loss = model.training_loss(net, batch)
        for hook in hooks:
            hook.remove()
        loss.backward()
        self.before = loss.item()
        self.x = {n: x.flatten(0, -2) for n, x in self.x.items()}
        self.grad: Masks = {n: m.weight.grad for n, m in self.linears.items()}
        net.zero_grad()
        losses = {}
        for exponent in RATES:
            self.lr = rate(exponent)
            found = self.loss({n: torch.ones_like(g) for n, g in self.grad.items()})
            losses[self.lr] = found if math.isfinite(found) else math.inf
        self.lr = min(losses, key=losses.__getitem__)
        self.full = losses[self.lr]

    @torch.no_grad()
    def loss(self, masks: Masks) -> float:
        """Of the same batch, after the step on the entries of the masks."""
        old = {n: m.weight.clone() for n, m in self.linears.items()}
        for n, m in self.linears.items():
            m.weight.sub_(self.lr * masks[n] * self.grad[n])
        found = float(model.training_loss(self.net, self.batch))
        for n, m in self.linears.items():
            m.weight.copy_(old[n])
        return found

    @torch.no_grad()
    def errors(self, masks: Masks) -> dict[str, float]:
        """Between each layer's outputs after the step on all entries and after that on the masks'."""
        found = {}
        for n, m in self.linears.items():
            whole = F.linear(self.x[n], m.weight - self.lr * self.grad[n])
            part = F.linear(self.x[n], m.weight - self.lr * masks[n] * self.grad[n])
            found[n] = float((whole - part).square().sum() / len(self.x[n]))
        return found

    def bounds(self, masks: Masks) -> dict[str, float]:
        return {
            n: float(reference.error_bound(self.lr, self.grad[n], masks[n], self.x[n]))
            for n in masks
        }

    def kept(self, masks: Masks) -> float:
        """The masks' share of the gradients' squares."""
        whole = sum(float(g.square().sum()) for g in self.grad.values())
        return sum(float((masks[n] * g).square().sum()) for n, g in self.grad.items()) / whole

    def masks(self, base: nn.Module, p: float, way: str, before: list[Part]) -> Masks:
        """1 at the entries of ``P``: as many for each way."""
        chosen = subnets(base, p, RANDOM if way in (GREEDY, LARGEST) else way, before)
        found = {}
        for n, (rows, columns) in chosen.items():
            grad = self.grad[n]
            if way == LARGEST:
                entries = torch.zeros_like(grad).flatten()
                entries[grad.abs().flatten().topk(len(rows) * len(columns)).indices] = 1
                found[n] = entries.view_as(grad)
                continue
            if way == GREEDY:
                rows, columns = losia_pro.localize(grad.square(), len(rows), len(columns))
            found[n] = reference.mask(grad, rows, columns)
        return found


def names(base: nn.Module) -> list[str]:
    """Of the linears that the package adapts."""
    return list(subnets(base, 1 / 2, RANDOM, []))


def subnets(
    base: nn.Module, p: float, way: str, before: list[Part]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The subnets that the package chooses at the start: outputs and inputs, by the linear's name."""
    init = "calibrate" if way == LOCALIZED else "random"
    config = LosiaConfig(rank_factor=p, period=None, init=init)
    losia = losia_pro.attach(copy.deepcopy(base), config)
    if way == LOCALIZED:
        losia.calibrate(before, model.training_loss)
    return {n: (m.out_idx, m.in_idx) for n, m in losia.modules.items()}


def left(row: Row, rows: list[Row], figure: str) -> float:
    """The geometric mean over the layers of the error or the bound, over that of a random subnet of the smallest
    size."""
    (first,) = (
        r
        for r in rows
        if (r["target"], r["p"], r["way"]) == (row["target"], next(iter(SIZES)), RANDOM)
    )
    pairs = zip(row[figure], first[figure], strict=True)
    return statistics.geometric_mean(a / b for a, b in pairs)


def gained(row: Row) -> float:
    """The share of the whole step's lowering of the loss."""
    return (row["loss_before"] - row["loss"]) / (row["loss_before"] - row["loss_full"])


def text(rows: list[Row]) -> str:
    """A line for each way and size: means over the targets."""
    lines = []
    for way in WAYS:
        for p in SIZES:
            mine = [r for r in rows if (r["way"], r["p"]) == (way, p)]
            ratios = [b / e for r in mine for e, b in zip(r["error"], r["bound"], strict=True)]
            kept, gain = (statistics.fmean(f(r) for r in mine) for f in (_kept, gained))
            error, bound = (
                statistics.geometric_mean(left(r, rows, f) for r in mine)
                for f in ("error", "bound")
            )
            held = f"{sum(r['holds'] for r in mine)} of {len(ratios)}"
            line = [held, f"{statistics.median(ratios):.1f}", f"{kept:.1%}", f"{error:.3f}"]
            lines.append([way, p, *line, f"{bound:.3f}", f"{gain:.1%}"])
    heads = "holds in|bound / error|gradient kept|error left|bound left|of the step's gain"
    return table(["P", "p", *heads.split("|")], lines)


def _kept(row: Row) -> float:
    return float(row["gradient_kept"])


def sentence(rows: list[Row]) -> str:
    """Whether the bound holds, how loose it is, and what choosing by it is worth."""
    ratios = sorted(b / e for r in rows for e, b in zip(r["error"], r["bound"], strict=True))
    held = sum(r["holds"] for r in rows)
    eighth = {way: [r for r in rows if (r["way"], r["p"]) == (way, "1/8")] for way in WAYS}
    gains = [
        f"{way} {statistics.fmean(map(_kept, mine)):.0%} and {statistics.fmean(map(gained, mine)):.0%}"
        for way, mine in eighth.items()
    ]
    verdict = "agrees" if held == len(ratios) else "does not agree"
    return (
        f"The paper: one SGD step that trains P alone errs by lr^2 / M ||1_(not in P) grad||^2 ||x||^2 at most. Here: "
        f"so it is in {held} of {len(ratios)} cases, of layers, sizes, ways and targets; the bound is "
        f"{statistics.median(ratios):.1f} times the error (median; {ratios[0]:.1f} to {ratios[-1]:.0f}): {verdict}. At "
        f"p = 1/8, P's share of the gradient's squares and of what the whole step gains: {'; '.join(gains)}."
    )
