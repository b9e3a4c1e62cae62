"""Time a training step of each method over the floor of the same mode in the same run.

The model has random weights, made on the device; nothing is downloaded. A step is forward, backward, AdamW and
what the method does after it (write-back); gradients are not clipped. The floor is the frozen network's forward
and the gradient with respect to its inputs, without an optimizer: no method that backpropagates through every
layer with the same dense products can be faster. Each method gets a fresh model; that the loss is finite and that
everything trained has changed is checked before anything is timed. The floor is measured again at the end of
each mode, which shows the run's noise; with --pair it is measured before each method, on the same model.

Methods:
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..values import count
from . import device as devices
from . import methods, models, runs
from .estimate import row_seconds, step_seconds
from .record import Record, finish
from .table import number, ratio, table
from .trainer import Timed, time_steps

__doc__ += "\n".join((methods.__doc__ or "").splitlines()[2:])

NOT_SHOWN = [
    "Weights and tokens are random: nothing is said about what is learnt.",
    "No data loading, padding, gradient clipping, scheduler, or evaluation.",
    "A profiled layer is measured within its slot; choosing its subnets anew at the slot's end is not.",
    "The embeddings' output requires grad in every method, so that all run the same dense products; "
    "training without that saves a little of the first layer.",
    "One device, one batch shape; other shapes weigh launches, attention and the output head differently.",
    "Compile time and the first steps are not in the figures.",
]
AGAIN = "floor, again"


class Measurement(NamedTuple):
    mode: str
    method: str
    seconds: float  # estimated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser)
    parser.add_argument("--warmup", type=count, default=3, metavar="N", help="steps; default 3")
    parser.add_argument("--steps", type=count, default=8, metavar="N", help="timed; default 8")
    parser.add_argument(
        "--pair", action="store_true", help="measure the floor before each method, on its model"
    )


def run(args: argparse.Namespace) -> int:
    device = runs.complete(args)
    args.warmup = max(2, args.warmup)  # LoRA's first matrix has no gradient in the first step
    record = Record("step", args, device, NOT_SHOWN)
    rate = devices.limits(device, runs.DTYPES[args.dtype]).flops
    record.content["product_flops"] = rate
    plan = list(_plan(args, device, rate))
    total = sum(m.seconds for m in plan)
    record.content["estimated_seconds"] = round(total)
    budget = f", budget {args.budget:.0f} s" if args.budget else ""
    print(
        f"{record.content['device']['name']}: {args.model}, {args.layers} layers, "
        f"{args.batch} x {args.length} tokens; {len(plan)} measurements, about {total:.0f} s{budget}"
    )
    ids = models.tokens(args.model, args.batch, args.length, device)
    floor: dict[str, Any] | None = None
    stopped = None
    for done, m in enumerate(plan):
        if args.budget and record.seconds() + m.seconds > args.budget:
            stopped = f"the budget of {args.budget:.0f} s; {len(plan) - done} of {len(plan)} left"
            break
        if m.method == "floor":
            floor = None
        began = record.seconds()
        row = {"model": args.model, "layers": args.layers, "mode": m.mode, "method": m.method}
        row |= runs.attempt(lambda m=m: _measure(args, m, ids, device), device)  # type: ignore[misc]
        if row["status"] == "ok":
            own = row.pop("own_floor", None)
            if m.method == "floor":
                floor = row
            _compare(row, own or floor)
        row["seconds"] = round(record.seconds() - began, 1)
        record.add(row)
        print(f"  {m.mode:12}  {m.method:24}  {_said(row)}", flush=True)
    for mode in args.modes:
        rows = [row for row in record.rows if row["mode"] == mode]
        if rows:
            print(f"\n{mode}: {models.MODES[mode]}\n{_table(rows)}")
    bad = [
        f"{row['mode']}, {row['method']}: {row['reason']}"
        for row in record.rows
        if row["status"] == "failed"
    ]
    return finish(record, stopped, bad)


def _plan(args: argparse.Namespace, device: torch.device, rate: float) -> Iterator[Measurement]:
    """The floor first in each mode, and once more at its end."""
    others = [name for name in args.methods if name != "floor"]
    for mode in args.modes:
        for method in ["floor", *others, AGAIN] if others else ["floor"]:
            steps = args.warmup + args.steps
            shape = (args.model, args.layers, args.batch, args.length)
            seconds = steps * step_seconds(*shape, method, mode, rate)
            if args.pair and method in others:
                seconds += steps * step_seconds(*shape, "floor", mode, rate)
            yield Measurement(mode, method, row_seconds(seconds, 1, mode, device.type))


def _measure(
    args: argparse.Namespace, m: Measurement, ids: torch.Tensor, device: torch.device
) -> dict[str, Any]:
    model = runs.build(args, device)
    result: dict[str, Any] = {}
    breaks = models.graph_breaks() if m.mode == "compiled" else 0
    if args.pair and m.method not in ("floor", AGAIN):
        trainer = runs.trainer(args, model, "floor", m.mode, ids)
        result["own_floor"] = _figures(time_steps(trainer, args.warmup, args.steps, device))
        del trainer
    method = "floor" if m.method == AGAIN else m.method
    trainer = runs.trainer(args, model, method, m.mode, ids)
    result |= _figures(time_steps(trainer, args.warmup, args.steps, device))
    result["trainable"] = sum(p.numel() for p in trainer.prepared.parameters)
    if m.mode == "compiled":
        result["graph_breaks"] = models.graph_breaks() - breaks
    return result


def _figures(timed: Timed) -> dict[str, Any]:
    return {
        "median_ms": round(timed.ms.median, 3),
        "p20_ms": round(timed.ms.p20, 3),
        "p80_ms": round(timed.ms.p80, 3),
        "steps": timed.ms.samples,
        "peak_bytes": timed.peak_bytes,
        "first_loss": timed.first_loss,
        "last_loss": timed.last_loss,
        "first_step_s": round(timed.first_step_s, 2),
    }


def _compare(row: dict[str, Any], floor: dict[str, Any] | None) -> None:
    """Add the floor's figures, and the step's ratio to it."""
    row["floor_ms"] = floor and floor["median_ms"]
    row["floor_peak_bytes"] = floor and floor["peak_bytes"]
    row["ratio"] = floor and round(row["median_ms"] / floor["median_ms"], 4)


def _said(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status']}{': ' + row['reason'] if 'reason' in row else ''}"
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
    return table(head, lines)
