"""What `bench step` and `bench memory` share: their flags, their loop, and a fresh model for each method."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import CliError
from ..memory import is_out_of_memory
from ..values import count, names, positive
from . import device as devices
from . import methods, models
from .record import Record, finish
from .record import add_arguments as add_common_arguments
from .shapes import MODELS
from .timing import first_line, synchronize
from .trainer import Trainer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--model", choices=MODELS, help="default llama2-7b; toy on a CPU")
    parser.add_argument(
        "--layers", type=count, metavar="N", help="cut the model to N decoder layers, at least 2"
    )
    parser.add_argument("--batch", type=count, metavar="B", help="default 4; 2 on a CPU")
    parser.add_argument("--length", type=count, metavar="S", help="default 2048; 32 on a CPU")
    parser.add_argument(
        "--methods", type=names, default=methods.DEFAULT, metavar="A,B",
        help=f"default {','.join(methods.DEFAULT)}",
    )  # fmt: skip
    parser.add_argument(
        "--modes", type=names, default=list(models.MODES), metavar="A,B", help=f"of {', '.join(models.MODES)}"
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights")
    parser.add_argument("--lr", type=positive, default=1e-3, help="default 1e-3")
    parser.add_argument(
        "--optimizer", choices=("fused", "foreach"), default="fused", help="which AdamW; default fused"
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=positive, metavar="SECONDS", help="no measurement is begun that would end later"
    )  # fmt: skip


def complete(args: argparse.Namespace) -> torch.device:
    """Fill in the defaults that depend on the device, and refuse names that mean nothing."""
    device = devices.choose(args.device)
    toy = device.type == "cpu"
    args.model = args.model or ("toy" if toy else "llama2-7b")
    args.layers = args.layers or MODELS[args.model].layers
    args.batch = args.batch or (2 if toy else 4)
    args.length = args.length or (32 if toy else 2048)
    if args.layers < 2:
        raise CliError("--layers 1: a model needs 2 layers at least, to have repeated blocks")
    if args.layers > MODELS[args.model].layers:
        raise CliError(f"--layers {args.layers}: {args.model} has {MODELS[args.model].layers}")
    if unknown := [mode for mode in args.modes if mode not in models.MODES]:
        raise CliError(f"--modes {unknown[0]}: is none of {', '.join(models.MODES)}")
    for name in args.methods:
        methods.parse(name)
    return device


def build(args: argparse.Namespace, device: torch.device) -> Any:
    return models.build(args.model, args.layers, args.length, device, DTYPES[args.dtype])


def trainer(
    args: argparse.Namespace, model: Any, method: str, mode: str, ids: torch.Tensor
) -> Trainer:
    """Make a fresh model trainable by a method in a mode."""
    prepared = methods.parse(method)(model)
    models.set_mode(model, mode)
    return Trainer(prepared, ids, args.lr, args.optimizer == "fused")


class Measurement(NamedTuple):
    mode: str
    method: str
    seconds: float  # estimated


Row = dict[str, Any]


def carry_out(
    args: argparse.Namespace,
    record: Record,
    device: torch.device,
    plan: Sequence[Measurement],
    measure: Callable[[Measurement], Row],
    said: Callable[[Row], str],
    table: Callable[[list[Row]], str],
) -> int:
    """Make the measurements that fit the budget, a row each, and a table of each mode; the exit code.

    ``said`` is what is printed of a row that was measured, ``table`` of all rows of a mode.
    """
    total = sum(m.seconds for m in plan)
    record.content["estimated_seconds"] = round(total)
    budget = f", budget {args.budget:.0f} s" if args.budget else ""
    print(
        f"{record.content['device']['name']}: {args.model}, {args.layers} layers, "
        f"{args.batch} x {args.length} tokens; {len(plan)} measurements, about {total:.0f} s{budget}"
    )
    stopped = None
    for done, m in enumerate(plan):
        began = record.seconds()
        if args.budget and began + m.seconds > args.budget:
            stopped = f"the budget of {args.budget:.0f} s; {len(plan) - done} of {len(plan)} left"
            break
        row = {"model": args.model, "layers": args.layers, "mode": m.mode, "method": m.method}
        row |= attempt(lambda m=m: measure(m), device)  # type: ignore[misc]
        row["seconds"] = round(record.seconds() - began, 1)
        record.add(row)
        reason = f": {row['reason']}" if "reason" in row else ""
        text = said(row) if row["status"] == "ok" else row["status"] + reason
        print(f"  {m.mode:12}  {m.method:24}  {text}", flush=True)
    for mode in args.modes:
        if rows := [row for row in record.rows if row["mode"] == mode]:
            print(f"\n{mode}: {models.MODES[mode]}\n{table(rows)}")
    failed = [row for row in record.rows if row["status"] == "failed"]
    bad = [f"{row['mode']}, {row['method']}: {row['reason']}" for row in failed]
    return finish(record, stopped, bad)


def attempt(measure: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """A measurement's result with its status: ``ok``, or why there is none. Memory is free afterwards."""
    try:
        result = {"status": "ok", **measure()}
    except CliError:
        raise
    except methods.Skip as reason:
        result = {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # noqa: BLE001 - the measurements after this one are still worth making
        if is_out_of_memory(error):
            result = {"status": "out of memory"}
        else:
            result = {"status": "failed", "reason": first_line(error)}
    free(device)
    return result


def free(device: torch.device) -> None:
    """Let go of the last model."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
