"""Draw how well methods tune against what a step of LLaMA-2 7B costs with them:

    python -m benchmarks.draw_quality_cost benchmarks/results/quality-26m.json benchmarks/results/step-llama2-7b-*.json

docs/quality-cost.png has, over what a step's time and its peak memory are more than the floor's, the share of full
fine-tuning's improvement of the test loss, a mean over the targets with its standard error. ``STEPS`` says which row of
a step record has a method's cost: the same configuration, LoRA with the same rank over the hidden size (8 of 512 there,
64 of 4096 here). Methods whose step was not measured are left out, and named. Prints the figures that it draws.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from losia_pro.cli.bench.table import table

from .draw import BACKGROUND, dress
from .draw_quality import styles

Row = dict[str, Any]

STEPS = {  # method of benchmarks.quality: method of losia-pro bench step
    "full": "full",
    "lora-r8": "lora-r64",
    "lora-r8-decay": "lora-r64",
    "lora-as-1/8": "lora-r40",  # ranks 5 and 20 of 512
    "lora-as-3/32x1": "lora-r240",  # 30
    "lora-as-1/4": "lora-r160",
    "dora-r8": "dora-r64",
    "pissa-r8": "lora-r64",
    "losia-default": "losia-pro-default",
    "losia-1/8": "losia-pro",
    "losia-1/8-calibrated": "losia-pro",
    "losia-1/4": "losia-pro-1/4x1/4",
    "losia-1/4-calibrated": "losia-pro-1/4x1/4",
    "losia-1/4-T10": "losia-pro-1/4x1/4+profile",
    "losia-1/4-T50": "losia-pro-1/4x1/4+profile",
    "losia-1/4-g8": "losia-pro-1/4x1/4-g8",
    "losia-1/4-g16": "losia-pro-1/4x1/4-g16",
    "losia-default-shared": "losia-pro-default-shared",
    "losia-single": "losia-pro-default-g1",
    "losia-single-decay-0.5": "losia-pro-default-g1",  # a decay's rate costs nothing
    "losia-single-decay-1": "losia-pro-default-g1",
    "losia-single-no-decay": "losia-pro-default-g1-base_decay=0",
    "losia-1/16x1-decay": "losia-pro-1/16x1-base_decay=0.5",
    "losia-1/8x1-decay": "losia-pro-1/8x1-base_decay=0.5",
    "losia-1/8x1": "losia-pro-1/8x1",
    "losia-1/16x1": "losia-pro-1/16x1",
    "losia-1/16x1-calibrated": "losia-pro-1/16x1",
    "losia-1/64x1": "losia-pro-rect",
    "losia-1x1/16": "losia-pro-1x1/16",
    "losia-paper-T10": "losia-pro-output_factor=1/8+profile",
    "losia-paper-T50": "losia-pro-output_factor=1/8+profile",
}
BATCH = {"model": "llama2-7b", "batch": 4, "length": 2048}  # of the step records that are read
PANELS = {  # what a step costs more than the floor's
    "more_time": ("time over the floor", lambda x, _=None: f"{x:.0%}"),
    "more_bytes": ("peak memory over the floor's (GB)", lambda x, _=None: f"{x / 1e9:.3g}"),
}
TICKS = {
    "more_time": [0.03, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6],
    "more_bytes": [2e9, 4e9, 8e9, 16e9, 32e9, 64e9],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("quality", type=Path, help="a record of benchmarks.quality")
    parser.add_argument("steps", type=Path, nargs="+", help="records of losia-pro bench step")
    parser.add_argument("--mode", default="eager", help="of the steps; default eager")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="a folder; default docs")
    args = parser.parse_args()
    steps = costs([json.loads(path.read_text()) for path in args.steps], args.mode)
    points, left_out = pair(json.loads(args.quality.read_text()), steps)
    if not points:
        raise SystemExit(f"nothing to draw: no step of {', '.join(left_out)} in these records")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "quality-cost.png"
    figure(points).savefig(path)
    print(
        f"{text(points)}\n\nleft out, their step is not measured: {', '.join(left_out) or 'none'}"
    )
    print(path)


def costs(records: list[Row], mode: str) -> dict[str, Row]:
    """The measured steps of these records by method, in one mode; of two of the same, the newer record's."""
    return {
        row["method"]: row
        for record in sorted(records, key=lambda record: record["date"])
        if record["benchmark"] == "step" and BATCH.items() <= record["arguments"].items()
        for row in record["rows"]
        if row["mode"] == mode and row["status"] == "ok" and row["ratio"]
    }


