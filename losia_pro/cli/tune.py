"""Measure launch shapes of the Triton kernels on this GPU, and keep those that are faster than the kernels' rule.

    losia-pro tune                                  the linears of LLaMA-2 7B
    losia-pro tune --models gemma-2b,llama3-8b --budget 120
    losia-pro tune --shape 4096x14336 --neuron-groups 16 --rank-factor 0.25

Each shape that a kernel might be launched with is checked and timed as `losia-pro bench kernels` does. It is kept where
it takes 3 % less than the rule's, on the mean over the numbers of tokens, and is slower at none. What is kept is in a
file in the cache directory, for this GPU and this version of Triton, from which every process takes its launch shapes;
to go back to the rule, delete it. It is written after each weight, so a run that ends early has lost nothing. Gradients
may change in their last bits: their sums are split otherwise.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from losia_pro.config import IN_FACTOR, LosiaConfig

from .bench import device as devices
from .bench import kernels, operations
from .bench.points import LIBRARY, Setting, Way
from .bench.shapes import MODELS, Selection, unique_linears
from .bench.timing import first_line
from .errors import CliError
from .values import count, names, positive

# By what a launch shape is worth: where there is a CUDA module, it gathers and Triton multiplies.
OPS = ("subnet_grad", "importance_update_", "gather_columns")
GAIN = 0.03  # less than this may be noise
RULE = "rule"

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", metavar="NAME", help="cuda or cuda:1; default the first GPU")
    parser.add_argument(
        "--models", type=names, metavar="A,B",
        help=f"of {', '.join(MODELS)}; default llama2-7b, or none with --shape",
    )  # fmt: skip
    parser.add_argument(
        "--shape", type=_shape, action="append", default=[], metavar="OUTxIN",
        help="of a weight; may be repeated",
    )  # fmt: skip
    parser.add_argument("--tokens", type=_counts, default=[8192, 2048], metavar="N,N")
    parser.add_argument("--ops", type=names, default=list(OPS), metavar="A,B", help=", ".join(OPS))
    parser.add_argument("--dtype", choices=kernels.DTYPES, default="bf16", help="default bf16")
    parser.add_argument(
        "--rank-factor", type=positive, default=1 / 8, metavar="SHARE", help="default 1/8"
    )
    parser.add_argument(
        "--neuron-groups", type=_counts, default=[1, 8, 16], metavar="N,N", help="default 1,8,16"
    )
    parser.add_argument(
        "--budget", type=positive, metavar="SECONDS", help="nothing is begun after this"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: in the cache directory"
    )


def run(args: argparse.Namespace) -> int:
    device = devices.choose(args.device)
    for what, given, known in (("models", args.models or [], MODELS), ("ops", args.ops, OPS)):
        if unknown := [name for name in given if name not in known]:
            raise CliError(f"--{what} {unknown[0]}: is none of {', '.join(known)}")
    if args.rank_factor > 1:
        raise CliError(f"--rank-factor {args.rank_factor:g}: must be at most 1")
    try:
        from losia_pro.kernels import launch, tuned
    except ImportError as error:
        raise CliError(f"there is nothing to tune without Triton: {error}") from error
    if why := launch.why_not(device):
        raise CliError(f"--device {device}: {why}")
    models = args.models or ([] if args.shape else ["llama2-7b"])
    linears = list(dict.fromkeys([*unique_linears(models), *args.shape]))
    file, header = args.output or tuned.path(device), tuned.header(device)
    kept = {tuned.key(row): row for row in _before(file, header)}
    torch.manual_seed(0)
    dtype = kernels.DTYPES[args.dtype]
    limits = devices.limits(device, dtype)
    print(
        f"{header['device']}, Triton {header['triton']}; {', '.join(map(str, args.tokens))} tokens"
    )
    began, failed = perf_counter(), False
    plan = _plan(args.ops, linears)
    for done, (op, into, out) in enumerate(plan):
        if args.budget and perf_counter() - began > args.budget:
            print(f"The budget of {args.budget:.0f} s: {len(plan) - done} of {len(plan)} left")
            break
        candidates = dict(_candidates(op, dtype, device))
        ways = functools.partial(_ways, candidates)
        s = Setting(device, dtype, limits, _selections(op, args, into), ways)
        try:
            found = [_measure(s, op, into, out, tokens) for tokens in args.tokens]
        except Exception as error:  # noqa: BLE001 - the shapes after this one are still worth measuring
            print(f"  WRONG: {op} at {out} x {into}: {first_line(error)}")
            failed = True
            continue
        for key in found[0]:
            times = [at[key] for at in found]
            name = best(times)
            kept.pop(key, None)
            ratio = ""
            if name != RULE:
                kept[key] = _row(key, candidates[name], args.tokens, times, name)
                ratio = f", {_mean(times, name):.3f}x of the rule's time"
            print(f"  {_said(key)}: {name}{ratio}", flush=True)
        _write(file, header, list(kept.values()))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    tuned.table.cache_clear()
    print(f"{len(kept)} launch shapes in {file}")
    return 1 if failed else 0


def best(times: list[dict[str, float]]) -> str:
    """The name of the launch shape that is kept; ``times`` has, for each number of tokens, those of the right ones."""
    ratios = {RULE: 1.0 - GAIN}
    for name in set.intersection(*map(set, times)) - {RULE}:
        if all(time[name] <= time[RULE] for time in times):
            ratios[name] = _mean(times, name)
    return min(ratios, key=lambda name: (ratios[name], name != RULE))


def _mean(times: list[dict[str, float]], name: str) -> float:
    return sum(time[name] / time[RULE] for time in times) / len(times)


def _measure(s: Setting, op: str, into: int, out: int, tokens: int) -> dict[Any, dict[str, float]]:
    """Microseconds of each launch shape, by what the kernel looks its own up by."""
    from losia_pro.kernels import tuned

    point = operations.POINTS[op](s, into, out, tokens)
    keys = []
    for case in point.cases:
        if wrong := case.candidates[RULE].wrong:
            raise RuntimeError(wrong)
        with tuned.asked(op) as asked:
            case.candidates[RULE].call(0)
        keys.append(next(iter(asked), None))  # none where there is no launch shape to choose
        if keys[-1] is None:
            case.candidates.clear()
        case.candidates.pop(LIBRARY, None)
    found = {}
    for key, row in zip(keys, kernels.timed(s, point), strict=True):
        if key is None:
            continue
        if refused := row["candidates"][RULE].get("refused"):
            raise RuntimeError(refused)
        timed = row["candidates"].items()
        found[key] = {name: c["median_us"] for name, c in timed if "median_us" in c}
    return found


def _ways(candidates: dict[str, Any], op: str, device: torch.device) -> list[Way]:
    from losia_pro.kernels import tuned

    return [
        Way(name, "triton", functools.partial(tuned.forced, op, tiles))
        for name, tiles in candidates.items()
    ]


def _candidates(
    op: str, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """The rule's, and those that are measured against it, by name."""
    from losia_pro.kernels.tiles import device_of

    yield RULE, None
    module = importlib.import_module(f"losia_pro.kernels.{op.rstrip('_')}")
    for tiles in module.candidates(dtype, device_of(device)):
        *blocks, warps, stages = tiles if len(tiles) == 5 else (*tiles, 0)
        name = f"{'x'.join(map(str, blocks))}, {warps} warps"
        yield name + (f", {stages} stages" if stages else ""), tiles


