"""From runs to the table: mean and standard error over the final seeds, paired differences, what is recovered."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from losia_pro.cli.bench.table import number, table

from .plan import BASE, Plan, Row

RIVALS = ("lora-r8", "lora-r12", "lora-as-3/32x1", "lora-as-1/8", "losia-default")
FIGURES = ("test_loss", "old_loss", "test_exact")
SIGNIFICANT = 0.05  # p of a paired test


def summary(plan: Plan) -> list[Row]:
    """One row for each method and target with at least one final run."""
    if plan.sequence:
        return continual(plan)
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


TRANSFER = ("AP", "FWT", "BWT")


def continual(plan: Plan) -> list[Row]:
    """One row for each method: average performance, forward and backward transfer over the targets in their order.

    ``P[i, j]`` is minus the loss on target ``j`` after the ``i``-th tuning, ``P[0, j]`` of the base:

        AP  = 1/N sum_i P[N, i]          FWT = 1/N sum_i (P[i, i] - P[0, i])
        BWT = 1/(N-1) sum_{i<N} (P[N, i] - P[i, i])
    """
    base = [plan.row(BASE, target, 0, 0) for target in plan.targets]
    found: dict[str, dict[int, Row]] = {}
    for method in plan.methods:
        for seed in range(plan.seeds):
            jobs = plan.finals(method, seed)
            run = plan.rows.get(plan.key(jobs[0])) if jobs else None
            if run and all(base) and not any(None in losses for losses in run["matrix"]):
                values = transfer([r["test_loss"] for r in base if r], run["matrix"])
                figures = dict(zip(TRANSFER, values, strict=True))
                found.setdefault(method, {})[seed] = {**figures, "trainable": run["trainable"]}
    rows = []
    for method, runs in found.items():
        row: Row = {"method": method, "sequence": plan.targets, "n": len(runs), "against": {}}
        row["trainable"] = next(iter(runs.values()))["trainable"]
        for figure in TRANSFER:
            values = [run[figure] for run in runs.values()]
            row[figure], row[f"{figure}_se"] = statistics.fmean(values), standard_error(values)
        for rival in RIVALS:
            if rival in found and rival != method:
                row["against"][rival] = _compare(runs, found[rival], TRANSFER)
        rows.append(row)
    return rows


def transfer(base: list[float], matrix: list[list[float]]) -> tuple[float, float, float]:
    """AP, FWT and BWT from losses: ``matrix[i][j]`` on target ``j`` after tuning number ``i``, from 0."""
    n = len(matrix)
    own = [-matrix[i][i] for i in range(n)]
    last = [-loss for loss in matrix[-1]]
    return (
        statistics.fmean(last),
        statistics.fmean(p + loss for p, loss in zip(own, base, strict=True)),
        statistics.fmean(a - b for a, b in zip(last[:-1], own[:-1], strict=True)),
    )


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


def _compare(
    mine: dict[int, Row], theirs: dict[int, Row], figures: Sequence[str] = FIGURES
) -> Row | None:
    """Mine minus the rival's over the seeds that both have: negative is better, of a loss."""
    seeds = sorted(mine.keys() & theirs.keys())
    found: Row = {"n": len(seeds)}
    for figure in figures:
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
    """A table for each target, the best first; one for all if they were tuned to one after another."""
    if plan.sequence:
        lines = [
            [r["method"], f"{r['trainable']:,}", str(r["n"])]
            + [f"{r[figure]:.4f}" for figure in TRANSFER]
            + [_p(r["against"].get("lora-r8"), figure) for figure in TRANSFER]
            for r in sorted(rows, key=lambda r: -r["AP"])
        ]
        heads = [f"{figure}, p" for figure in TRANSFER]
        return table(["method", "trained", "n", *TRANSFER, *heads], lines) if lines else ""
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


def _p(against: Row | None, figure: str) -> str:
    """Of the comparison with LoRA."""
    p = against.get(f"{figure}_p") if against else None
    return "-" if p is None else f"{p:.2g}"


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
            number(r["test_loss"], 4), number(r["test_loss_se"], 4) if r["test_loss_se"] else "-",
            f"{r['recovered']:.1%}" if "recovered" in r else "-",
            f"{against['test_loss']:+.4f}" if "test_loss" in against else "-",
            _p(against, "test_loss"),
            number(r["old_loss"], 4), number(r["old_loss_se"], 4) if r["old_loss_se"] else "-",
        ]  # fmt: skip
        lines.append([*line, f"{r['test_exact']:.1%}"] if exact else line)
    return table([*head, "exact"] if exact else head, lines)
