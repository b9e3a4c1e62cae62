"""The table that the README shows: ``python -m benchmarks.quality.table benchmarks/results/quality-26m.json`` prints it
as Markdown. ``METHODS`` are its rows, and what the command makes without ``--methods``.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from .plan import BASE, Row

METHODS = (
    "full lora-r8 lora-r8-decay lora-as-3/32x1 lora-as-1/8 pissa-r8 dora-r8 losia-default losia-default-shared "
    "losia-single losia-single-decay-0.5 losia-single-decay-1 losia-single-no-decay losia-1/16x1-decay "
    "losia-1/8x1-decay losia-1/4 losia-1/8 losia-paper-T10"
).split()
RIVAL = "lora-r8"


def markdown(record: dict[str, Any]) -> str:
    """Two tables of a record, a column a target: the share of full fine-tuning's improvement of the test loss, with the
    p of the paired difference from LoRA of rank 8; and the old domain's loss, likewise, with exact match.

    Raises:
        ValueError: a method or full fine-tuning has no final run on a target, or a target no run of the base.
    """
    targets = record["plan"]["targets"]
    rows = {(r["method"], r["target"]): r for r in record["rows"]}
    base = {r["target"]: r for r in record["runs"] if r["method"] == BASE}
    methods = [m for m in METHODS if m in record["plan"]["methods"]]
    methods += [m for m in record["plan"]["methods"] if m not in methods]
    needed = dict.fromkeys([*methods, "full"])  # whose gain all others' are shares of
    missing = [f"{m}, {t}" for m in needed for t in targets if (m, t) not in rows]
    missing += [f"{BASE}, {t}" for t in targets if t not in base]
    if missing:
        raise ValueError(f"no final runs of {'; '.join(missing)}: the record is not complete")
    exact = [t for t in targets if "test_exact" in base[t]]
    gains, kept = [], []
    for method in methods:
        mine = [rows[method, t] for t in targets]
        shares = [r["recovered"] for r in mine]
        found = [f"{s:.1%}{_p(r, 'test_loss')}" for s, r in zip(shares, mine, strict=True)]
        gains.append([method, _size(mine), *found, f"{statistics.fmean(shares):.1%}"])
        old = [f"{r['old_loss']:.3f}{_p(r, 'old_loss')}" for r in mine]
        kept.append([method, *old, *(f"{rows[method, t]['test_exact']:.1%}" for t in exact)])
    first = ["the base model", *(f"{base[t]['old_loss']:.3f}" for t in targets)]
    first += [f"{base[t]['test_exact']:.1%}" for t in exact]
    heads = [*(f"after {t}" for t in targets), *(f"{t}: exact" for t in exact)]
    return "\n\n".join(
        [
            _table(["of full's gain", "trained values", *targets, "mean"], gains),
            _table(["old-domain loss", *heads], [first, *kept]),
        ]
    )


def _size(rows: list[Row]) -> str:
    """Methods train the same number of values on every target."""
    (trained,) = {r["trainable"] for r in rows}
    return f"{trained:,.0f}"


def _p(row: Row, figure: str) -> str:
    """Of the paired difference from the rival, for it is in every cell: "" for the rival itself, or without it."""
    p = row["against"].get(RIVAL, {}).get(f"{figure}_p")
    return "" if p is None else " (<.001)" if p < 0.0005 else f" ({p:.3f})".replace("0.", ".", 1)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (head, *rows)]
    lines.insert(1, f"|---|{'--:|' * (len(head) - 1)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