def _selections(op: str, args: argparse.Namespace, into: int) -> list[Selection]:
    """The groups that were asked for, ``LosiaConfig()``'s selection, and 1/64 of the inputs, whose outputs are all
    chosen. Single neurons have no product of their own."""
    groups = [g for g in dict.fromkeys(args.neuron_groups) if g > 1 or op != "subnet_grad"]
    p = args.rank_factor
    found = [Selection(f"groups of {g}", p, p, g) for g in groups]
    default = Selection("the default", IN_FACTOR, 1.0, LosiaConfig().group(into))
    return [*found, default, Selection("1/64 of the inputs", 1 / 64, 1.0)]


def _plan(ops: list[str], linears: list[tuple[int, int]]) -> list[tuple[str, int, int]]:
    """Operation, inputs and outputs: all operations of a weight before the next weight's.

    Both sides of a linear are gathered from, its inputs and the gradient of its outputs.
    """
    plan: dict[tuple[str, int, int], None] = {}
    for into, out in linears:
        for op in sorted(ops, key=OPS.index):
            sides = ((into, 1), (out, 1)) if op == "gather_columns" else ((into, out),)
            plan |= dict.fromkeys((op, *side) for side in sides)
    return list(plan)


def _row(key: Any, tiles: Any, tokens: list[int], times: list[dict[str, float]], name: str) -> Row:
    from losia_pro.kernels import tuned

    op, dtype, *sizes = key
    return {
        "op": op,
        "dtype": str(dtype).removeprefix("torch."),
        **dict(zip(tuned.SIZES[op], sizes, strict=True)),
        "tiles": list(tiles),
        "tokens": tokens,
        "us": [time[name] for time in times],
        "rule_us": [time[RULE] for time in times],
    }


def _said(key: Any) -> str:
    from losia_pro.kernels import tuned

    op, _, *sizes = key
    return f"{op}, " + ", ".join(f"{n} {v}" for n, v in zip(tuned.SIZES[op], sizes, strict=True))


def _before(file: Path, header: Row) -> list[Row]:
    """What a table holds already, if it is one of this device; another is replaced."""
    from losia_pro.kernels import tuned

    try:
        return tuned.read(file, header)
    except (OSError, ValueError):
        return []


def _write(file: Path, header: Row, rows: list[Row]) -> None:
    from losia_pro.kernels import tuned

    try:
        tuned.write(file, header, rows)
    except OSError as error:
        raise CliError(f"--output {file}: {error.strerror}") from error


def _shape(text: str) -> tuple[int, int]:
    """``(in, out)`` of a weight's ``OUTxIN``."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 4096x11008")
    return count(found[2]), count(found[1])


def _counts(text: str) -> list[int]:
    return [count(n) for n in names(text)]
