"""Free memory, a lower bound on what a run needs, and the peak that it had."""

from __future__ import annotations

import ctypes
import gc
import math
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from .errors import CliError

GB = 1e9
REMEDIES = (
    "use a smaller --batch-size or --max-length, --checkpointing, or on a GPU --precision bf16, where --subnet-dtype "
    "bfloat16 halves what subnets take"
)


def free_bytes(device: torch.device) -> int | None:
    """What the device could still give; for the CPU within the container's limit. None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = None
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = (_number(f"/sys/fs/cgroup/memory.{f}") for f in ("max", "current"))
    if free is not None and limit is not None and used is not None:
        free = min(free, limit - used + _reclaimable())
    return free


def _reclaimable() -> int:
    values = dict(line.split() for line in _lines("/sys/fs/cgroup/memory.stat"))
    return int(values.get("inactive_file", 0)) + int(values.get("active_file", 0))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _number(path: str) -> int | None:
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def needed_bytes(parameters: int, weights: torch.dtype, method: str) -> int:
    """At least this much: the weights, and for full fine-tuning gradients and both of Adam's moments in
    fp32. Activations, small adapters and subnets are not counted."""
    if method == "full":
        return parameters * 16
    return parameters * weights.itemsize


def check_fits(
    parameters: int, weights: torch.dtype, method: str, device: torch.device, processes: int = 1
) -> None:
    """Raise a CliError if the model cannot fit, before it is loaded: on a CPU, that of each process."""
    need, free = needed_bytes(parameters, weights, method), free_bytes(device)
    need *= processes if device.type == "cpu" else 1
    if free is None or need <= free:
        return
    smaller = "" if weights.itemsize == 2 else " --precision bf16 halves the weights;"
    cheaper = " --method losia-pro needs no gradients of that size;" if method == "full" else ""
    raise CliError(
        f"{method}: {parameters / 1e6:,.0f} M parameters need at least {need / GB:.1f} GB for weights"
        f"{', gradients and optimizer' if method == 'full' else ''}, and {device.type} has "
        f"{free / GB:.1f} GB free;{smaller}{cheaper} else use a smaller model or a larger machine"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """An allocation that failed, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


class Peak:
    """Peak memory since it was made, in bytes: allocated on a GPU, resident in the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        gc.collect()
        # What an earlier run has freed goes back to the system, where the C library is glibc.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # Linux: restart the high-water mark
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        for line in _lines("/proc/self/status"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def say_bytes(n: float) -> str:
    """Three digits and a unit: ``812 MB``, ``1.25 GB``."""
    unit, size = ("GB", GB) if n >= GB else ("MB", 1e6)
    digits = max(0, 2 - int(math.log10(max(n / size, 1))))
    return f"{n / size:.{digits}f} {unit}"
