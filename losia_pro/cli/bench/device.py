"""The device that is measured: what it is, what its clocks do, and how fast it copies and multiplies."""

from __future__ import annotations

import platform
import shutil
import subprocess
from typing import Any

import torch

from ..errors import CliError
from .timing import interleaved
from .traffic import Limits

# name of nvidia-smi: name in the record. Reading them changes no setting.
STATE = {
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "sm_max_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "celsius",
    "clocks_throttle_reasons.active": "throttle_reasons",
}


def choose(name: str | None) -> torch.device:
    """The device that a flag names; by default the first GPU, or the CPU where there is none.

    Raises:
        CliError: a device that PyTorch does not see, or neither a CUDA device nor a CPU.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CliError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise CliError(f"--device {name}: only cuda and cpu can be measured")
    index = device.index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise CliError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def describe(device: torch.device) -> dict[str, Any]:
    """Name, capability, memory, driver and CUDA version."""
    if device.type == "cpu":
        return {
            "type": "cpu",
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    p = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "processors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": _l2(device),
        "cuda": torch.version.cuda,
        "driver": "".join(_smi(device, ["driver_version"]) or []) or None,
    }


def state(device: torch.device) -> dict[str, str] | None:
    """Clocks, power and reasons of throttling as they are now; None where they cannot be read."""
    if device.type != "cuda":
        return None
    values = _smi(device, list(STATE))
    return None if values is None else dict(zip(STATE.values(), values, strict=True))


def _smi(device: torch.device, fields: list[str]) -> list[str] | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [f"--id=GPU-{uuid}"] if uuid else []
    query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *which]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    values = [v.strip() for v in lines[0].split(",")] if len(lines) == 1 else []
    return values if len(values) == len(fields) else None


def _l2(device: torch.device) -> int:
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return int(size) or 64 * 2**20


def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure the copy bandwidth, bytes read and written together, and the matrix-product rate."""
    cuda = device.type == "cuda"
    copied, n = (2**30, 8192) if cuda else (2**25, 512)
    source = torch.rand(copied // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    # Not copy_: in a graph that is the copy engine's work, at two thirds of what a kernel reaches.
    times = interleaved(
        {
            "copy": (lambda _: torch.neg(source, out=target), 2),
            "product": (lambda _: a @ b, 2),
        },
        1,
        device,
    )
    copy, product = times["copy"], times["product"]
    if isinstance(copy, str) or isinstance(product, str):
        raise CliError(f"the device's limits cannot be measured: {copy}, {product}")
    return Limits(
        bandwidth=2e6 * copied / copy.median,
        flops=2e6 * n**3 / product.median,
        sector=32 if cuda else 64,
        l2=_l2(device) if cuda else 0,
    )
