"""Time each operation against plain PyTorch and against the device's least-traffic time.

Every usable implementation and the default choice, at the linears of the named models, from 512 to 32768
tokens, for four selections: single neurons, aligned groups of 8 and of 16 (an eighth of the inputs and of the
outputs), and a 64th of the inputs with all outputs. Each result is checked against an fp64 truth first; one that
errs more than twice as much as PyTorch's own is reported as wrong, and not timed. GPU times are CUDA graph
replays over input sets larger than the L2 cache, all candidates taking turns; write-back, AdamW and the
interpolation of subnets are timed as they are called.

Columns: least, the larger of bytes over the copy bandwidth and flops over the matrix-product rate, both
measured first; library, plain PyTorch; default, what impl=None takes; then ratios of the default's time.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from losia_pro import dispatch

from ..errors import CliError
from ..memory import free_bytes, is_out_of_memory
from ..values import count, names, positive
from . import device as devices
from . import host, model_operations, operations
from . import kernel_tables as tables
from .points import LIBRARY, Point, Setting
from .record import Record, finish
from .record import add_arguments as add_common_arguments
from .shapes import MODELS, SELECTIONS, unique_linears
from .timing import first_line, interleaved, n_calls, synchronize

OPS = (*dispatch.PREFERENCE, "host")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CPU_CALLS = 10  # a sample on a CPU
POINT_S = {"cuda": 0.7, "cpu": 0.4}  # about what a point takes; for the estimate alone
NOT_SHOWN = [
    "Data and selections are random; a trained model's chosen neurons may lie closer together.",
    "On a GPU inputs come from memory; in a training step they may still be in the cache. On a CPU they may.",
    "Graph replays leave out the host's launch cost; write-back, AdamW, interpolation and the host rows include it.",
    "The copy bandwidth counts reads and writes; an operation that mostly reads can be faster than it.",
    "The library figure of importance_update_ is the dense product alone, not the update.",
    "One device; how an operation shares it with others that run at the same time is not measured.",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    listed = ", ".join(MODELS)
    parser.add_argument(
        "--models", type=names, metavar="A,B", help=f"of {listed}; default all but toy"
    )
    parser.add_argument(
        "--tokens", type=names, metavar="N,N", help="default 8192,2048,512,32768; toy size on a CPU"
    )
    parser.add_argument("--ops", type=names, default=list(OPS), metavar="A,B", help=", ".join(OPS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    parser.add_argument(
        "--budget", type=positive, default=170.0, metavar="SECONDS",
        help="no point is begun after this; default 170",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    device = devices.choose(args.device)
    toy = device.type == "cpu"
    args.models = args.models or (["toy"] if toy else [m for m in MODELS if m != "toy"])
    args.tokens = [
        _count(t) for t in args.tokens or (["64"] if toy else "8192 2048 512 32768".split())
    ]
    for what, given, known in (("models", args.models, MODELS), ("ops", args.ops, OPS)):
        if unknown := [name for name in given if name not in known]:
            raise CliError(f"--{what} {unknown[0]}: is none of {', '.join(known)}")
    torch.manual_seed(0)
    record = Record("kernels", args, device, NOT_SHOWN, every=1.0)
    measured = devices.limits(device, DTYPES[args.dtype])
    record.content["limits"] = dataclasses.asdict(measured)
    record.content["default_impl"] = {op: dispatch.resolve(op, device) for op in OPS[:-1]}
    record.content["special_impl"] = {
        op: found for op in OPS[:-1] if (found := dispatch.resolve_special(op, device))
    }
    print(
        f"{record.content['device']['name']}: copy {measured.bandwidth / 1e12:.3g} TB/s, "
        f"{args.dtype} product {measured.flops / 1e12:.3g} TFLOP/s"
    )
    plan = list(_plan(args, device.type == "cuda"))
    points = sum(len(block.shapes) for block in plan)
    print(
        f"{points} points, about {points * POINT_S[device.type]:.0f} s; "
        f"no point is begun after {args.budget:.0f} s"
    )
    setting = Setting(device, DTYPES[args.dtype], measured)
    left = points
    for block in plan:
        rows = []
        for shape in block.shapes:
            if record.seconds() > args.budget:
                break
            left -= 1
            for row in _measure(setting, block, shape):
                record.add(row)
                rows.append(row)
        if rows:
            print(f"\n{block.title()}\n{tables.block(rows)}", flush=True)
    print(f"\n{tables.summary(record.rows)}")
    stopped = f"the budget of {args.budget:.0f} s; {left} of {points} points left" if left else None
    return finish(record, stopped, tables.wrong(record.rows))


def _count(text: str) -> int:
    try:
        return count(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise CliError(f"--tokens {text}: must be whole numbers of 1 or more") from error


class Block(NamedTuple):
    """Points that are shown in one table."""

    op: str
    what: Any  # a number of tokens, a model, or how the host is measured
    shapes: list[tuple[int, int]]

    def title(self) -> str:
        if self.op == "host":
            return f"host time of a linear, forward and backward, {self.what}"
        return f"{self.op}, {self.what}" + (" tokens" if isinstance(self.what, int) else "")


def _plan(args: argparse.Namespace, cuda: bool) -> Iterator[Block]:
    """What is measured, the quick ones and the first number of tokens first."""
    if "host" in args.ops:
        yield Block("host", "eager", [(0, 0)])
    for op in model_operations.POINTS:
        if op in args.ops:
            yield from (Block(op, model, [(0, 0)]) for model in args.models)
    linears = unique_linears(args.models)
    for tokens in args.tokens:
        for op in operations.POINTS:
            if op in args.ops:
                yield Block(op, tokens, list(operations.shapes_of(op, linears)))
    if "host" in args.ops and cuda:  # last: it waits for a compiler
        yield Block("host", "compiled", [(0, 0)])
        yield Block("host", "graphs", [(0, 0)])


def _measure(s: Setting, block: Block, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """The rows of one point, or a row that says why there is none."""
    try:
        if block.op == "host":
            return [host.measure(block.what, s.device, s.dtype)]
        if block.op in model_operations.POINTS:
            layers = _layers_that_fit(s, block.what)
            return timed(s, model_operations.POINTS[block.op](s, block.what, layers))
        return timed(s, operations.POINTS[block.op](s, *shape, block.what))
    except Exception as error:  # noqa: BLE001 - the points after this one are still worth measuring
        key = {"op": block.op, "selection": "all", "in": shape[0], "out": shape[1]}
        reason = "out of memory" if is_out_of_memory(error) else first_line(error)
        return [{**key, "tokens": block.what, "candidates": {}, "failed": reason}]
    finally:
        if s.device.type == "cuda":
            synchronize(s.device)
            torch.cuda.empty_cache()


def _layers_that_fit(s: Setting, model: str) -> int:
    shape = MODELS[model]
    a_layer = sum(i * o for i, o in shape.linears()) * s.dtype.itemsize
    free = free_bytes(s.device) or a_layer * shape.layers * 4
    return max(1, min(shape.layers, int(0.4 * free) // a_layer))


def timed(s: Setting, point: Point) -> list[dict[str, Any]]:
    """A row of each case, its right candidates timed together."""
    calls = {}
    for k, case in enumerate(point.cases):
        n = CPU_CALLS if point.graphs else 1
        if point.graphs and s.device.type == "cuda":
            n = n_calls(point.sets, case.traffic.least_us(s.limits))
        for name, candidate in case.candidates.items():
            if not candidate.wrong:
                calls[f"{k} {name}"] = candidate.call, n
    times = interleaved(calls, point.sets, s.device, point.graphs)
    timed_by = "wall clock" if s.device.type == "cpu" else "graphs" if point.graphs else "events"
    rows: list[dict[str, Any]] = []
    for k, case in enumerate(point.cases):
        candidates = {}
        for name, c in case.candidates.items():
            figures = tables.figures(times.get(f"{k} {name}", c.wrong))
            candidates[name] = figures | {"error": c.error, "allowed": c.allowed}
        row = {
            **case.key,
            "library": case.library,
            "bytes": case.traffic.bytes,
            "flops": case.traffic.flops,
            "least_us": round(case.traffic.least_us(s.limits), 3),
            "sets": point.sets,
            "timed_by": timed_by,
            "candidates": candidates,
        }
        rows.append(row)
        # What single neurons cost in plain PyTorch: aligned groups are compared with it.
        single = next((r for r in rows if r["selection"] == SELECTIONS[0].name), None)
        row["single_library_us"] = single and tables.median(single, LIBRARY)
    return rows
