"""``losia-pro doctor``: versions, devices, and which implementation each operation uses. Needs only the core."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from losia_pro import __version__, dispatch

from .errors import CliError

PACKAGES = ("torch", "triton", "safetensors", "transformers", "accelerate", "datasets", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    facts = examine()
    print(json.dumps(facts, indent=2) if args.json else describe(facts))
    return 0


def examine() -> dict[str, Any]:
    """Everything that is printed, as plain data."""
    cuda = torch.cuda.is_available()
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if cuda else 0))]
    return {
        "losia_pro": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": {
            "torch_built_for": torch.version.cuda,
            "driver_supports": _driver() if cuda else None,
            "devices": [_device(i) for i in range(len(devices) - 1)],
        },
        "compiled_module": _compiled_module(),
        "LOSIA_IMPL": dispatch.IMPL,
        "launch_shapes": {d: found for d in devices if (found := _launch_shapes(d))},
        "operations": {
            device: {op: _choice(op, device) for op in dispatch.PREFERENCE} for device in devices
        },
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts for a person to read."""
    cuda, module = facts["cuda"], facts["compiled_module"]
    packages = {name: v or "not installed" for name, v in facts["packages"].items()}
    lines = [f"losia-pro {facts['losia_pro']}, Python {facts['python']}, {facts['platform']}", ""]
    lines += _table([("package", "version"), *packages.items()])
    lines += ["", f"CUDA: torch built for {cuda['torch_built_for'] or 'CPU only'}"]
    if cuda["devices"]:
        lines[-1] += f", the driver supports up to {cuda['driver_supports'] or 'unknown'}"
        rows = [
            (f"cuda:{i}", d["name"], d["capability"], f"{d['gib']:.1f} GiB")
            for i, d in enumerate(cuda["devices"])
        ]
        lines += ["", *_table([("device", "name", "compute capability", "memory"), *rows])]
    else:
        lines[-1] += "; no CUDA device"
    if module["built"]:
        built = f"{module['file']}, CUDA {module['toolkit']}, for {', '.join(module['archs'])}"
    else:
        built = module["reason"]
    lines += ["", f"Compiled module: {built}"]
    for device, found in facts["launch_shapes"].items():
        text = f"{found['measured']} measured" if found["measured"] else "none measured"
        more = found["problem"] or (
            "" if found["measured"] else "the kernels' rule decides; losia-pro tune measures"
        )
        lines.append(
            f"Launch shapes on {device}: {text}, {found['file']}" + f": {more}" * bool(more)
        )
    if facts["LOSIA_IMPL"]:
        lines.append(f"LOSIA_IMPL={facts['LOSIA_IMPL']}")
    for device, operations in facts["operations"].items():
        rows = [
            (op, choice["uses"], other["name"], other["reason"] or _not_used(other))
            for op, choice in operations.items()
            for other in choice["implementations"]
            if other["name"] != choice["uses"]
        ]
        seen: set[str] = set()
        shown = []
        for op, uses, name, reason in rows:  # an operation's name once
            shown.append(("" if op in seen else op, "" if op in seen else uses, name, reason))
            seen.add(op)
        lines += ["", *_table([(f"on {device}", "uses", "not", "because"), *shown])]
    return "\n".join(lines)


def _choice(op: str, device: str) -> dict[str, Any]:
    """What answers ``op`` on ``device``, and for each implementation whether it could and why not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that LOSIA_IMPL falls back is what the table says
        try:
            uses = dispatch.resolve(op, device)
            special = dispatch.resolve_special(op, device)
        except ValueError as error:
            raise CliError(f"LOSIA_IMPL: {error}") from error
    implementations = [
        {"name": name, "usable": usable, "reason": reason}
        | ({"used_for": special[1]} if special and name == special[0] else {})
        for name, usable, reason in dispatch.explain(op, device)
    ]
    return {"uses": uses, "implementations": implementations}


def _not_used(usable: dict[str, Any]) -> str:
    return f"used for {usable['used_for']}" if "used_for" in usable else "usable, not preferred"


def _launch_shapes(device: str) -> dict[str, Any] | None:
    """The table of `losia-pro tune` that the Triton kernels use on a GPU; None where they cannot run."""
    triton = {name: usable for name, usable, _ in dispatch.explain("subnet_grad", device)}["triton"]
    if not triton or device == "cpu":
        return None
    from losia_pro.kernels import tuned

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measured = len(tuned.table(torch.device(device)))
    file = str(tuned.path(torch.device(device)))
    problem = str(caught[0].message) if caught else None
    return {"file": file, "measured": measured, "problem": problem}


def _compiled_module() -> dict[str, Any]:
    try:
        module = importlib.import_module("losia_pro._cuda_ops")
    except ImportError as error:
        return {"built": False, "reason": str(error)}
    compiled = module._cuda
    return {
        "built": True,
        "file": os.path.basename(compiled.__file__),
        "archs": [_arch(a) for a in module.archs().split(",")],
        "toolkit": _dotted(compiled.TOOLKIT),
    }


def _arch(built: str) -> str:
    """``80-real`` as ``sm_80``, ``120`` (machine code and PTX) as ``sm_120 + PTX``."""
    number, _, kind = built.partition("-")
    return {"real": f"sm_{number}", "virtual": f"PTX {number}"}.get(kind, f"sm_{number} + PTX")


def _device(index: int) -> dict[str, Any]:
    p = torch.cuda.get_device_properties(index)
    return {"name": p.name, "capability": f"{p.major}.{p.minor}", "gib": p.total_memory / 2**30}


def _driver() -> str | None:
    """The newest CUDA that the driver supports; torch has no public name for it."""
    query = getattr(torch._C, "_cuda_getDriverVersion", None)
    return _dotted(query()) if query else None


def _dotted(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _version(package: str) -> str | None:
    if package == "torch":
        # With its build (+cpu, +cu130), which the package's version need not name.
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
