"""Why a kernel is not at its least-traffic time: what Nsight Compute counts of each launch at LLaMA-2 7B's shapes.

    python -m benchmarks.profile_kernels                          # on a GPU, with ncu on PATH; a few minutes
    python -m benchmarks.profile_kernels --cases 'subnet_grad 11008x4096'

Each case is the default implementation on the inputs of ``losia-pro bench kernels``, in a process of its own under
``ncu``: checked, warmed up, then one call is profiled. Writes ``runs/profile-kernels-MODEL-DEVICE.json``, one row
a launch: bytes moved, bandwidth, use of the tensor cores and the main reasons why warps waited.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from losia_pro import dispatch
from losia_pro.cli.bench import device as devices
from losia_pro.cli.bench import model_operations, operations
from losia_pro.cli.bench.breakdown import short
from losia_pro.cli.bench.points import Case, Setting, Way
from losia_pro.cli.bench.record import Record, add_arguments, finish
from losia_pro.cli.bench.shapes import MODELS, SELECTIONS
from losia_pro.cli.bench.table import number, table
from losia_pro.cli.bench.timing import synchronize
from losia_pro.cli.bench.traffic import Limits
from losia_pro.cli.errors import CliError

ROOT = Path(__file__).parent.parent
MODEL = "llama2-7b"
TOKENS = 8192
LAYERS = 8  # what write_back_ writes is then several times the L2 cache
DTYPE = torch.bfloat16
CHOSEN = [s for s in SELECTIONS if s.name in ("single", "groups of 16", "1/64 x all")]
WARMUP = 3
CASE_S = 240  # a case that takes longer hangs

SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)
FIGURES = {  # of a row: ncu's metrics, of which the first that is there counts
    "us": ("gpu__time_duration.sum",),
    "read_bytes": ("dram__bytes_read.sum",),
    "written_bytes": ("dram__bytes_write.sum",),
    "l2_to_l1_bytes": ("l1tex__m_xbar2l1tex_read_bytes.sum",),
    "dram_pct": (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "tensor_pct": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",),
    "occupancy_pct": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
# Asked for by name: whether SECTIONS have them depends on the device.
NAMED = ("read_bytes", "written_bytes", "l2_to_l1_bytes", "tensor_pct")
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
SCALES = {"ns": 1e-3, "ms": 1e3, "s": 1e6, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
NOT_SHOWN = [
    "Each launch is measured alone, with empty caches and repeated until every counter is read; the clocks are left as "
    "they are. In a step, what the launch before has written may still be in the L2 cache.",
    "us is a launch's time under the profiler; `losia-pro bench kernels` has the times without it.",
    "least_us is the whole operation's, which may take several launches.",
    "Bytes written count what has left the L2 cache by the end of the launch.",
    "Stalls are warps that wait for each instruction that is issued, on average; they may overlap.",
    "Data and selections are random; a trained model's chosen neurons may lie closer together.",
]


class Profiled(NamedTuple):
    """A case: an operation at one shape and selection."""

    op: str
    into: int
    out: int
    selection: str

    @property
    def name(self) -> str:
        where = f"{self.out}x{self.into}"
        if self.op == "gather_columns":
            where = str(self.into)
        elif self.op == "write_back_":
            where = f"{LAYERS} layers"
        return f"{self.op} {where} {self.selection}"

    def prepare(self, device: torch.device, limits: Limits) -> Case:
        """The case of `bench kernels`, with its default implementation checked."""
        selections = [s for s in CHOSEN if s.name == self.selection]
        default = [Way("default", None)]
        s = Setting(device, DTYPE, limits, selections, lambda op, device: default)
        if self.op == "write_back_":
            point = model_operations.write_back_(s, MODEL, LAYERS)
        else:
            point = operations.POINTS[self.op](s, self.into, self.out, TOKENS)
        case = next(c for c in point.cases if c.key["selection"] == self.selection)
        if wrong := case.candidates["default"].wrong:
            raise SystemExit(f"{self.name}: {wrong}")
        return case


def cases() -> list[Profiled]:
    linears = list(dict.fromkeys(MODELS[MODEL].linears()))
    found = [
        Profiled(op, into, out, s.name)
        for op in ("gather_columns", "subnet_grad")
        for into, out in operations.shapes_of(op, linears)
        for s in CHOSEN
    ]
    hidden = MODELS[MODEL].hidden
    found += [Profiled("write_back_", hidden, hidden, s.name) for s in CHOSEN]
    return [*found, Profiled("importance_update_", hidden, hidden, "whole")]


def child(case: Profiled, device: torch.device, limits: Limits) -> None:
    """Say what the case is, and call it once in the profiler's range."""
    torch.manual_seed(0)
    prepared = case.prepare(device, limits)
    least = prepared.traffic
    said = {"bytes": least.bytes, "flops": least.flops, "least_us": least.least_us(limits)}
    print(json.dumps({**prepared.key, **said}), flush=True)
    call = prepared.candidates["default"].call
    for _ in range(WARMUP):
        call(0)
    synchronize(device)
    with torch.cuda.profiler.profile():
        call(0)
        synchronize(device)


