"""Time a training step of each method over the floor of the same mode in the same run.

The model has random weights, made on the device; nothing is downloaded. A step is forward, backward, AdamW and
what the method does after it (write-back); gradients are not clipped. The floor is the frozen network's forward
and the gradient with respect to its inputs, without an optimizer: no method that backpropagates through every
layer with the same dense products can be faster. Each method gets a fresh model; that the loss is finite and that
everything trained has changed is checked before anything is timed. The floor is measured again at the end of
each mode, which shows the run's noise; with --pair it is measured before each losia-pro method, on the same model, and
its steps are timed in turn with the method's, by four (not where a layer is profiled).
With --breakdown a few more steps of each method are profiled after those that are timed, and the record says by
which GPU kernels the method differs from its floor.

Methods:
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from ..values import count
from . import breakdown, methods, models, runs
from . import device as devices
from .estimate import row_seconds, step_seconds
from .record import Record
from .table import number, ratio, table
from .timing import Stats
from .trainer import Trainer, time_steps

__doc__ += "\n".join((methods.__doc__ or "").splitlines()[2:])

NOT_SHOWN = [
    "Weights and tokens are random: nothing is said about what is learnt.",
    "No data loading, padding, gradient clipping, scheduler, or evaluation.",
    "A profiled layer is measured within its slot; choosing its subnets anew at the slot's end is not.",
    "The embeddings' output requires grad in every method, so that all run the same dense products; "
    "training without that saves a little of the first layer.",
    "One device, one batch shape; other shapes weigh launches, attention and the output head differently.",
    "Compile time and the first steps are not in the figures.",
    "A floor that is timed in turn with a method is that method's model with its subnets frozen: the host does a "
    "little more for it than for the plain model, which floor_alone_ms is of.",
]
AGAIN = "floor, again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser)
    parser.add_argument("--warmup", type=count, default=3, metavar="N", help="steps; default 3")
    parser.add_argument("--steps", type=count, default=8, metavar="N", help="timed; default 8")
    parser.add_argument(
        "--pair",
        action="store_true",
        help="measure the floor on each losia-pro method's model, in turn with it",
    )
    parser.add_argument(
        "--breakdown",
        action="store_true",
        help="say by which GPU kernels a method differs from the floor",
    )


def run(args: argparse.Namespace) -> int:
    device = runs.complete(args)
    if args.breakdown:
        breakdown.ready(device)
    args.warmup = max(2, args.warmup)  # LoRA's first matrix has no gradient in the first step
    not_shown = [*NOT_SHOWN, *(breakdown.NOT_SHOWN if args.breakdown else [])]
    record = Record("step", args, device, not_shown)
    rate = devices.limits(device, runs.DTYPES[args.dtype]).flops
    record.content["product_flops"] = rate
    plan = list(_plan(args, device, rate))
    ids = models.tokens(args.model, args.batch, args.length, device)
    floor: runs.Row | None = None

    def measure(m: runs.Measurement) -> runs.Row:
        nonlocal floor
        if m.method == "floor":
            floor = None
        row = _measure(args, m, ids, device)
        if m.method == "floor":
            floor = row
        return row | _compared(row, row.pop("own_floor", floor))

    return runs.carry_out(args, record, device, plan, measure, _said, _table)


def _plan(
    args: argparse.Namespace, device: torch.device, rate: float
) -> Iterator[runs.Measurement]:
    """The floor first in each mode, and once more at its end."""
    others = [name for name in args.methods if name != "floor"]
    for mode in args.modes:
        for method in ["floor", *others, AGAIN] if others else ["floor"]:
            steps = args.warmup + args.steps + (breakdown.STEPS if args.breakdown else 0)
            shape = (args.model, args.layers, args.batch, args.length)
            seconds = steps * step_seconds(*shape, method, mode, rate)
            if _paired(args, method):
                seconds += 2 * steps * step_seconds(*shape, "floor", mode, rate)
            yield runs.Measurement(mode, method, row_seconds(seconds, 1, mode, device.type))


def _paired(args: argparse.Namespace, method: str) -> bool:
    """A hundredth more or less matters to these; the others are far from the floor."""
    return bool(args.pair) and method.startswith("losia-pro")


def _measure(
    args: argparse.Namespace, m: runs.Measurement, ids: torch.Tensor, device: torch.device
) -> dict[str, Any]:
    model = runs.build(args, device)
    result: dict[str, Any] = {}
    breaks = models.graph_breaks() if m.mode == "compiled" else 0
    if _paired(args, m.method):
        trainer = runs.trainer(args, model, "floor", m.mode, ids)
        result["own_floor"] = _figures(args, trainer, device)
        del trainer
    method = "floor" if m.method == AGAIN else m.method
    trainer = runs.trainer(args, model, method, m.mode, ids)
    result |= _figures(args, trainer, device, result.get("own_floor"))
    result["trainable"] = sum(p.numel() for p in trainer.prepared.parameters)
    if m.mode == "compiled":
        result["graph_breaks"] = models.graph_breaks() - breaks
    return result


def _figures(
    args: argparse.Namespace, trainer: Trainer, device: torch.device, own_floor: runs.Row | None = None
) -> runs.Row:  # fmt: skip
    """``own_floor``, of the same model: its times are those in turn with the method's, unless a layer is profiled,
    which the frozen model would be too."""
    losia = trainer.prepared.losia
    in_turn = own_floor is not None and losia is not None and losia.config.period is None
    timed = time_steps(trainer, args.warmup, args.steps, device, in_turn)
    if own_floor is not None and timed.frozen_ms is not None:
        own_floor |= {"alone_ms": own_floor["median_ms"], **_times(timed.frozen_ms)}
    figures: runs.Row = {
        **_times(timed.ms),
        "steps": timed.ms.samples,
        "peak_bytes": timed.peak_bytes,
        "first_loss": timed.first_loss,
        "last_loss": timed.last_loss,
        "first_step_s": round(timed.first_step_s, 2),
    }
    if args.breakdown:  # after the timed steps, which it would slow
        figures["kernels"] = breakdown.kernels_of(trainer.step, device)
    return figures


def _times(ms: Stats) -> runs.Row:
    return {
        "median_ms": round(ms.median, 3),
        "p20_ms": round(ms.p20, 3),
        "p80_ms": round(ms.p80, 3),
    }


def _compared(row: runs.Row, floor: runs.Row | None) -> runs.Row:
    """The floor's figures, the step's ratio to it, and by which kernels it differs."""
    compared: runs.Row = {
        "floor_ms": floor and floor["median_ms"],
        "floor_peak_bytes": floor and floor["peak_bytes"],
        "ratio": floor and round(row["median_ms"] / floor["median_ms"], 4),
    }
    if floor and "alone_ms" in floor:
        compared["floor_alone_ms"] = floor["alone_ms"]
    if "kernels" in row:
        compared |= breakdown.figures(row["kernels"], floor and floor["kernels"])
    return compared


def _said(row: runs.Row) -> str:
    over = ratio(row["median_ms"], row["floor_ms"])
    return f"{number(row['median_ms'], 4)} ms, {over}, {row['peak_bytes'] / 1e9:.2f} GB"


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append([row["method"], row["status"], *["-"] * 6])
            continue
        more = None
        if row["floor_peak_bytes"] is not None:
            more = (row["peak_bytes"] - row["floor_peak_bytes"]) / 1e9
        lines.append(
            [
                row["method"],
                *(number(row[key], 4) for key in ("median_ms", "p20_ms", "p80_ms")),
                ratio(row["median_ms"], row["floor_ms"]),
                f"{row['peak_bytes'] / 1e9:.2f}",
                "-" if more is None else f"{more:+.2f}",
                f"{row['trainable'] / 1e6:,.1f} M",
            ]
        )
    head = ["method", "step ms", "p20", "p80", "/floor", "peak GB", "over floor", "trainable"]
    kernels = [
        breakdown.said(row)
        for row in rows
        if row["method"].startswith("losia-pro") and row.get("over_floor") is not None
    ]
    return "\n\n".join([table(head, lines), *kernels])