def pair(quality: Row, steps: dict[str, Row]) -> tuple[list[Row], list[str]]:
    """What is recovered, ``recovered_se``, and the cost's figures, for each method that has all; the names of others.

    A target's standard error over the seeds is that of its loss over what full fine-tuning gains there, which counts as
    exact; runs on different targets are independent.
    """
    targets = quality["plan"]["targets"]
    base = {r["target"]: r["test_loss"] for r in quality["runs"] if r["method"] == "base"}
    rows = {(r["method"], r["target"]): r for r in quality["rows"]}
    points, left_out = [], []
    for method in quality["plan"]["methods"]:
        step = steps.get(STEPS.get(method, ""))
        mine = [rows.get((method, t), {}) for t in targets]
        if not step or not all("recovered" in r for r in mine):
            left_out.append(method)
            continue
        errors = [
            (r["test_loss_se"] or 0.0) / (base[t] - rows["full", t]["test_loss"])
            for t, r in zip(targets, mine, strict=True)
        ]
        point = {"method": method, "step": step["method"], "trainable": mine[0]["trainable"]}
        point |= {name: step[name] for name in ("ratio", "peak_bytes", "median_ms")}
        point["more_time"] = step["ratio"] - 1
        point["more_bytes"] = step["peak_bytes"] - step["floor_peak_bytes"]
        point["recovered"] = statistics.fmean(r["recovered"] for r in mine)
        point["recovered_se"] = math.hypot(*errors) / len(errors)
        points.append(point)
    return points, left_out


def text(points: list[Row]) -> str:
    lines = [
        [p["method"], p["step"], f"{p['recovered']:.1%}", f"{p['recovered_se']:.1%}", f"{p['median_ms']:.0f}"]
        + [f"{p['ratio']:.3f}", f"{p['peak_bytes'] / 1e9:.1f}"]
        for p in sorted(points, key=lambda p: -p["recovered"])
    ]  # fmt: skip
    return table(
        ["method", "step", "of full's gain", "+-", "ms", "over the floor", "GB"], lines, left=2
    )


def figure(points: list[Row]) -> Figure:
    style = styles([p["method"] for p in points])
    drawn = Figure(figsize=(11.0, 4.4), layout="constrained", dpi=150)
    drawn.set_facecolor(BACKGROUND)
    for axes, (column, (label, said)) in zip(drawn.subplots(1, 2), PANELS.items(), strict=True):
        panel(axes, points, style, column)
        axes.xaxis.set_major_formatter(said)
        axes.set_xlabel(f"{label}, LLaMA-2 7B")
        axes.set_ylabel("of full fine-tuning's improvement, small models")
    handles = [
        Line2D([], [], color=c, marker=m, linestyle="none", label=method)
        for method, (c, m) in style.items()
    ]
    drawn.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    return drawn


def panel(axes: Axes, points: list[Row], style: dict[str, tuple[str, str]], column: str) -> None:
    """Both ends of the cost are to be told apart, a hundredth of the floor and twice it: a logarithmic axis."""
    for p in points:
        colour, marker = style[p["method"]]
        axes.errorbar(
            p[column], p["recovered"], yerr=p["recovered_se"], color=colour, marker=marker,
            markersize=7, markeredgecolor="white", markeredgewidth=0.6, linestyle="none",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS[column]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    dress(axes)


if __name__ == "__main__":
    main()
