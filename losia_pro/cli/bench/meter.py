"""Memory that tensors hold, now and at most: the allocator's count on a GPU, every tensor made on a CPU."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(Protocol):
    """Bytes."""

    def now(self) -> int: ...

    def peak(self) -> int:
        """The most since ``restart``."""

    def restart(self) -> None: ...


class AllocatorMeter:
    """PyTorch's caching allocator of one GPU; blocks are rounded up to 512 bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        torch.cuda.synchronize(self.device)
        return int(torch.cuda.memory_allocated(self.device))

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return int(torch.cuda.max_memory_allocated(self.device))

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


class TensorMeter(TorchDispatchMode):
    """Sums the storages of the tensors that operations return while it is active, until they are freed.

    What an operation allocates and frees within itself is not seen, nor what compiled code allocates.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self._now = self._peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live[key] = size
        self._now += size
        self._peak = max(self._peak, self._now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._now -= self._live.pop(key)

    def now(self) -> int:
        return self._now

    def peak(self) -> int:
        return self._peak

    def restart(self) -> None:
        self._peak = self._now


@contextlib.contextmanager
def metered(device: torch.device) -> Iterator[Meter]:
    """A meter of what is allocated inside the ``with`` block (on a GPU: of everything)."""
    if device.type == "cuda":
        yield AllocatorMeter(device)
        return
    with TensorMeter() as meter:
        yield meter
