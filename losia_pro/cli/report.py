"""The final table and the run's record."""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .memory import say_bytes

if TYPE_CHECKING:
    from .job import Job

PACKAGES = (
    "torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "triton", "lm-eval"
)  # fmt: skip

FILES = {  # of a run's folder, in the order in which they are listed
    "merged": "the tuned model, for AutoModelForCausalLM.from_pretrained",
    "delta.safetensors": "what changed, for losia_pro.load_delta on the base model",
    "adapter": "the adapter, for PeftModel.from_pretrained on the base model",
    "loss.png": "training and held-out loss of every method",
    "subnets.png": "which subnets moved when",
    "run.json": "every setting and figure",
}


def opening(job: Job) -> list[str]:
    """What is about to run."""
    o, d = job.options, job.data
    kind = "blocks" if job.kind == "document" else "examples"
    methods = ", then ".join([o.method, *o.compare])
    n = job.together.size
    processes = f", {n} processes" if n > 1 else ""
    lines = [
        f"model  {_short(o.model)}: {job.parameters:,} parameters, {job.precision} on {job.device.type}{processes}",
        f"data   {_short(o.data)}: {len(d.train):,} {kind} to train, {len(d.held_out):,} held out",
        f"run    {methods}: {job.steps:,} steps of {o.batch_size * o.accumulation * n:,} {kind}",
    ]
    if d.cut:
        lines.append(f"{d.cut:,} examples are longer than --max-length {o.max_length} and were cut")
    if d.dropped:
        lines.append(f"{d.dropped:,} examples left out: the cut leaves nothing to train")
    if job.kind != "document" and job.tokenizer.eos_token_id is None:
        lines.append(
            "The tokenizer has no end-of-sequence token: the model cannot learn where to stop."
        )
    return lines


def _short(name: str) -> str:
    """A path seen from the current folder, if it lies in it."""
    path = Path(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name


def table(record: dict[str, Any]) -> Table:
    """One row a method: before → after; the loss in nats a token."""
    base, results = record["base"], record["results"]
    accuracy = base["exact"] is not None
    n = record["examples"]["held_out"]
    t = Table(
        title=f"Results on {n:,} held-out example{'s' * (n != 1)}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    t.add_column("method", no_wrap=True)
    t.add_column("trainable", justify="right")
    t.add_column("held-out loss", justify="right", no_wrap=True)
    if accuracy:
        t.add_column("exact match", justify="right", no_wrap=True)
    t.add_column("seconds", justify="right")
    t.add_column("peak memory", justify="right")
    for method, r in results.items():
        exact = [f"{base['exact']:.1%} → {r['exact']:.1%}"] if accuracy else []
        t.add_row(
            method,
            f"{r['trainable']:,}",
            f"{base['loss']:.4f} → {r['loss']:.4f}",
            *exact,
            f"{r['seconds']:.{0 if r['seconds'] >= 10 else 1}f}",
            say_bytes(r["peak_bytes"]),
            style="bold" if method == record["arguments"]["method"] else "",
        )
    return t


def notes(record: dict[str, Any]) -> list[str]:
    """Sentences below the table."""
    results, base = record["results"], record["base"]
    words = ["Loss: nats per trained token."]
    if base["exact"] is not None:
        words.append("Exact match: greedy decoding gives the whole response.")
    words.append("Seconds: training alone.")
    if record.get("processes", 1) > 1:
        words.append("Peak memory: of the process that took most.")
    elif record["device"]["type"] == "cpu":
        words.append("Peak memory: of the whole process, libraries included.")
    lines = [" ".join(words)]
    gain = base["loss"] - results["full"]["loss"] if "full" in results else 0
    if gain > 0:
        shares = [
            f"{method} {(base['loss'] - r['loss']) / gain:.0%}"
            for method, r in results.items()
            if method != "full"
        ]
        if shares:
            lines.append(f"Of full fine-tuning's improvement: {', '.join(shares)}.")
    return lines


def files(folder: Path) -> list[str]:
    """What is in the folder, and what it is good for."""
    shown = {name: name + "/" * (folder / name).is_dir() for name in FILES}
    there = [name for name in FILES if (folder / name).exists()]
    width = max(len(shown[name]) for name in there)
    return [f"In {folder}:", *(f"  {shown[n]:<{width}}  {FILES[n]}" for n in there)]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for the record."""
    import losia_pro

    versions = {"losia_pro": losia_pro.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    # With its build (+cpu, +cu130), which the package's version need not name.
    versions["torch"] = str(torch.__version__)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {
        "versions": versions,
        "device": {
            "type": device.type,
            "name": name,
            "threads": torch.get_num_threads(),
            "platform": sys.platform,
        },
    }


def _cpu() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
