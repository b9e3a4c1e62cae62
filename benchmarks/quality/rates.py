"""A rule for the learning rate: how the best one follows the share of the weights that is trained.

A search's best rate is where a parabola through the best of the rates tried and its two neighbours, in the logarithm
of the rate, has its least loss. Over all searches of subnets that stay, and of full fine-tuning, whose share is 1,
a straight line is fitted to the logarithms: ``rate = rate_of_full share^power``. A record has it as ``rate_rule``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from losia_pro import LosiaConfig
from losia_pro.cli import options

from . import studies  # noqa: F401 - the studies' methods
from .methods import METHODS, Method
from .plan import TUNING_SEED, Row


def share(method: Method) -> float | None:
    """Of a linear's weights, those that a method trains; None for what the rule is not about."""
    if method.kind == "full":
        return 1.0
    config = LosiaConfig(**method.settings) if method.kind == "losia" else None
    if config is None or config.period or method.lever:
        return None
    return options.share(config)


def best_log_rates(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """By method and target the logarithm (base 10) of the best rate; searches without a worse rate on both sides are
    left out."""
    losses: dict[tuple[str, str], dict[int, list[float]]] = {}
    for r in rows:
        if r["status"] == "ok" and r["seed"] >= TUNING_SEED and r["method"] in METHODS:
            loss = math.inf if r["valid_loss"] is None else r["valid_loss"]
            search = losses.setdefault((r["method"], r["target"]), {})
            search.setdefault(r["exponent"], []).append(loss)
    found = {}
    for search, by in losses.items():
        mean = {e: statistics.fmean(values) for e, values in by.items()}
        best = min(mean, key=mean.__getitem__)
        left, middle, right = (mean.get(best + k, math.inf) for k in (-1, 0, 1))
        bend = left - 2 * middle + right
        if math.isfinite(bend) and bend > 0:
            found[search] = (best + (left - right) / (2 * bend)) / 2
    return found


def fit(rows: Iterable[Row]) -> dict[str, Any] | None:
    """The rule, and what it rests on: ``spread`` is the standard deviation of the best rates from it, in decades.
    None for searches of fewer than two shares."""
    points = [
        (math.log10(s), log_rate, name)
        for (name, _), log_rate in best_log_rates(rows).items()
        if (s := share(METHODS[name])) is not None
    ]
    if len({x for x, _, _ in points}) < 2:
        return None
    line = statistics.linear_regression([x for x, _, _ in points], [y for _, y, _ in points])
    off = [y - line.intercept - line.slope * x for x, y, _ in points]
    return {
        "rate_of_full": round(10**line.intercept, 6),
        "power": round(line.slope, 3),
        "spread": round(math.sqrt(statistics.fmean(e * e for e in off)), 3),
        "searches": len(points),
        "methods": sorted({name for _, _, name in points}),
    }


def said(rule: dict[str, Any]) -> str:
    return (
        f"best rate = {rule['rate_of_full']:.2g} x share^{rule['power']:.2f}, {rule['searches']} searches, standard "
        f"deviation {rule['spread']:.2f} decades; of {', '.join(rule['methods'])}"
    )
