"""Parameters that FSDP2 (``torch.distributed.fsdp.fully_shard``) shards: each process holds some of their rows.

Outside a forward and a backward, such a parameter is a ``DTensor`` split along its first dimension: rank ``r`` of
``n`` holds rows ``[r c, (r + 1) c)``, ``c = ceil(rows / n)``. What is here takes plain tensors too, which are whole.
Functions that say *collective* are for every process, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from .linear import SubnetLinear

Index = tuple[Tensor, Tensor] | Tensor  # of a matrix: rows (n, 1) and columns, or a mask

_BYTES = torch.uint8  # every backend adds them; with zeros exactly, whatever they mean

_PARALLEL = "tensor parallelism is not supported; shard the attached model by torch.distributed.fsdp.fully_shard()"


def is_sharded(t: Tensor) -> bool:
    """Whether ``t`` is a ``DTensor``; asked without importing that."""
    return hasattr(t, "device_mesh")


def local(t: Tensor) -> Tensor:
    """The rows that this process holds, in ``t``'s own memory."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined, no-any-return]


def rows(t: Tensor) -> slice:
    """Which rows of ``t`` they are."""
    if not is_sharded(t):
        return slice(0, len(t))
    n, rank, _ = _shards(t)
    first = min(rank * -(-len(t) // n), len(t))
    return slice(first, first + len(local(t)))


def whole(t: Tensor) -> Tensor:
    """All of ``t``, on the device that computes; collective."""
    return whole_together([t])[0]


def whole_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same for several, by one collective for those of one dtype."""
    answer = [t.detach() for t in tensors]
    alike: dict[Any, list[int]] = {}
    for k, t in enumerate(tensors):
        if is_sharded(t):
            alike.setdefault((t.device_mesh, t.placements, t.dtype), []).append(k)  # type: ignore[attr-defined]
    for (mesh, _, dtype), chosen in alike.items():
        n, _, group = _shards(tensors[chosen[0]])
        counts = [-(-len(tensors[k]) // n) for k in chosen]  # rows of each on rank 0, the most
        sizes = [c * tensors[k].shape[1:].numel() for k, c in zip(chosen, counts, strict=True)]
        mine = torch.zeros(sum(sizes), dtype=dtype, device=mesh.device_type)
        for k, part in zip(chosen, mine.split(sizes), strict=True):
            held = local(tensors[k].detach())
            part[: held.numel()].copy_(held.flatten())
        parts = _side_by_side(mine, n, group).view(n, -1).split(sizes, 1)
        for k, part, count in zip(chosen, parts, counts, strict=True):
            answer[k] = part.reshape(n * count, *tensors[k].shape[1:])[: len(tensors[k])]
    return answer


@torch.no_grad()
def assign_(t: Tensor, values: Tensor) -> None:
    """``t[...] = values``, where ``values`` are whole: each process takes its own rows."""
    local(t).copy_(values[rows(t)])


@torch.no_grad()
def read(t: Tensor, at: Index) -> Tensor:
    """``t[at]`` of a matrix; collective. Only the entries asked for travel, if ``at`` is a block."""
    if not is_sharded(t):
        return t[at].detach()
    if isinstance(at, Tensor):
        return whole(t)[at]
    own, (inside, here) = local(t), _block(t, at)
    device = t.device_mesh.device_type  # type: ignore[attr-defined]
    block = torch.zeros(len(at[0]), len(at[1]), dtype=t.dtype, device=device)
    block[inside.to(device)] = own[here].to(device)
    group = _shards(t)[2]
    if group is not None:
        dist.all_reduce(block.view(_BYTES), group=group)
    return block


@torch.no_grad()
def write_(t: Tensor, at: Index, values: Tensor) -> None:
    """``t[at] = values``, where ``values`` are whole: each process writes its own rows."""
    own, held = local(t), rows(t)
    if not is_sharded(t):
        t[at] = values.to(t.device)
    elif isinstance(at, Tensor):
        first, last = int(at[: held.start].sum()), int(at[: held.stop].sum())
        own[at[held].to(own.device)] = values[first:last].to(own.device)
    else:
        inside, here = _block(t, at)
        own[here] = values.to(own.device)[inside]


def _block(t: Tensor, at: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Which rows of a block are this process's, and where they lie in what it holds of ``t``."""
    held, device = rows(t), local(t).device
    row, column = at[0].flatten().to(device), at[1].to(device)
    inside = (row >= held.start) & (row < held.stop)
    return inside, ((row[inside] - held.start)[:, None], column)


class OwnRows:
    """Which rows of a subnet lie in the part of the dense weight that this process holds.

    ``out_idx`` is sorted, so they are consecutive: ``part``; ``out_idx`` counts from the first row held, and is
    with ``in_idx`` on the device where the weight is.
    """

    def __init__(self, module: SubnetLinear) -> None:
        self.of = module.out_idx._version, module.in_idx._version
        held, device = rows(module.weight), local(module.weight).device
        ends = module.out_idx.new_tensor([held.start, held.stop])
        self.part = slice(*torch.searchsorted(module.out_idx, ends).tolist())
        self.out_idx = (module.out_idx[self.part] - held.start).to(device)
        self.in_idx = module.in_idx.to(device)


def _own_parts(modules: Sequence[SubnetLinear]) -> tuple[list[Tensor], ...]:
    """Weights, subnets, ``out_idx`` and ``in_idx`` for a write-back of what this process holds; collective."""
    subnets = whole_together([m.subnet for m in modules])
    parts: list[tuple[Tensor, ...]] = []
    for m, subnet in zip(modules, subnets, strict=True):
        if not is_sharded(m.weight):
            parts.append((m.weight, subnet, m.out_idx, m.in_idx))
            continue
        if m._own_rows is None or m._own_rows.of != (m.out_idx._version, m.in_idx._version):
            m._own_rows = OwnRows(m)
        if len(m._own_rows.out_idx):
            weight = local(m.weight)
            mine = subnet[m._own_rows.part].to(weight.device)
            parts.append((weight, mine, m._own_rows.out_idx, m._own_rows.in_idx))
    return tuple([part[k] for part in parts] for k in range(4))


@torch.no_grad()
def write_together(modules: Sequence[SubnetLinear], impl: str | None) -> None:
    """``SubnetLinear.write_back`` for several, in one launch; collective."""
    weights, subnets, out_idx, in_idx = _own_parts(modules)
    torch.ops.losia_pro.write_back_(weights, subnets, out_idx, in_idx, impl=impl)
    for m in modules:
        m.mark_written()


def first_alone(parameters: Iterable[Tensor], work: Callable[[], None]) -> None:
    """``work()``, by the first process alone of those that the parameters are sharded over; collective.

    Raises:
        Exception: on all of them, what it raised.
    """
    meshes: list[Any] = [t.device_mesh for t in parameters if is_sharded(t)]  # type: ignore[attr-defined]
    first = not meshes or not any(meshes[0].get_coordinate())
    failed: list[Exception | None] = [None]
    if first:
        try:
            work()
        except Exception as error:
            failed[0] = error
    for group in meshes[0].get_all_groups() if meshes else ():
        dist.broadcast_object_list(failed, group=group, group_src=0)
    if failed[0] is not None:
        raise failed[0]


def settle(model: nn.Module) -> None:
    """Let the model hold its sharded parameters: after a forward without a backward, some may be whole still,
    and what is written into those is lost."""
    together = dist.is_available() and dist.is_initialized()
    if not together or "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_detach(modules: Iterable[SubnetLinear]) -> None:
    """Raise a TypeError for modules that ``fully_shard`` holds on to."""
    if any(is_sharded(m.weight) for m in modules):
        raise TypeError(
            "detach() cannot undo fully_shard(); the model's state dict is that of the plain model already "
            "(Trainer.save_model(), accelerate's get_state_dict() and torch.distributed.checkpoint save it), and "
            "save_delta() writes what changed"
        )


def refuse_parallel(parameter: Tensor) -> None:
    """Raise a TypeError for a parameter that is in parts within a forward, where FSDP2's are whole."""
    if is_sharded(parameter):
        raise TypeError(_PARALLEL)


def check(model: nn.Module, modules: Mapping[str, SubnetLinear], n_ranks: int) -> None:
    """Refuse parameters that are split otherwise than FSDP2 does by default.

    Raises:
        TypeError: they are; names the linear.
        ValueError: they are split over other processes than the ``n_ranks`` that train together.
    """
    for name, m in modules.items():
        try:
            shape = getattr(m, "weight", torch.empty(0)).shape
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        if shape != (m.out_features, m.in_features):
            raise TypeError(
                f"{name}.weight is {tuple(shape)}, not {(m.out_features, m.in_features)}: FullyShardedDataParallel "
                "and DeepSpeed's ZeRO-3 are not supported; use torch.distributed.fsdp.fully_shard"
            )
        parts = [p for p in m.parameters() if is_sharded(p)]
        for parameter in parts:
            _check_placements(model, name, parameter, n_ranks)
        dtypes = {p.dtype for p in parts if p.requires_grad}
        if len(dtypes) > 1:
            raise TypeError(
                f"{name} trains parameters of {' and '.join(sorted(map(str, dtypes)))}, and FSDP2 takes but one dtype; "
                "set train_bias=False, or load the model in fp32 and give fully_shard() a MixedPrecisionPolicy"
            )


def _check_placements(model: nn.Module, name: str, t: Any, n_ranks: int) -> None:
    from torch.distributed.fsdp import FSDPModule

    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise TypeError(f"{name}: {_PARALLEL}")
    odd = [p for p in t.placements if not p.is_replicate()]
    if len(odd) > 1 or not all(type(p).__name__ == "Shard" and p.dim == 0 for p in odd):
        raise TypeError(
            f"{name} is placed as {t.placements}; only parameters split once, along their first dimension, are "
            "supported: fully_shard() without tensor parallelism and without a shard_placement_fn"
        )
    if t.device_mesh.size() != n_ranks:
        raise ValueError(
            f"{name} is on a mesh of {t.device_mesh.size()} processes, but {n_ranks} train together; "
            "give bind(process_group=...) those of the mesh"
        )


def _side_by_side(mine: Tensor, n: int, group: Any) -> Tensor:
    """What each process has, as equally much, one after the other.

    ``DTensor.full_tensor()`` would do that by a functional collective. Gloo's two threads keep the name of the last
    one that ended in one string, unguarded, and "ALLGATHER_COALESCED" is the one name that is not stored in place:
    beside another collective, such as FSDP2's of the next layer, it is freed twice (PyTorch 2.13).
    """
    if group is None:
        return mine
    together = mine.new_empty(n * len(mine), *mine.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before 2.13
    gather(together, mine.contiguous(), group=group)
    return together


def _shards(t: Any) -> tuple[int, int, Any]:
    """How many processes share the rows of ``t``, which of them this one is, and their group."""
    split = [k for k, p in enumerate(t.placements) if p.is_shard()]
    if not split:  # on every process
        return 1, 0, None
    mesh = t.device_mesh
    return mesh.size(split[0]), mesh.get_local_rank(split[0]), mesh.get_group(split[0])
