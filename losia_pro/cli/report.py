"""The final table and the run's record."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .memory import say_bytes

PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "triton")


def table(record: dict[str, Any]) -> Table:
    """One row a method: before → after; the loss in nats a token."""
    base, results = record["base"], record["results"]
    accuracy = base["exact"] is not None
    n = record["examples"]["held_out"]
    t = Table(
        title=f"Results on {n:,} held-out examples",
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
            f"{r['seconds']:.0f}",
            say_bytes(r["peak_bytes"]),
            style="bold" if method == record["arguments"]["method"] else "",
        )
    return t


def notes(record: dict[str, Any]) -> list[str]:
    """Sentences below the table."""
    results, base = record["results"], record["base"]
    lines = []
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


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for the record."""
    import losia_pro

    versions = {"losia_pro": losia_pro.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "versions": versions,
        "device": {
            "type": device.type,
            "name": name or platform.machine(),
            "threads": torch.get_num_threads(),
            "platform": sys.platform,
        },
    }
