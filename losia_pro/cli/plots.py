"""The two pictures of a run. Colours are Okabe and Ito's, which colour-blind people can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

COLOURS = {"losia-pro": "#0072B2", "losia": "#56B4E9", "lora": "#E69F00", "full": "#000000"}
MARKERS = {"losia-pro": "o", "losia": "s", "lora": "^", "full": "D"}


def loss(record: dict[str, Any], path: Path) -> None:
    """Training and held-out loss of every method against the optimizer step."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    base = record["base"]["loss"]
    for method, r in record["results"].items():
        steps, losses = zip(*((p["step"], p["loss"]) for p in r["train"]), strict=True)
        axes.plot(steps, _smooth(losses), color=COLOURS[method], alpha=0.35, linewidth=1)
        points = [(0, base), *((p["step"], p["loss"]) for p in r["held_out"])]
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[method],
            marker=MARKERS[method],
            markersize=4,
            label=f"{method}: {r['loss']:.3f}",
        )
    axes.axhline(base, color="#999999", linestyle=":", label=f"base model: {base:.3f}")
    axes.set_xlim(0, 1.02 * record["steps"])
    axes.set_xlabel("optimizer step")
    wide = base > 5 * min(r["loss"] for r in record["results"].values())
    if wide:
        _log_scale(axes)
    axes.set_ylabel(f"loss (nats per token{', log scale' if wide else ''})")
    axes.set_title("Held-out loss (markers) and training loss (faint, smoothed)")
    axes.grid(alpha=0.25)
    axes.legend(title="held-out loss at the end")
    figure.savefig(path, format="png")


def _log_scale(axes: Axes) -> None:
    """With a number at 1, 2 and 5 of every decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def subnets(record: dict[str, Any], path: Path) -> None:
    """Which group's subnets moved when; the share of the layer's score that the new ones hold, and of them that
    lies in the old ones. Subnets at random would have the weights' share of both."""
    history, names = record["reselections"], record["groups"]
    figure = Figure(figsize=(7.5, 6), layout="constrained", dpi=150)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    moves: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for r in history:
        moves.setdefault((r["step"], r["group"]), []).append(r)
    steps = [step for step, _ in moves]
    kept = [_mean(rs, "score_kept") for rs in moves.values()]
    overlap = [_mean(rs, "overlap") for rs in moves.values()]
    top.hlines(range(len(names)), 0, record["steps"], color="#DDDDDD", linewidth=1, zorder=1)
    top.scatter(steps, [g for _, g in moves], s=40, color="#0072B2", zorder=2)
    bottom.plot(steps, kept, "o-", color="#0072B2", markersize=4, label="score kept")
    bottom.plot(
        steps,
        overlap,
        "s--",
        color="#D55E00",
        markersize=4,
        label="overlap with the last subnets",
    )
    share = record["subnet_share"]
    bottom.axhline(share, color="#999999", linestyle=":", label=f"subnets at random: {share:.3f}")
    bottom.legend(fontsize=8)
    top.set_yticks(range(len(names)), names, fontsize=8 if len(names) < 24 else 5)
    top.set_ylim(len(names) - 0.5, -0.5)
    top.set_title(f"{record['subnet_method']}: which group's subnets moved when")
    bottom.set_ylim(0, 1)
    bottom.set_xlim(0, 1.02 * record["steps"])
    bottom.set_xlabel("optimizer step")
    bottom.set_ylabel("share (mean of the group)")
    bottom.grid(alpha=0.25)
    figure.savefig(path, format="png")


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return float(sum(r[key] for r in rows) / len(rows))


def _smooth(values: tuple[float, ...], weight: float = 0.9) -> list[float]:
    """Exponential moving average without its bias at the start."""
    result, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + 1 - weight
        result.append(total / mass)
    return result
