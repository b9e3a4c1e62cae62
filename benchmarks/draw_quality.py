"""Draw the figures of a quality record: ``python benchmarks/draw_quality.py benchmarks/results/quality-*.json``.

    docs/quality-forgetting.png   held-out loss of the target against that of the old domain after tuning
    docs/quality-size.png         held-out loss of the target against the number of trained values
    docs/quality-seconds.png      held-out loss of the target against the seconds of a run

A panel a target; means over the seeds with their standard errors. Towards the lower left is better. The seconds are
those of a process that shares the device with others. The background is opaque, so that the figures can be read on
dark and light pages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Row = dict[str, Any]

COLOURS = {  # Okabe and Ito's, by how a method's name begins, the longest first
    "losia-paper": "#56B4E9",
    "losia-default": "#56B4E9",
    "losia": "#0072B2",
    "lora": "#E69F00",
    "dora": "#CC79A7",
    "pissa": "#D55E00",
    "full": "#009E73",
}
MARKERS = "osD^v<>PXphd*8"
BACKGROUND = "#FCFCFC"
FIGURES = {  # name: (column, its standard error, label, logarithmic)
    "forgetting": ("old_loss", "old_loss_se", "old domain (nats per byte)", False),
    "size": ("trainable", None, "trained values", True),
    "seconds": ("seconds", None, "seconds of a run", False),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="a JSON file of benchmarks.quality")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="a folder; default docs")
    args = parser.parse_args()
    record = json.loads(args.record.read_text())
    rows = [row for row in record["rows"] if row["test_loss"] is not None]
    if not rows:
        raise SystemExit(f"nothing to draw: no method of {args.record} has a final run")
    args.output.mkdir(parents=True, exist_ok=True)
    base = {run["target"]: run for run in record["runs"] if run["method"] == "base"}
    for name in FIGURES:
        path = args.output / f"quality-{name}.png"
        figure(rows, base, name).savefig(path)
        print(path)


def figure(rows: list[Row], base: dict[str, Row], name: str) -> Figure:
    """A panel a target; the methods in the legend are those of all panels."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    style = styles(list(dict.fromkeys(row["method"] for row in rows)))
    columns = min(3, len(targets))
    lines = -(-len(targets) // columns)
    drawn = Figure(figsize=(3.2 * columns + 2.6, 3.0 * lines + 0.4), layout="constrained", dpi=150)
    drawn.set_facecolor(BACKGROUND)
    panels = list(drawn.subplots(lines, columns, squeeze=False).flat)
    for axes, target in zip(panels, targets, strict=False):
        panel(axes, [row for row in rows if row["target"] == target], style, name)
        axes.set_title(f"{target} (untuned: {base[target]['test_loss']:.3f})", fontsize=9)
    for axes in panels[len(targets) :]:
        axes.set_visible(False)
    handles = [
        Line2D([], [], color=c, marker=m, linestyle="none", label=method)
        for method, (c, m) in style.items()
    ]
    drawn.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    drawn.supxlabel(FIGURES[name][2], fontsize=10)
    drawn.supylabel("target (nats per byte that counts)", fontsize=10)
    return drawn


def panel(axes: Axes, rows: list[Row], style: dict[str, tuple[str, str]], name: str) -> None:
    column, error, _, logarithmic = FIGURES[name]
    for row in rows:
        colour, marker = style[row["method"]]
        axes.errorbar(
            row[column], row["test_loss"], xerr=row[error] if error else None, yerr=row["test_loss_se"],
            color=colour, marker=marker, markersize=6, markeredgecolor="white", markeredgewidth=0.5,
            linestyle="none",
        )  # fmt: skip
    if logarithmic:
        axes.set_xscale("log")
    axes.set_facecolor(BACKGROUND)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)


def styles(methods: list[str]) -> dict[str, tuple[str, str]]:
    """A colour for each family and, within it, a marker for each method."""
    used: dict[str, int] = {}
    found = {}
    for method in methods:
        colour = next((c for f, c in COLOURS.items() if method.startswith(f)), "#000000")
        number = used.setdefault(colour, 0)
        used[colour] += 1
        found[method] = (colour, MARKERS[number % len(MARKERS)])
    return found


if __name__ == "__main__":
    main()
