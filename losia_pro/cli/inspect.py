"""``losia-pro inspect``: what a delta holds. Needs only the core, and not the base model."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch
from torch import nn

from losia_pro import delta
from losia_pro.config import GROUP
from losia_pro.entries import bounds, decode
from losia_pro.selection import are_runs

from .errors import CliError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("delta", metavar="DELTA", help="a file that losia.save_delta wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    try:
        facts = examine(args.delta)
    except (OSError, ValueError) as error:
        raise CliError(str(error)) from error
    print(json.dumps(facts, indent=2) if args.json else describe(facts))
    return 0


def examine(path: str) -> dict[str, Any]:
    """Everything that is printed, as plain data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a delta, or one that is truncated or malformed.
    """
    header, tensors = delta.read(path)
    try:
        forms = delta.modules_of(header)
        linears = {name: _linear(name, header, tensors) for name in forms}
        delta.check(linears, forms, tensors)
        config = json.loads(header.get("config", "null"))
        if not isinstance(config, dict | None):
            raise ValueError("malformed delta: its header's config is no object")
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: {str(error) or 'malformed delta'}") from error
    modules: dict[str, dict[str, Any]] = {}
    for name, linear in linears.items():
        parts = {k: t for k, t in tensors.items() if k.startswith(f"{name}.")}
        entries = torch.zeros(linear.weight.shape, dtype=torch.bool)
        places = decode(entries, name, tensors)
        for at, _ in places:
            entries[at] = True
        modules[name] = {
            "shape": list(entries.shape),
            "dtype": str(linear.weight.dtype).removeprefix("torch."),
            "form": forms[name],
            "places": len(places) if forms[name] == "blocks" else None,
            "input_runs": _runs([bounds(at)[1] for at, _ in places], linear.in_features, config),
            "entries": int(entries.sum()),
            "share": int(entries.sum()) / entries.numel(),
            "bias": f"{name}.bias" in tensors,
            "bytes": sum(t.nbytes for t in parts.values()),
        }
    entries_in_all = sum(m["entries"] for m in modules.values())
    return {
        "file": str(path),
        "bytes": os.path.getsize(path),
        "version": header["version"],
        "base": header.get("base"),
        "config": config,
        "entries": entries_in_all,
        "share": entries_in_all / sum(m.weight.numel() for m in linears.values()),
        "modules": modules,
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts for a person to read."""
    modules = facts["modules"]
    config = ", ".join(f"{k}={v!r}" for k, v in (facts["config"] or {}).items())
    rows = [
        ("module", "weight", "dtype", "entries", "share", "form", "places", "input runs", "bias", "bytes")
    ]  # fmt: skip
    rows += [
        (
            name, "x".join(map(str, m["shape"])), m["dtype"], f"{m['entries']:,}", f"{m['share']:.2%}",
            m["form"], str(m["places"] or "-"), f"of {m['input_runs']}" if m["input_runs"] else "-",
            "yes" if m["bias"] else "no", f"{m['bytes']:,}",
        )
        for name, m in modules.items()
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join(
        [
            f"{facts['file']}: delta of format version {facts['version']}, {facts['bytes']:,} bytes",
            f"base: {facts['base'] or 'unknown'}",
            f"config: {config or 'unknown'}",
            f"{len(modules)} modules, {facts['entries']:,} entries that may have changed, "
            f"{facts['share']:.2%} of their weights",
            "",
            *table,
        ]
    )


def _runs(places: list[torch.Tensor], size: int, config: dict[str, Any] | None) -> int | None:
    """In aligned runs of how many the inputs of all places come; None where they are all inputs.

    The inputs themselves are asked: the configuration's None leaves it to a layer's size, and what was loaded before
    training may be of another configuration.
    """
    if any(len(idx) == size for idx in places):
        return None
    asked = (config or {}).get("neuron_group")
    run = asked if type(asked) is int and asked > 0 else GROUP
    return run if all(len(idx) % run == 0 and are_runs(idx, run) for idx in places) else 1


def _linear(name: str, header: dict[str, str], tensors: dict[str, torch.Tensor]) -> nn.Linear:
    """A linear without values, of the shape and dtype that the file tells."""
    shapes = json.loads(header.get("shapes", "null"))
    shape = shapes.get(name) if isinstance(shapes, dict) else None
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)):
        raise ValueError("malformed delta: its header does not have the shapes of the weights")
    values = tensors.get(f"{name}.values", tensors.get(f"{name}.values.0"))
    dtype = torch.float32 if values is None else values.dtype  # that it is missing is told next
    bias = tensors.get(f"{name}.bias")
    return nn.Linear(shape[1], shape[0], bias is not None, device="meta", dtype=dtype)
