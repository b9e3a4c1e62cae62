"""What a layer could miss: that indices have changed since the forward it recomputes, and a fused optimizer's step."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._C._autograd import _get_sequence_nr
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .sharded import is_sharded

MARK = "_losia_subnet"  # of a parameter that is one
STEPPED = -1  # what a layer has written, where a step came after it: a version below all
_layers: weakref.WeakSet[Any] = weakref.WeakSet()


def watch_steps(layer: Any) -> None:
    """Let a layer see that an optimizer's step was not written. It compares versions of its subnet: a fused step, which
    leaves that as it is, raises it. Under FSDP2 a forward sees other tensors than a step: ``_written`` is set."""
    setattr(layer.subnet, MARK, True)
    _layers.add(layer)
    _watch()


@functools.cache
def _watch() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    sharded = set()
    for group in optimizer.param_groups:
        fused = group.get("fused")
        for p in group["params"]:
            if type(p) is not nn.Parameter and is_sharded(p):  # the type first: it is told sooner
                if p.grad is not None and not has_zero_rate(group):
                    sharded.add(id(p))
            elif fused and p.grad is not None and hasattr(p, MARK):
                increment_version(p)
    for layer in _layers if sharded else ():
        if id(layer._parameters["subnet"]) in sharded:
            layer._written = STEPPED


def has_zero_rate(group: Mapping[str, Any]) -> bool:
    """Whether the learning rate is 0, as in the step that ``torch.distributed.checkpoint`` makes; one on a device is
    not read, and taken for another."""
    rate = group.get("lr")
    if rate is None or (isinstance(rate, torch.Tensor) and rate.device.type != "cpu"):
        return False
    return not float(rate)


class RecomputeGuard:
    """Raises where a layer is recomputed in a backward on other indices than its forward had.

    What a forward saves, autograd's version counters watch over. Reentrant checkpointing saves nothing: it
    calls the block without a graph, and again inside the block's node when that node's backward runs.
    So the nodes are compared: each thread numbers the nodes it makes, and one that was made before the
    indices were set belongs to a forward on the old ones.
    """

    def __init__(self) -> None:
        self._selections = 0  # how often the indices were set
        self._at_forward = 0  # that number at the last forward outside a backward
        self._thread = 0  # the thread that set the indices last
        self._next_node = 0  # and the number of the node it would make next; 0: nodes tell nothing

    def selected(self) -> None:
        """The indices have been set."""
        self._selections += 1
        self._thread, self._next_node = threading.get_ident(), _get_sequence_nr()

    def check(self) -> None:
        """The layer is called, in a forward or in a recomputation.

        Raises:
            RuntimeError: a recomputation, and the indices have been set since its forward.
        """
        if torch._C._current_graph_task_id() == -1:
            self._at_forward = self._selections
            if self._thread != threading.get_ident():
                self._next_node = 0  # this forward's node will have a number of another thread
            return
        node = torch._C._current_autograd_node()
        older = node is not None and node._sequence_nr() < self._next_node  # type: ignore[attr-defined]
        if older or self._at_forward != self._selections:
            raise RuntimeError(
                "the subnet's indices changed between forward and backward; "
                "call select() between optimizer steps only"
            )
        if not torch.is_grad_enabled():
            self._next_node = (
                0  # a checkpoint inside this one: its node is made in the backward's thread
            )
