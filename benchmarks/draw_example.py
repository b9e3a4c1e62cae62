"""Draw the README's first picture: ``python benchmarks/draw_example.py`` reads ``results/example.json`` and writes
``docs/example.png``.

Left, a sketch of the method: the block of a layer's weights that is trained by default. Middle, where subnets moved,
the recorded schedule of the example's first run. Right, the recorded held-out losses: mean and range over the seeds.
The background is opaque, so that the picture can be read on dark and light pages.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator

HERE = Path(__file__).parent
RECORD, PICTURE = HERE / "results" / "example.json", HERE.parent / "docs" / "example.png"
BACKGROUND, GREY = "#FCFCFC", "#BBBBBB"
BLUE, ORANGE, SKY, BLACK = "#0072B2", "#E69F00", "#56B4E9", "#000000"
STYLE = {"losia-pro": (BLUE, "o"), "lora": (ORANGE, "^"), "full": (BLACK, "D")}

# The sketch's layer: 512 inputs, a column for each run of 16, of which 3/32 are chosen, and all outputs.
OUT, IN, COLUMNS = 20, 32, (7, 18, 22)


def layer(axes: Axes) -> None:
    """The weights of one layer: the chosen columns."""
    for row in range(OUT):
        for column in range(IN):
            colour = BLUE if column in COLUMNS else "#E4E4E4"
            axes.add_patch(Rectangle((column, row), 0.88, 0.88, color=colour, linewidth=0))
    axes.set_xlim(-0.4, IN + 0.3)
    axes.set_ylim(OUT + 0.3, -0.4)
    axes.set_aspect("equal")
    axes.tick_params(length=0)
    axes.set_xticks([c + 0.44 for c in COLUMNS], [""] * len(COLUMNS))
    axes.set_yticks([])
    axes.set_xlabel("by default: 3/32 of the inputs, in runs of 16")
    axes.set_ylabel("all outputs")
    axes.set_title("The trained block of a layer")
    for side in axes.spines.values():
        side.set_visible(False)


def schedule(axes: Axes, record: dict[str, Any]) -> None:
    """When each layer was profiled, moved, and rewarmed."""
    period, steps = record["settings"]["period"], record["steps"]
    names = record["groups"]
    moves = sorted({(r["step"], r["group"]) for r in record["runs"][0]["reselections"]})
    axes.hlines(range(len(names)), 0, steps, color=GREY, linewidth=2, zorder=1, label="training")
    for i, (step, group) in enumerate(moves):
        label = dict(label="importance measured") if i == 0 else {}
        axes.hlines(group, step - period, step, color=ORANGE, linewidth=5, zorder=2, **label)
        label = dict(label="learning rate rewarmed") if i == 0 else {}
        end = min(step + period, steps)
        axes.hlines(group, step, end, color=SKY, linewidth=5, zorder=2, **label)
    axes.scatter(*zip(*moves, strict=True), s=45, color=BLUE, zorder=3, label="block chosen anew")
    axes.set_yticks(range(len(names)), [name.rpartition(".")[2] for name in names])
    axes.set_ylim(len(names) - 0.5, -1.9)
    axes.set_xlim(0, 1.03 * steps)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("decoder layer")
    axes.set_title("The example: blocks move in turn")
    axes.legend(
        loc="upper center", ncols=2, fontsize=8.5, columnspacing=1, handlelength=1.2, frameon=False
    )


def losses(axes: Axes, record: dict[str, Any]) -> None:
    """Held-out loss of each method: mean and range over the seeds."""
    for method, (colour, marker) in STYLE.items():
        steps = [0, *(p["step"] for p in record["runs"][0]["results"][method]["held_out"])]
        runs = [
            [record["base"]["loss"], *(p["loss"] for p in run["results"][method]["held_out"])]
            for run in record["runs"]
        ]
        points = list(zip(*runs, strict=True))
        mean = [statistics.fmean(p) for p in points]
        axes.fill_between(
            steps,
            [min(p) for p in points],
            [max(p) for p in points],
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
        trainable = record["runs"][0]["results"][method]["trainable"]
        label = f"{method} ({trainable:,} trained): {mean[-1]:.3f}"
        axes.plot(steps, mean, color=colour, marker=marker, markersize=4, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.set_xlim(0, 1.02 * record["steps"])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title("The example: reST to Markdown")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8.5)


def main() -> None:
    record = json.loads(RECORD.read_text())
    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=150)
    figure.set_facecolor(BACKGROUND)
    moved = bool(record["runs"][0]["reselections"])
    left, *middle, right = figure.subplots(1, 2 + moved, width_ratios=(0.8, *[1.2] * moved, 1.25))
    layer(left)
    for axes in middle:
        schedule(axes, record)
    losses(right, record)
    for axes in (left, *middle, right):
        axes.set_facecolor(BACKGROUND)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
