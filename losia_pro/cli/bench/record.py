"""The JSON file of a benchmark: what ran where, every measurement so far, and what it does not show."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import losia_pro
from losia_pro import dispatch

from ..errors import CliError
from ..rundir import free
from . import device as devices

PACKAGES = ("torch", "triton", "transformers", "peft")
FORMAT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that all three benchmarks have."""
    parser.add_argument(
        "--device", metavar="NAME", help="cuda, cuda:1 or cpu; default the first GPU"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the JSON file; default runs/BENCHMARK-DEVICE.json, with a number where there is one",
    )
    parser.add_argument(
        "--revision", metavar="TEXT", help="of the source, where git cannot be asked for it"
    )


class Record:
    """Rows of one run. ``add`` rewrites the file, at most once in ``every`` seconds; ``close`` always."""

    def __init__(
        self,
        benchmark: str,
        args: argparse.Namespace,
        device: torch.device,
        not_shown: list[str],
        every: float = 0.0,
    ) -> None:
        description = devices.describe(device)
        slug = re.sub(r"[^a-z0-9]+", "-", description["name"].lower()).strip("-")
        self.path = args.output or free(f"{benchmark}-{slug}", ".json")
        self.device, self.every = device, every
        self.rows: list[dict[str, Any]] = []
        self.start = time.perf_counter()
        self._saved = -float("inf")
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "benchmark": benchmark,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "arguments": {k: v for k, v in vars(args).items() if k != "output" and not callable(v)},
            "device": description,
            "state_before": devices.state(device),
            "versions": versions(),
            "revision": args.revision or revision(),
            "LOSIA_IMPL": dispatch.IMPL,
            "not_shown": not_shown,
            "complete": False,
            "rows": self.rows,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.save()
        except OSError as error:
            raise CliError(f"--output {self.path}: {error.strerror}") from error

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.seconds() - self._saved >= self.every:
            self.save()

    def close(self, stopped: str | None) -> None:
        """Finish the file; ``stopped`` says why not everything was measured."""
        self.content |= {
            "complete": stopped is None,
            "stopped": stopped,
            "seconds": round(self.seconds(), 1),
            "state_after": devices.state(self.device),
        }
        self.save()

    def save(self) -> None:
        """Write the file whole or not at all, one row a line."""
        head = {k: v for k, v in self.content.items() if k != "rows"}
        text = json.dumps(head, indent=1)[:-2]
        rows = ",\n".join("  " + json.dumps(row) for row in self.rows)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(f'{text},\n "rows": [\n{rows}\n ]\n}}\n')
        partial.replace(self.path)
        self._saved = self.seconds()


def finish(record: Record, stopped: str | None, bad: list[str]) -> int:
    """Close the record, say what it does not show, and what went wrong; the exit code."""
    record.close(stopped)
    print("\nNot shown by these figures:")
    for line in record.content["not_shown"]:
        print(f"- {line}")
    if stopped:
        print(f"\nStopped early: {stopped}.")
    for line in bad:
        print(f"WRONG: {line}")
    print(f"\n{record.seconds():.0f} s. Recorded in {record.path}")
    return 1 if bad else 0


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "losia_pro": losia_pro.__version__,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        found[package] = None
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def revision() -> str | None:
    """The commit of the source that is running, marked if its files were changed since."""
    git = ["git", "-C", str(Path(losia_pro.__file__).parent)]
    try:
        tracked = _git(git, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(git, "rev-parse", "HEAD")
        changed = _git(git, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("-dirty" if changed else "") if tracked else None


def _git(git: list[str], *words: str) -> str:
    done = subprocess.run([*git, *words], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
