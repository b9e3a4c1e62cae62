"""The paper's study of the period against the size of the data: three sizes by five periods.

With ``p = 1/8``, as in the study "period". A size is a share of a target's training rows; the number of steps is
in the same share, as in the paper, where more examples are more steps: every size makes the same number of passes over
its data (at the 26 M setting less than one over most targets), and a short period moves a block as often in a small
run as a long one does in a large run. All the data is the study "period" itself, the same runs.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from losia_pro.cli.bench.table import table

from .analysis import SIGNIFICANT
from .corpora import Part
from .methods import Lever, Method, losia
from .plan import Row
from .settings import Setting

STUDY = "period-data"
SIZES = {"1/4": 1 / 4, "1/2": 1 / 2, "1": 1.0}  # of the data, the smallest first
PERIODS = (5, 10, 20, 50, 100)


def share_of(lever: Lever, data: Part, setting: Setting) -> tuple[Part, Setting]:
    """The training rows of a run, and with them its number of steps. ``lever["data"]`` is a share of both: the first
    rows, and as many passes over them."""
    share = lever.get("data", 1)
    rows, steps = (max(1, round(share * n)) for n in (len(data.rows), setting.steps))
    return Part(*(t[:rows] for t in data)), dataclasses.replace(setting, steps=steps)


def name(size: str, period: int) -> str:
    return f"{size} of the data, T={period}"


CONFIGURATIONS: dict[str, Method] = {
    name(size, period): losia(period=period, lever={} if share == 1 else {"data": share})
    for (size, share), period in itertools.product(SIZES.items(), PERIODS)
}


def conclude(rows: list[Row]) -> dict[str, Any]:
    """``period_data``: by target and size the mean test loss of each period, its standard error, and the best period;
    ``sentences``: whether the best period grows with the data."""
    by = {(r["method"], r["target"]): r for r in rows}
    lines: list[Row] = []
    verdicts = []
    for target in dict.fromkeys(r["target"] for r in rows):
        found = [line for size in SIZES if (line := _line(by, target, size))]
        lines += found
        if len(found) == len(SIZES):
            verdicts.append(_verdict(by, target, [line["best_period"] for line in found]))
    return {"period_data": lines, "sentences": [_sentence(lines, verdicts)]}


def _line(by: dict[tuple[str, str], Row], target: str, size: str) -> Row | None:
    """None while a period has no final run, or one of its runs has diverged."""
    found = {t: by.get((f"{STUDY}: {name(size, t)}", target)) for t in PERIODS}
    losses = {t: r["test_loss"] for t, r in found.items() if r and r["test_loss"] is not None}
    if len(losses) < len(PERIODS):
        return None
    return {
        "target": target,
        "data": size,
        "test_loss": {str(t): loss for t, loss in losses.items()},
        "test_loss_se": {str(t): r["test_loss_se"] for t, r in found.items() if r},
        "best_period": min(losses, key=losses.__getitem__),
    }


def _verdict(by: dict[tuple[str, str], Row], target: str, best: list[int]) -> tuple[str, bool]:
    """How the best period goes with the size; whether, with all the data, that of the largest size is better than
    that of the smallest by a paired test."""
    if best[0] == best[-1]:
        way = "stays" if len(set(best)) == 1 else "turns"
    elif best in (sorted(best), sorted(best, reverse=True)):
        way = "grows" if best[0] < best[-1] else "falls"
    else:
        way = "turns"
    largest = list(SIZES)[-1]
    row, other = (f"{STUDY}: {name(largest, t)}" for t in (best[-1], best[0]))
    p = by[row, target]["against"].get(other, {}).get("test_loss_p")
    return way, p is not None and p < SIGNIFICANT


def _sentence(lines: list[Row], verdicts: list[tuple[str, bool]]) -> str:
    ways = [way for way, _ in verdicts]
    clear = sum(sure for way, sure in verdicts if way == "grows")
    parts = [
        f"{target}: {', '.join(str(line['best_period']) for line in mine)}"
        for target, found in itertools.groupby(lines, key=lambda line: line["target"])
        if len(mine := list(found)) == len(SIZES)
    ]
    if not verdicts:
        outcome = "not yet known"
    elif clear > len(ways) / 2:
        outcome = "agrees"
    else:
        outcome = (
            "agrees in part" if ways.count("grows") > ways.count("falls") else "does not agree"
        )
    return (
        f"The paper: the best period grows with the data. Here: with {', '.join(SIZES)} of it the best period is "
        f"{'; '.join(parts) or 'not known'}. It grows on {ways.count('grows')} of {len(ways)} targets, on "
        f"{clear} of them so that with all the data the best of the least is worse (paired, p < {SIGNIFICANT}), "
        f"falls on {ways.count('falls')}, stays on {ways.count('stays')} and is highest or lowest between on "
        f"{ways.count('turns')}: {outcome}."
    )


def text(lines: list[Row]) -> str:
    """Sizes by periods, targets one after another; a star at the best period of a size."""
    cells = [
        [f"{line['target']}, {line['data']}"]
        + [f"{v:.4f}{'*' if int(t) == line['best_period'] else ' '}" for t, v in line["test_loss"].items()]
        for line in lines
    ]  # fmt: skip
    return table(["data", *(f"T={t} " for t in PERIODS)], cells) if cells else ""
