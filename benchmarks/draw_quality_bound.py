"""Draw the error bound of a record of ``python -m benchmarks.quality --study bound``:

    python -m benchmarks.draw_quality_bound benchmarks/results/quality-bound-26m.json

docs/quality-error-bound.png has, from left to right: each layer's measured error against its bound; what is left of
both when more is trained; and the share of the whole step's gain. Means over the targets.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .draw import BACKGROUND, BLACK, BLUE, GREEN, MARKERS, ORANGE, VERMILION, dress
from .quality.bound import SIZES, WAYS, gained, left

Row = dict[str, Any]

STYLE = dict(zip(WAYS, zip((ORANGE, BLUE, GREEN, VERMILION), MARKERS, strict=False), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="a folder; default docs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "quality-error-bound.png"
    figure(json.loads(args.record.read_text())["rows"]).savefig(path)
    print(path)


def figure(rows: list[Row]) -> Figure:
    drawn = Figure(figsize=(12.0, 4.4), layout="constrained", dpi=150)
    drawn.set_facecolor(BACKGROUND)
    scatter, lost, gain = drawn.subplots(1, 3)
    each_layer(scatter, rows)
    for way, (colour, marker) in STYLE.items():
        mine = [[r for r in rows if (r["way"], r["p"]) == (way, p)] for p in SIZES]
        for figure, line in (("error", "-"), ("bound", "--")):
            values = [statistics.geometric_mean(left(r, rows, figure) for r in m) for m in mine]
            lost.plot(list(SIZES.values()), values, line, color=colour, marker=marker)
        values = [statistics.fmean(gained(r) for r in m) for m in mine]
        gain.plot(list(SIZES.values()), values, color=colour, marker=marker)
    for axes in (lost, gain):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(SIZES.values()), list(SIZES))
        axes.set_xlabel("p, the share of inputs and of outputs in P")
        dress(axes)
    lost.set_yscale("log")
    lost.set_ylabel("of a random subnet's at p = 1/16 (layers' mean)")
    lost.set_title("what training P alone leaves")
    gain.set_title("of what the whole step gains")
    gain.set_ylabel("share of the loss's fall")
    handles = [
        Line2D([], [], color=c, marker=m, linestyle="none", label=way)
        for way, (c, m) in STYLE.items()
    ]
    for label, line in (("measured error", "-"), ("bound", "--")):
        handles.append(Line2D([], [], color=BLACK, linestyle=line, label=label))
    drawn.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return drawn


def each_layer(axes: Axes, rows: list[Row]) -> None:
    for way, (colour, marker) in STYLE.items():
        points = [
            (b, e)
            for r in rows
            if r["way"] == way
            for b, e in zip(r["bound"], r["error"], strict=True)
        ]
        axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=2.5, alpha=0.5)
    ends = [f(v for r in rows for v in r["bound"]) for f in (min, max)]
    axes.plot(ends, ends, color=BLACK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bound")
    axes.set_ylabel("measured error of a layer's outputs")
    axes.set_title("each layer, size and target; dotted: equal")
    dress(axes)


if __name__ == "__main__":
    main()
