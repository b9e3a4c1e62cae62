"""Data parallel: importance of the whole global batch, and the same subnets on every rank or an error that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import delta, sharded
from .profile import Profile

if TYPE_CHECKING:
    from .controller import Losia
    from .linear import SubnetLinear

IGNORED = "_ddp_params_and_buffers_to_ignore"  # DistributedDataParallel's own name for such a list

# What ranks can differ in, and what helps; the first that differs is the cause of those after it.
REMEDY = {
    "settings": "give attach() the same LosiaConfig and kind of model on every rank",
    "step": "resume every rank from the same checkpoint",
    "batches to calibrate with": "give calibrate() equally many batches on every rank",
    "base weights": "load the same checkpoint, or set the same seed, on every rank before attach()",
    "subnets": "select() the same indices on every rank, or leave it to the schedule",
    "weights": "load the same weights on every rank before attach(), and let gradients be averaged: call the "
    "DistributedDataParallel model in training, wrapped after attach(), not the model inside it",
    "importance": "every rank must take part in the reductions of every step, on the same kind of device",
}


class Ranks:
    """The processes that train one model together, each on its own part of every batch.

    ``DistributedDataParallel`` averages the gradients of the subnets as any parameter's. Left to do: to average
    the full gradients of the linears that are profiled, once a step, and to see that all ranks hold the same.
    A rank that stays away from a collective is for ``torch.distributed`` to report, when its timeout is over.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group, self.size = group, dist.get_world_size(group)
        self.device = torch.device("cpu") if dist.get_backend(group) == "gloo" else device
        self._stepped = False

    def mean_(self, grad: Tensor) -> None:
        """Average over the ranks, in place; every rank has the same bits then."""
        dist.all_reduce(grad, group=self.group)
        grad /= self.size

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        there = torch.tensor(int(here), device=self.device)
        dist.all_reduce(there, dist.ReduceOp.MAX, group=self.group)
        return bool(there)

    @staticmethod
    def refuse_join(*_: Any) -> None:
        """Before a forward: raise a RuntimeError within ``DistributedDataParallel.join()``, where ranks that ran out of
        batches answer the gradients' reductions, but not importance's."""
        if torch.compiler.is_compiling():
            return
        ddp = nn.parallel.DistributedDataParallel._active_ddp_module
        if ddp is not None and ddp._join_config.enable:
            raise RuntimeError(
                "DistributedDataParallel.join() is not supported: give every rank equally many batches, as "
                "DistributedSampler does"
            )

    def check(self, when: str, parts: Mapping[str, str]) -> None:
        """Compare digests of ``parts``, 8 bytes each; keys are those of ``REMEDY``.

        Raises:
            RuntimeError: on every rank, if one differs from rank 0; names it, what differs and what helps.
        """
        hashes = [hashlib.sha256(text.encode()).digest()[:8] for text in parts.values()]
        mine = torch.tensor([int.from_bytes(h, "big", signed=True) for h in hashes])
        mine = mine.to(self.device)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine, group=self.group)
        differs = torch.stack(gathered).cpu() != gathered[0].cpu()
        if not differs.any():
            return
        ranks = ", ".join(str(r) for r in differs.any(1).nonzero().flatten().tolist())
        names = [what for what, odd in zip(parts, differs.any(0).tolist(), strict=True) if odd]
        raise RuntimeError(
            f"{when}, rank {ranks} differs from rank 0 in: {', '.join(names)}; {REMEDY[names[0]]}"
        )

    def check_start(self, losia: Losia, when: str, n_batches: int = 0) -> None:
        """Everything that training starts from; one pass over the model's weights."""
        self._stepped = False
        settings = [losia.config.to_dict(), losia.groups, losia.sets]
        parts = {
            "settings": json.dumps(settings, sort_keys=True),
            "step": str(losia.step),
            "batches to calibrate with": str(n_batches),
            "base weights": losia.base_digest,
            "subnets": _places(losia.modules),
            "weights": _digest(losia.model.named_parameters()),
            "importance": _importance(losia.modules),
        }
        if any(sharded.is_sharded(p) for p in losia.model.parameters()):
            parts["weights"] += losia.start_digest
        self.check(when, parts)

    def check_step(self, losia: Losia) -> None:
        """After the first step: ranks whose gradients are not averaged are found out at once."""
        if not self._stepped:
            self._stepped = True
            subnets = ((n, m.subnet) for n, m in losia.modules.items())
            self.check("after the first step", {"weights": _digest(subnets)})

    def check_profiled(self, modules: Mapping[str, SubnetLinear], step: int) -> None:
        """What a group's re-selection starts from."""
        values = [(f"{n}.{k}", p) for n, m in modules.items() for k, p in m.named_parameters()]
        parts = {
            "subnets": _places(modules),
            "weights": _digest(values),
            "importance": _importance(modules),
        }
        self.check(f"before the re-selection at step {step}", parts)

    def check_moved(self, modules: Mapping[str, SubnetLinear], step: int) -> None:
        """What a group's re-selection chose."""
        self.check(f"after the re-selection at step {step}", {"subnets": _places(modules)})


