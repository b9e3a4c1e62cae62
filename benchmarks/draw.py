"""Draw the figures of recorded benchmarks: ``python benchmarks/draw.py benchmarks/results/*.json``.

    docs/step-MODEL.png   step time against peak memory of each method, one panel a mode
    docs/kernels.png      time over least traffic against the number of tokens, the default and plain PyTorch

Records of one model are drawn together, so modes that were measured in several runs share a figure; of two
measurements of the same thing the newer counts. Needs matplotlib alone. Colours are Okabe and Ito's, which
colour-blind people can tell apart; markers and line styles say the same again. The background is opaque, so that
the figures can be read on dark and light pages.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from losia_pro.cli.values import names

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
FAMILIES = {  # how a method's name begins, the longest first: its colour
    "losia-pro": BLUE,
    "lora-peft": VERMILION,
    "lora": ORANGE,
    "dora": PURPLE,
    "full": GREEN,
    "floor": BLACK,
}
MARKERS = "osD^v<>PXphd*8"
SELECTIONS = {
    "single": (BLUE, "o", "single neurons"),
    "groups of 8": (ORANGE, "s", "groups of 8"),
    "groups of 16": (GREEN, "D", "groups of 16"),
    "1/64 x all": (VERMILION, "^", "1/64 of inputs, all outputs"),
    "whole": (BLACK, "o", "whole layer"),
}
OPS = ("gather_columns", "subnet_grad", "importance_update_")
BACKGROUND = "#FCFCFC"

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path, help="JSON files of losia-pro bench")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="a folder; default docs")
    parser.add_argument("--methods", metavar="A,B", type=names, help="of the steps; default all")
    args = parser.parse_args()
    records = sorted(
        (json.loads(path.read_text()) for path in args.records), key=lambda r: r["date"]
    )
    args.output.mkdir(parents=True, exist_ok=True)
    drawn = [*draw_steps(records, args.output, args.methods), *draw_kernels(records, args.output)]
    for path in drawn:
        print(path)
    if not drawn:
        raise SystemExit("nothing to draw: no measured step and no timed operation in these files")


def draw_steps(
    records: list[Row], folder: Path, methods: list[str] | None = None
) -> Iterable[Path]:
    """One figure for each model, device and batch shape; of these ``methods``, or of all."""
    found: dict[tuple[str, str, str], dict[tuple[str, str], Row]] = {}
    for record in of(records, "step"):
        a = record["arguments"]
        for row in record["rows"]:
            wanted = methods is None or row["method"] in methods
            if wanted and row["status"] == "ok" and row["method"] != "floor, again":
                whose = row["model"], record["device"]["name"], f"{a['batch']} x {a['length']}"
                found.setdefault(whose, {})[row["mode"], row["method"]] = row
    for (model, device, batch), rows in found.items():
        several = sum(m == model for m, _, _ in found) > 1
        name = f"step-{model}-{slug(device)}-{slug(batch)}" if several else f"step-{model}"
        path = folder / f"{name}.png"
        step_figure(list(rows.values()), f"{model}, {batch} tokens, {device}").savefig(path)
        yield path


def step_figure(rows: list[Row], title: str) -> Figure:
    """Step time against peak memory, a panel a mode; towards the lower left is better."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    style = dict(zip(methods, styles(methods), strict=True))
    figure = Figure(figsize=(3.4 * len(modes) + 2.6, 4.2), layout="constrained", dpi=160)
    figure.set_facecolor(BACKGROUND)
    panels = figure.subplots(1, len(modes), squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        shown = [row for row in rows if row["mode"] == mode]
        for row in shown:
            colour, marker = style[row["method"]]
            spread = [
                [row["median_ms"] - row["p20_ms"]],
                [row["p80_ms"] - row["median_ms"]],
            ]
            axes.errorbar(
                row["peak_bytes"] / 1e9, row["median_ms"], yerr=spread, color=colour, marker=marker,
                markersize=7, markeredgecolor="white", markeredgewidth=0.6, linestyle="none",
            )  # fmt: skip
        floor = next((row["median_ms"] for row in shown if row["method"] == "floor"), None)
        if floor is not None:
            axes.axhline(floor, color=BLACK, linewidth=0.8, linestyle=":")
            over = axes.secondary_yaxis(
                "right", functions=(lambda y, f=floor: y / f, lambda y, f=floor: y * f)
            )
            over.set_ylabel("times the floor" if mode == modes[-1] else "")
        axes.set_title(mode)
        axes.set_xlabel("peak memory (GB)")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        dress(axes)
    panels[0].set_ylabel("step (ms), median, p20 to p80")
    handles = [handle(name, *style[name]) for name in methods]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure


def styles(methods: list[str]) -> list[tuple[str, str]]:
    """A colour for each family and, within it, a marker for each method."""
    used: dict[str, int] = {}
    result = []
    for method in methods:
        family = next((f for f in FAMILIES if method.startswith(f)), "floor")
        number = used.setdefault(family, 0)
        used[family] += 1
        result.append((FAMILIES[family], MARKERS[number % len(MARKERS)]))
    return result


def draw_kernels(records: list[Row], folder: Path) -> Iterable[Path]:
    """One figure of all shapes, for each device."""
    found: dict[str, dict[tuple[Any, ...], Row]] = {}
    for record in of(records, "kernels"):
        for row in record["rows"]:
            if row["op"] in OPS and "median_us" in row["candidates"].get("default", {}):
                key = tuple(row[k] for k in ("op", "selection", "in", "out", "tokens"))
                found.setdefault(record["device"]["name"], {})[key] = row
    for device, rows in found.items():
        path = folder / ("kernels.png" if len(found) == 1 else f"kernels-{slug(device)}.png")
        kernel_figure(list(rows.values()), device).savefig(path)
        yield path


def kernel_figure(rows: list[Row], device: str) -> Figure:
    """Time over least traffic: the geometric mean over the shapes, a panel an operation."""
    ops = [op for op in OPS if any(row["op"] == op for row in rows)]
    figure = Figure(figsize=(3.6 * len(ops) + 0.6, 4.4), layout="constrained", dpi=160)
    figure.set_facecolor(BACKGROUND)
    panels = figure.subplots(1, len(ops), squeeze=False, sharey=True)[0]
    for axes, op in zip(panels, ops, strict=True):
        for selection, (colour, marker, _) in SELECTIONS.items():
            chosen = [r for r in rows if r["op"] == op and r["selection"] == selection]
            for candidate, line in (("default", "-"), ("library", "--")):
                points = over_least(chosen, candidate)
                if points:
                    axes.plot(
                        *zip(*points, strict=True), color=colour, linestyle=line, marker=marker, markersize=5,
                        markerfacecolor=colour if candidate == "default" else BACKGROUND,
                    )  # fmt: skip
        axes.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(op)
        axes.set_xlabel("tokens")
        dress(axes)
    panels[0].set_ylabel("time over least traffic")
    present = {row["selection"] for row in rows}
    handles = [handle(s[2], s[0], s[1]) for k, s in SELECTIONS.items() if k in present]
    for label, line in (("default", "-"), ("plain PyTorch", "--")):
        handles.append(Line2D([], [], color=BLACK, linestyle=line, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"{device}: geometric mean over shapes")
    return figure


def over_least(rows: list[Row], candidate: str) -> list[tuple[int, float]]:
    """For each number of tokens, the geometric mean of a candidate's time over least traffic. Of the
    importance update plain PyTorch is the dense product alone, which is not the same work: left out."""
    ratios: dict[int, list[float]] = {}
    for row in rows:
        if candidate == "library" and row["op"] == "importance_update_":
            continue
        time = row["candidates"].get(candidate, {}).get("median_us")
        if time:
            ratios.setdefault(row["tokens"], []).append(math.log(time / row["least_us"]))
    return [(tokens, math.exp(statistics.fmean(r))) for tokens, r in sorted(ratios.items())]


def of(records: list[Row], benchmark: str) -> list[Row]:
    return [record for record in records if record["benchmark"] == benchmark]


def handle(label: str, colour: str, marker: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)


def dress(axes: Axes) -> None:
    axes.set_facecolor(BACKGROUND)
    axes.grid(alpha=0.25)


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower())


if __name__ == "__main__":
    main()
