"""The command: ``python -m benchmarks.quality --help``."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from losia_pro.cli.bench import device as devices
from losia_pro.cli.bench.record import revision, versions
from losia_pro.cli.errors import CliError
from losia_pro.cli.values import count, names, positive

from . import __doc__ as description
from . import (
    analysis,
    bound,
    choice,
    corpora,
    model,
    mps,
    period_data,
    rates,
    record,
    studies,
    table,
)
from .methods import METHODS
from .plan import BASE, Job, Plan, choose
from .pool import Place, Pool
from .settings import SIZES, TARGETS, WORKERS, Setting

CONTINUAL = "continual"  # the study that tunes to all targets, one after another
SEQUENCE = (
    "full lora-r8 losia-paper-T10 losia-1/8 losia-1/4 losia-default losia-single".split()
)  # that study's methods
TABLE = [name for name in METHODS if ": " not in name]  # without the studies' configurations
SETTINGS = (
    "steps",
    "batch",
    "task_batch",
    "pretrain_steps",
    "target_bytes",
)  # flags of these names
REST = 15.0  # seconds of the budget that are left for the end


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m benchmarks.quality", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    p.add_argument("--size", choices=SIZES, default="26m", help="of the model; default 26m")
    p.add_argument(
        "--budget", type=positive, default=3000.0, metavar="SECONDS", help="default 3000"
    )
    p.add_argument("--output", type=Path, default=Path("runs/quality.json"), metavar="FILE")
    p.add_argument(
        "--base", type=Path, default=Path("runs/quality-base"), metavar="DIR", help="where base models are kept"
    )  # fmt: skip
    p.add_argument(
        "--targets", metavar="A,B or N", help=f"all, or the first N that there are of {', '.join(choice.ORDER)}; "
        f"default {', '.join(f'{n} ({size})' for size, n in TARGETS.items())}"
    )  # fmt: skip
    p.add_argument(
        "--methods", type=names, metavar="A,B", help=f"of {', '.join(TABLE)}; default {', '.join(table.METHODS)}"
    )  # fmt: skip
    p.add_argument("--tiers", type=names, metavar="1,2", help="the methods of these tiers instead")
    p.add_argument(
        "--study",
        choices=[*studies.STUDIES, CONTINUAL, bound.STUDY],
        help="one of the paper's, or of levers beyond it",
    )
    p.add_argument("--seeds", type=count, default=5, metavar="N", help="final ones; default 5")
    p.add_argument("--tuning-seeds", type=count, default=1, metavar="N", help="default 1")
    for flag in SETTINGS:
        p.add_argument(
            f"--{flag.replace('_', '-')}", type=count, metavar="N", help="instead of the size's"
        )
    p.add_argument("--workers", type=count, metavar="N", help="processes that share the device")
    p.add_argument("--device", metavar="NAME", help="cuda, cuda:1 or cpu; default the first GPU")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default on a GPU: yes")
    p.add_argument(
        "--mps", action=argparse.BooleanOptionalAction, help="run NVIDIA's multi-process service meanwhile; default "
        "on a GPU: where it works"
    )  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="say what would be run, and for how long")
    p.add_argument(
        "--summarize", type=Path, metavar="FILE", help="make the tables of a record anew, and nothing else"
    )  # fmt: skip
    p.add_argument("--revision", metavar="TEXT", help="of the source, where git cannot be asked")
    return p


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    begun = time.perf_counter()
    # What deterministic pretraining asks for, and one thread for each worker's compiler; both are inherited.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if args.summarize:
            return summarize(args.summarize)
        wanted = args.device != "cpu" and not args.dry_run if args.mps is None else args.mps
        with tempfile.TemporaryDirectory() as folder, mps.service(wanted) as sharing:
            return run(args, begun, Path(folder), sharing)
    except CliError as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 2


def summarize(path: Path) -> int:
    """From the runs of a record alone; where it was made there may be no SciPy."""
    try:
        head, runs = record.read(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CliError(f"--summarize {path}: no record of this command, which is JSON") from error
    plan = Plan(**head["plan"])
    for row in runs:
        plan.add(row)
    conclude(path, head, plan)
    return 0


def conclude(path: Path, head: dict[str, Any], plan: Plan) -> None:
    """Write the record, print its tables, and for a study a sentence for each claim of the paper."""
    rows = analysis.summary(plan)
    if head["study"] in studies.STUDIES:
        head |= studies.conclusions(head["study"], rows)
    if head["study"] is None:
        head["rate_rule"] = rates.fit(plan.done())
    record.write(path, head, plan, rows)
    print(f"\n{analysis.text(plan, rows)}\n")
    if "period_data" in head:
        print(f"{period_data.text(head['period_data'])}\n")
    if head.get("rate_rule"):
        print(f"{rates.said(head['rate_rule'])}\n")
    for sentence in head.get("sentences", []):
        print(f"{sentence}\n")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def run(args: argparse.Namespace, begun: float, folder: Path, sharing: str) -> int:
    device = devices.choose(args.device)
    setting, methods = _setting(args), _methods(args)
    if args.study == bound.STUDY:
        return bound.run(args, setting, device)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    cores = len(os.sched_getaffinity(0))
    workers = args.workers or (
        max(1, min(WORKERS[args.size], cores // 2)) if device.type == "cuda" else cores
    )
    pool = None if args.dry_run else Pool(workers, setting)
    said = _Clock(begun)
    try:
        domains, about = corpora.build(setting, *choice.wanted(args))
        targets = choice.targets(args, domains)
        said(
            f"{', '.join(targets)}: {sum(a['bytes']['train'] for a in about.values() if 'bytes' in a) / 1e6:.0f} MB"
        )
        base_folder = args.base / corpora.base_digest(setting, about)
        if pool:
            corpora.save(folder, domains)
            pool.open(Place(str(device), folder, base_folder.resolve(), compiled))
        base = model.build(setting, torch.device("cpu"))
        pretraining: dict[str, Any] = {"seconds": None}
        if not model.load(base, base_folder) and pool:
            pretraining = pool.pretrain()
            model.load(base, base_folder)
            said(f"base model pretrained in {pretraining['seconds']:.0f} s")
        digest = model.digest(base)
        context = {
            t: f"{setting.digest()} {digest} {about[t]['sha256']} {device.type}" for t in targets
        }
        lines = record.Lines(args.output.with_suffix(".jsonl"))
        sequence = args.study == CONTINUAL
        plan = Plan(methods, targets, context, args.seeds, args.tuning_seeds, sequence)
        for row in lines.rows:
            if row["status"] == "ok":
                plan.add(row)
        done, wanted = plan.size()
        each = _seconds(lines.rows, setting, device) / workers
        said(
            f"base {digest}; {workers} workers, {sharing}; {done} of {wanted} runs done, {len(lines.rows)} "
            f"in the file; about {(wanted - done) * each:.0f} s for the rest"
        )
        if pool is None:
            return 0
        stopped = _run(args, begun, said, pool, plan, lines, digest)
        head = {
            "benchmark": "quality",
            "study": args.study,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "arguments": {k: v for k, v in vars(args).items() if k not in ("output", "base")},
            "setting": dataclasses.asdict(setting),
            "device": devices.describe(device),
            "versions": versions(),
            "revision": args.revision or revision(),
            "workers": workers,
            "sharing": sharing,
            "corpora": about,
            "base": {"digest": digest, "pretraining_seconds": pretraining["seconds"]},
            "plan": {"methods": methods, "targets": targets, "context": context}
            | {"seeds": args.seeds, "tuning_seeds": args.tuning_seeds, "sequence": sequence},
            "stopped": stopped,
            "seconds": round(time.perf_counter() - begun, 1),
        }
        conclude(args.output, head, plan)
        done, wanted = plan.size()
        said(f"{done} of {wanted} runs; {stopped or 'complete'}; recorded in {args.output}")
        return 0
    finally:
        if pool:
            pool.close()


def _run(
    args: argparse.Namespace, begun: float, said: _Clock, pool: Pool, plan: Plan, lines: record.Lines, digest: str
) -> str | None:  # fmt: skip
    """Hand out jobs until all are done or the budget is nearly spent; says why it stopped early."""
    started: dict[Job, float] = {}
    recent: list[float] = []
    stopped = None

    def next_job(last: str | None, busy: list[Job]) -> Job | None:
        nonlocal stopped
        under_way = {plan.key(job) for job in busy}
        jobs = [job for job in plan.pending() if plan.key(job) not in under_way]
        if not jobs:
            return None
        now = time.perf_counter()
        if now - begun + max(recent[-40:], default=0.0) > args.budget - REST:
            stopped = f"the budget of {args.budget:.0f} s"
            return None
        job = choose(jobs, last, [j.method for j in busy])
        started[job] = now
        return job

    try:
        for job, row in pool.run(next_job):
            wall = time.perf_counter() - started.pop(job)
            recent.append(wall)
            row = {
                **{"key": plan.key(job), "method": job.method, "target": job.target, "lr": job.lr},
                **{"exponent": job.exponent, "seed": job.seed, "base": digest},
                **row,
                "wall": round(wall, 2),
            }
            lines.add(row)
            plan.add(row)
            what = f"{job.method}, {job.target}" + (
                f", {job.lr:g}, seed {job.seed}" if job.method != BASE else ""
            )
            figures = f"{row['test_loss']}" if row["status"] == "ok" else row["reason"]
            said(f"{what}: {figures} ({wall:.1f} s)")
    except KeyboardInterrupt:
        return "interrupted"
    done, wanted = plan.size()
    if stopped is None and done < wanted:
        return "the rest failed twice, or converged at no learning rate"
    return stopped


class _Clock:
    """Prints a line with the seconds since the start."""

    def __init__(self, begun: float) -> None:
        self.begun = begun

    def __call__(self, text: str) -> None:
        print(f"{time.perf_counter() - self.begun:6.1f} s  {text}", flush=True)


def _setting(args: argparse.Namespace) -> Setting:
    flags = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    return dataclasses.replace(SIZES[args.size], **flags)


def _methods(args: argparse.Namespace) -> list[str]:
    if args.study in studies.STUDIES:
        return studies.names(args.study)
    if args.methods is None and args.study == CONTINUAL:
        return SEQUENCE
    if args.tiers is not None:
        return [name for name, method in METHODS.items() if str(method.tier) in args.tiers]
    if args.methods is None:
        return table.METHODS
    for name in args.methods:
        if name not in METHODS:
            raise CliError(f"--methods {name}: is none of {', '.join(TABLE)}")
    return list(args.methods)


def _seconds(rows: list[dict[str, Any]], setting: Setting, device: torch.device) -> float:
    """Of one run in one worker: the median of those in the file, or from its floating-point operations."""
    walls = [r["wall"] for r in rows if r["status"] == "ok" and r["method"] != BASE]
    if walls:
        return statistics.median(walls)
    weights = setting.layers * (4 * setting.hidden**2 + 3 * setting.hidden * setting.intermediate)
    operations = 6 * weights * setting.steps * setting.batch * setting.length
    return operations / (250e12 / 8 if device.type == "cuda" else 5e9)


if __name__ == "__main__":
    sys.exit(main())
