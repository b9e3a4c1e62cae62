"""A rule for the learning rate: ``python -m benchmarks.quality.rates FILE.jsonl`` says how the best one follows the
subnets' shape."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from losia_pro import LosiaConfig

from . import studies  # noqa: F401 - the studies' methods
from .methods import METHODS
from .plan import TUNING_SEED


def best_rates(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each method without a lever that trains subnets, by target: the exponent of the rate whose mean loss over
    the tuning seeds is least; searches whose best is at an end of the rates tried are left out."""
    losses: dict[tuple[str, str], dict[int, list[float]]] = {}
    for r in rows:
        method = METHODS.get(r["method"])
        if (
            r["status"] == "ok"
            and method
            and method.kind == "losia"
            and not method.lever
            and r["seed"] >= TUNING_SEED
        ):
            loss = math.inf if r["valid_loss"] is None else r["valid_loss"]
            losses.setdefault((r["method"], r["target"]), {}).setdefault(r["exponent"], []).append(
                loss
            )
    found: dict[str, dict[str, float]] = {}
    for (name, target), by in losses.items():
        best = min(by, key=lambda e: statistics.fmean(by[e]))
        if min(by) < best < max(by):
            found.setdefault(name, {})[target] = best
    return found  # fmt: skip


def rate_rule(rows: list[dict[str, Any]]) -> str:
    """One sentence: the best learning rate against the shares of inputs and outputs that are trained."""
    rates = best_rates(rows)
    if not rates:
        return "No search for a learning rate of subnets is complete in these runs."
    parts = []
    for name, by in sorted(rates.items()):
        config = LosiaConfig(**METHODS[name].settings)
        shape = f"{config.n_in(4096) / 4096:g} x {config.n_out(4096) / 4096:g}"
        mean = statistics.fmean(by.values()) / 2
        spread = f"1e{min(by.values()) / 2:g} to 1e{max(by.values()) / 2:g}"
        parts.append(
            f"{name} (inputs x outputs {shape}) 10^{mean:.2f}, {spread}, on {len(by)} targets"
        )
    return (
        f"Best learning rate, half a decade apart, geometric mean over targets: {'; '.join(parts)}."
    )


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print(rate_rule([json.loads(line) for line in path.read_text().splitlines()]))
