"""From runs to the table: mean and standard error over the final seeds, paired differences, what is recovered."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from losia_pro.cli.bench.table import number, table

from .plan import BASE, Plan, Row

RIVALS = ("lora-r8", "lora-as-1/8", "lora-as-1/4")
FIGURES = ("test_loss", "old_loss", "test_exact")


def summary(plan: Plan) -> list[Row]:
    """One row for each method and target with at least one final run."""
    rows = []
    for target in plan.targets:
        base = plan.row(BASE, target, 0, 0)
        finals = {m: _finals(plan, m, target) for m in plan.methods}
        full = [r["test_loss"] for r in finals.get("full", {}).values()]
        for method, runs in finals.items():
            if runs:
                row = {"method": method, "target": target, **_search(plan, method, target)}
                row |= _figures(list(runs.values()))
                if base and full and None not in full and row["test_loss"] is not None:
                    gain = base["test_loss"] - statistics.fmean(full)
                    row["recovered"] = (base["test_loss"] - row["test_loss"]) / gain
                row["against"] = {
                    rival: compared
                    for rival in _rivals(method, plan.methods)
                    if (compared := _compare(runs, finals[rival]))
                }
                rows.append(row)
    return rows


def _rivals(method: str, methods: Sequence[str]) -> list[str]:
    """LoRA, and the others of a method's study."""
    study, colon, _ = method.partition(": ")
    return [
        m for m in methods if m != method and (m in RIVALS or colon and m.startswith(f"{study}: "))
    ]


def _finals(plan: Plan, method: str, target: str) -> dict[int, Row]:
    """The final runs by seed."""
    best = plan.best(method, target)
    if best is None:
        return {}
    found = {seed: plan.row(method, target, best, seed) for seed in range(plan.seeds)}
    return {seed: row for seed, row in found.items() if row}


def _search(plan: Plan, method: str, target: str) -> Row:
    losses = plan.losses(method, target)
    best = plan.best(method, target)
    assert best is not None
    return {
        "lr": plan.job(method, target, best, 0).lr,
        "interior": min(losses) < best < max(losses),
        "grid": {
            f"{plan.job(method, target, e, 0).lr:g}": None if math.isinf(loss) else loss
            for e, loss in losses.items()
        },
    }


def _figures(runs: Sequence[Row]) -> Row:
    row: Row = {"n": len(runs)}
    for figure in FIGURES:
        values = [r[figure] for r in runs if r.get(figure) is not None]
        if figure in runs[0]:
            whole = len(values) == len(runs)
            row[figure] = statistics.fmean(values) if whole else None
            row[f"{figure}_se"] = standard_error(values) if whole else None
    for figure in ("seconds", "trainable", "peak_bytes"):
        values = [r[figure] for r in runs if r.get(figure) is not None]
        row[figure] = statistics.median(values) if values else None
    return row


def standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _compare(mine: dict[int, Row], theirs: dict[int, Row]) -> Row | None:
    """Mine minus the rival's over the seeds that both have: negative is better, of a loss."""
    seeds = sorted(mine.keys() & theirs.keys())
    found: Row = {"n": len(seeds)}
    for figure in FIGURES:
        pairs = [(mine[s].get(figure), theirs[s].get(figure)) for s in seeds]
        if pairs and all(a is not None and b is not None for a, b in pairs):
            differences = [a - b for a, b in pairs]  # type: ignore[operator]
            found[figure] = statistics.fmean(differences)
            found[f"{figure}_p"] = paired_p(differences)
    return found if len(found) > 1 else None


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a paired t-test; None for fewer than two pairs, no spread, or without SciPy."""
    try:
        from scipy.stats import t
    except ImportError:
        return None
    se = standard_error(differences)
    if not se:
        return None
    return float(2 * t.sf(abs(statistics.fmean(differences) / se), len(differences) - 1))


def text(plan: Plan, rows: list[Row]) -> str:
    """A table for each target, the best first."""
    parts = []
    for target in plan.targets:
        base = plan.row(BASE, target, 0, 0)
        mine = sorted(
            (r for r in rows if r["target"] == target), key=lambda r: r["test_loss"] or math.inf
        )
        if base and mine:
            exact = "test_exact" in base
            parts.append(f"{target}\n{_table(base, mine, exact)}")
    return "\n\n".join(parts)


def _table(base: Row, rows: list[Row], exact: bool) -> str:
    head = [
        "method",
        "trained",
        "lr",
        "n",
        "loss",
        "+-",
        "recovered",
        "- lora-r8",
        "p",
        "old",
        "+-",
    ]
    first = [
        "base",
        "",
        "",
        "",
        number(base["test_loss"], 4),
        "",
        "",
        "",
        "",
        number(base["old_loss"], 4),
        "",
    ]
    lines = [[*first, f"{base['test_exact']:.1%}"] if exact else first]
    for r in rows:
        against = r["against"].get("lora-r8", {})
        line = [
            r["method"], f"{r['trainable']:,.0f}", f"{r['lr']:g}" + ("" if r["interior"] else "*"), str(r["n"]),
            number(r["test_loss"], 4), number(r["test_loss_se"], 1) if r["test_loss_se"] else "-",
            f"{r['recovered']:.1%}" if "recovered" in r else "-",
            f"{against['test_loss']:+.4f}" if "test_loss" in against else "-",
            f"{against['test_loss_p']:.2g}" if against.get("test_loss_p") is not None else "-",
            number(r["old_loss"], 4), number(r["old_loss_se"], 1) if r["old_loss_se"] else "-",
        ]  # fmt: skip
        lines.append([*line, f"{r['test_exact']:.1%}"] if exact else line)
    return table([*head, "exact"] if exact else head, lines)