def profile(ncu: str, case: Profiled, device: str, limits: Limits) -> list[dict[str, Any]]:
    """A row of each launch of the case, or one that says why there is none."""
    mine = [sys.executable, "-m", "benchmarks.profile_kernels", "--device", device]
    mine += ["--child", case.name, "--limits", json.dumps(dataclasses.asdict(limits))]
    sections = [word for name in SECTIONS for word in ("--section", name)]
    metrics = ["--metrics", ",".join(FIGURES[name][0] for name in NAMED)]
    for more in (metrics, []):  # ncu refuses a name that it does not know
        tool = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
        tool += ["--profile-from-start", "off", *sections, *more]
        try:
            done = subprocess.run(
                [*tool, *mine],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=CASE_S,
            )  # fmt: skip
            text = done.stdout
        except subprocess.TimeoutExpired:
            text = f"took longer than {CASE_S} s"
        found = launches(text)
        if found or not re.search(r"==ERROR==.*metric", text):
            break
    if not found:
        last = [line.strip() for line in text.splitlines() if line.strip()][-3:]
        return [{"case": case.name, "status": "failed", "reason": " | ".join(last)}]
    key = next((json.loads(line) for line in text.splitlines() if line.startswith('{"op"')), {})
    head = {"case": case.name, "status": "ok", **key, "launches": len(found)}
    return [{**head, "launch": k + 1, **launch} for k, launch in enumerate(found)]


def launches(text: str) -> list[dict[str, Any]]:
    """The figures of each launch in ncu's raw page: a line of names, one of units, then the rows; other lines are
    the tool's and the program's."""
    begun = itertools.dropwhile(lambda line: not line.startswith('"ID",'), text.splitlines())
    page = list(csv.reader(line for line in begun if line.startswith('"')))
    if len(page) < 3:
        return []
    names, units, *rows = page
    rows = [row for row in rows if len(row) == len(names) == len(units)]
    return [_figures(dict(zip(names, zip(row, units, strict=True), strict=True))) for row in rows]


def _figures(cells: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """``cells`` holds value and unit of each column."""
    figures: dict[str, Any] = {
        "kernel": short(cells["Kernel Name"][0]),
        "grid": cells["Grid Size"][0],
        "block": cells["Block Size"][0],
    }
    for name, metrics in FIGURES.items():
        there = (v for m in metrics if m in cells and (v := _value(*cells[m])) is not None)
        figures[name] = next(there, None)
    moved, us = (figures["read_bytes"], figures["written_bytes"]), figures["us"]
    known = us and None not in moved
    figures["gb_per_s"] = sum(moved) / us / 1e3 if known else None
    stalls = {m[1]: _value(*cells[c]) for c in cells if (m := STALL.fullmatch(c))}
    stalls.pop("selected", None)  # a warp that issues
    waits = sorted((-v, reason) for reason, v in stalls.items() if v)
    figures["stalls"] = {reason: -v for v, reason in waits[:3]}
    return figures


def _value(text: str, unit: str) -> float | None:
    """In microseconds, bytes or the metric's own unit; None for `n/a`."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value * SCALES.get(unit, 1.0) if math.isfinite(value) else None


def shown(rows: list[dict[str, Any]]) -> str:
    head = ["case", "kernel", "us", "least us", "GB read", "GB written", "TB/s", "tensor %", "stalls"]  # fmt: skip
    lines = []
    for row in rows:
        if row["status"] == "failed":
            lines.append([row["case"], "failed", *["-"] * (len(head) - 2)])
            continue
        of = f"{row['launch']}/{row['launches']} " if row["launches"] > 1 else ""
        scaled = {"read_bytes": 1e9, "written_bytes": 1e9, "gb_per_s": 1e3, "tensor_pct": 1.0}
        cells = [None if row[k] is None else row[k] / by for k, by in scaled.items()]
        stalls = ", ".join(f"{reason} {number(v)}" for reason, v in row["stalls"].items())
        times = [number(row["us"]), number(row.get("least_us"))]
        lines.append([row["case"], of + row["kernel"], *times, *map(number, cells), stalls])
    return table(head, lines, left=2)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(made)
    made.add_argument(
        "--cases", metavar="TEXT", default="", help="those whose names contain it; default all"
    )
    made.add_argument("--child", help=argparse.SUPPRESS)  # the case that a process under ncu runs
    made.add_argument("--limits", type=json.loads, help=argparse.SUPPRESS)
    return made


def run(args: argparse.Namespace) -> int:
    chosen = [case for case in cases() if args.cases in case.name]
    if not chosen:
        raise CliError(f"--cases {args.cases}: is in none of {', '.join(c.name for c in cases())}")
    device = devices.choose(args.device)
    if device.type != "cuda":
        raise CliError("kernels are profiled on an NVIDIA GPU, and PyTorch was given none")
    ncu = shutil.which("ncu")
    if ncu is None:
        raise CliError("ncu is not on PATH: it is NVIDIA's Nsight Compute, of the CUDA toolkit")
    del args.child, args.limits  # not the user's
    record = Record(f"profile-kernels-{MODEL}", args, device, NOT_SHOWN)
    version = subprocess.run([ncu, "--version"], capture_output=True, text=True).stdout
    record.content["versions"]["ncu"] = "".join(re.findall(r"Version (\S+)", version)[:1]) or None
    limits = devices.limits(device, DTYPE)
    torch.cuda.empty_cache()
    record.content["limits"] = dataclasses.asdict(limits)
    ops = dict.fromkeys(case.op for case in chosen)
    record.content["default_impl"] = {op: dispatch.resolve(op, device) for op in ops}
    record.content["special_impl"] = {
        op: found for op in ops if (found := dispatch.resolve_special(op, device))
    }
    for case in chosen:
        print(f"{record.seconds():.0f} s: {case.name}", flush=True)
        for row in profile(ncu, case, str(device), limits):
            record.add(row)
    print(f"\n{shown(record.rows)}")
    bad = [f"{r['case']}: {r['reason']}" for r in record.rows if r["status"] == "failed"]
    return finish(record, None, bad)


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        if args.child:
            case = next(c for c in cases() if c.name == args.child)
            child(case, devices.choose(args.device), Limits(**args.limits))
            return 0
        return run(args)
    except CliError as error:
        print(f"benchmarks.profile_kernels: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
