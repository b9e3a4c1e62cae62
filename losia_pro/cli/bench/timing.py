"""Time on a device: graph replays between events on a GPU, the wall clock on a CPU; always interleaved.

On a GPU the calls of a candidate are captured once in a CUDA graph, so that the host's launch cost is not in
the figure, and rotate over input sets that together exceed the L2 cache. A sample is one replay divided by
its calls; the replay before it keeps the GPU busy while the timed one is queued. All candidates take turns,
so that a clock that drifts does so for all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

MIN_ROUNDS, MAX_ROUNDS = 7, 15
ROUNDS_S = 0.25  # after which no round beyond MIN_ROUNDS is begun
REPLAY_US = 200.0  # a graph's calls take about this long
MAX_CALLS = 512

Call = Callable[[int], object]  # with the i-th input set


class Stats(NamedTuple):
    """Of several samples: the median, and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float
    samples: int


def stats(samples: list[float]) -> Stats:
    median, p20, p80 = (quantile(samples, q) for q in (0.5, 0.2, 0.8))
    return Stats(median, p20, p80, len(samples))


def quantile(samples: list[float], q: float) -> float:
    """Linear interpolation between the two nearest of the sorted samples."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def n_sets(bytes_a_set: int, cache: int) -> int:
    """How many input sets are rotated over: together twice the cache, at least two."""
    return max(2, min(MAX_CALLS, math.ceil(2 * cache / max(1, bytes_a_set))))


def n_calls(sets: int, least_us: float) -> int:
    """How many calls make a sample: every set, and enough for ``REPLAY_US``."""
    return min(MAX_CALLS, max(sets, math.ceil(REPLAY_US / max(least_us, 1.0))))


def interleaved(
    candidates: Mapping[str, tuple[Call, int]],
    sets: int,
    device: torch.device,
    graphs: bool = True,
) -> dict[str, Stats | str]:
    """Microseconds a call of each candidate, given as its function and its number of calls a sample; or
    why it could not be timed. Without ``graphs`` a GPU's time includes waiting for the host's launches."""
    samplers: dict[str, Callable[[], float]] = {}
    result: dict[str, Stats | str] = {}
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for name, (call, calls) in candidates.items():
        try:
            if device.type == "cuda" and graphs:
                samplers[name] = _replays(call, calls, sets, device, pool)
            elif device.type == "cuda":
                samplers[name] = _launches(call, calls, sets)
            else:
                samplers[name] = _wall(call, calls, sets)
        except Exception as error:  # noqa: BLE001 - whatever a kernel may raise while it is captured
            result[name] = f"cannot be captured: {first_line(error)}"
    times: dict[str, list[float]] = {name: [] for name in samplers}
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - start > ROUNDS_S:
            break
        for name, sample in samplers.items():
            times[name].append(sample())
    return result | {name: stats(t) for name, t in times.items()}


def _replays(
    call: Call, calls: int, sets: int, device: torch.device, pool: Any
) -> Callable[[], float]:
    graph = torch.cuda.CUDAGraph()
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call(0)  # compiles, and creates the libraries' workspaces of this stream
        stream.synchronize()
        # Results are held until the end, so that each call writes to a place of its own as in training.
        kept = []
        graph.capture_begin(pool=pool)
        try:
            for i in range(calls):
                kept.append(call(i % sets))
        finally:
            graph.capture_end()
        kept.clear()
    torch.cuda.current_stream(device).wait_stream(stream)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / calls

    sample()
    return sample


def _launches(call: Call, calls: int, sets: int) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        torch.cuda.synchronize()
        start.record()
        for i in range(calls):
            call(i % sets)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / calls

    sample()
    return sample


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: each new one would make the libraries allocate a workspace."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _wall(call: Call, calls: int, sets: int) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        for i in range(calls):
            call(i % sets)
        return (time.perf_counter() - start) * 1e6 / calls

    sample()
    return sample


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
