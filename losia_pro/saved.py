"""Saving for the backward before the dense product, so that checkpointing does not repeat the product for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def saved_tensors_hooks() -> Hooks | None:
    """The innermost ``saved_tensors_hooks`` in force; for eager mode alone."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[return-value]


def keeps_nothing(pack: Callable[[Tensor], Any]) -> bool:
    """Whether a pack hook is that of a checkpoint's first forward, which notes a tensor's metadata alone; not so
    within a dispatch mode, which may keep what operators return (selective checkpointing).

    Known by PyTorch's own name for it: under another name the columns are gathered for nothing.
    """
    return (
        getattr(pack, "__qualname__", "") == "_checkpoint_hook.__init__.<locals>.pack_hook"
        and torch._C._len_torch_dispatch_stack() == 0
    )


class SavedEarly:
    """What the backward needs, handed to the saved-tensor hooks in force *before* the dense product.

    A Function saves after its forward, but checkpointing stops recomputing a block at its last saved
    tensor: saved late, the block's last product would be recomputed for nothing.
    Only the activations go through the hooks. The weight and the indices are the module's own; that they
    are still the same is checked here, as autograd does for the tensors it saves.
    """

    def __init__(
        self,
        weight: Tensor | None,
        out_idx: Tensor,
        in_idx: Tensor,
        x_sub: Tensor | None,
        x_whole: Tensor | None,
        hooks: Hooks,
    ) -> None:
        pack, self.unpack = hooks
        self.own = weight, out_idx, in_idx
        self.versions = [None if t is None else t._version for t in self.own]
        self.packed: list[Any] | None = [None if t is None else pack(t) for t in (x_sub, x_whole)]

    def tensors(self) -> tuple[Tensor | None, ...]:
        if self.versions != [None if t is None else t._version for t in self.own]:
            raise RuntimeError(
                "the weight or the indices of a SubnetLinear were modified between forward and backward"
            )
        if self.packed is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: the saved tensors are freed; "
                "use retain_graph=True the first time"
            )
        saved = *self.own, *(None if p is None else self.unpack(p) for p in self.packed)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.packed = None
        return saved
