"""Counters by which the programs of a launch learn which of them is the last to arrive."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_kept: dict[torch.device, Tensor] = {}


@contextlib.contextmanager
def counters(n: int, device: torch.device) -> Iterator[Tensor]:
    """At least ``n`` int32 zeros, for one launch within the ``with`` block that leaves them as zeros.

    Launches on a device's default stream run one after another, and so share a buffer that is cleared once. Any other
    stream gets zeros of its own for each launch: two streams would count in one buffer at once, a graph may be
    replayed beside anything, and while ``torch.compile`` warms up a graph, which it does on a stream of its own,
    memory that is allocated is the graph's and cannot be kept. Whether a launch that failed left zeros is unknown, so
    the buffer is not used again.
    """
    if not _in_turn(device):
        yield _zeros(n, device)
        return
    buffer = _kept.pop(device, None)  # back again below, unless the block raises
    if buffer is None or buffer.numel() < n:
        buffer = _zeros(n, device)
    yield buffer
    _kept[device] = buffer


def _in_turn(device: torch.device) -> bool:
    """Whether launches on the current stream run one after another; the default stream, which is 0, cannot be
    captured."""
    return device.type != "cuda" or torch._C._cuda_getCurrentRawStream(device.index) == 0


def _zeros(n: int, device: torch.device) -> Tensor:
    return torch.zeros(n, dtype=torch.int32, device=device)