def ranks_of(losia: Losia, group: dist.ProcessGroup | None) -> Ranks | None:
    """The ranks of ``group``, by default of all processes; None if this process trains alone.

    Raises:
        TypeError: weights that are split otherwise than by FSDP2.
        ValueError: they are split over other processes than these.
    """
    together = dist.is_available() and dist.is_initialized()
    size = dist.get_world_size(group) if together else 1
    sharded.check(losia.model, losia.modules, size)
    if size < 2:
        return None
    return Ranks(group, next(iter(losia.modules.values())).out_idx.device)


def start_digest(model: nn.Module) -> str:
    """Of all that a model starts from, where there are other processes: once sharded, no rank has it whole."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return ""
    return _digest(model.named_parameters())


def keep_from_broadcast(model: nn.Module, modules: Iterable[SubnetLinear]) -> None:
    """Tell ``DistributedDataParallel`` to leave the indices alone: it would send them from rank 0 in every
    forward, for nothing, and a rank that chose others would have rank 0's with its own subnet's values."""
    names = [*getattr(model, IGNORED, ()), *_indices(model, modules)]
    setattr(model, IGNORED, names)


def allow_broadcast(model: nn.Module, modules: Iterable[SubnetLinear]) -> None:
    """Undo ``keep_from_broadcast``."""
    own = set(_indices(model, modules))
    others = [n for n in getattr(model, IGNORED) if n not in own]
    if others:
        setattr(model, IGNORED, others)
    else:
        delattr(model, IGNORED)


def _indices(model: nn.Module, modules: Iterable[SubnetLinear]) -> list[str]:
    """The names of the index buffers in ``model``, all that a shared one has."""
    own = {id(idx) for m in modules for idx in (m.out_idx, m.in_idx)}
    return [n for n, b in model.named_buffers(remove_duplicate=False) if id(b) in own]


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of what every rank has the whole of."""
    held = ((n, t.detach()) for n, t in tensors if not sharded.is_sharded(t))
    return delta.digest({n: t.reshape(t.shape[0] if t.dim() else 1, -1) for n, t in held})


def _importance(modules: Mapping[str, SubnetLinear]) -> str:
    held = [(n, m.profile) for n, m in modules.items() if isinstance(m.profile, Profile)]
    buffers = [(f"{n}.{k}", getattr(p, k)) for n, p in held for k in ("importance", "uncertainty")]
    return _digest(buffers) + str([int(p.checksum) for _, p in held])


def _places(modules: Mapping[str, SubnetLinear]) -> str:
    return json.dumps([[n, m.out_idx.tolist(), m.in_idx.tolist()] for n, m in modules.items()])
