"""Training by several processes on one machine: how they are started, and what each of them does."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import toys
from bound import profiles
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import losia_pro
from losia_pro import LosiaConfig
from losia_pro.sharded import whole

CONFIG = LosiaConfig(
    rank_factor=1 / 4, period=3, output_factor=1 / 2, train_bias=True, base_decay=0.5
)
LR, MOMENTUM, STEPS, BATCH = 0.1, 0.9, 14, 12  # re-selections after 3, 6, 9 and 12 steps


def launch(
    work: Callable[..., Any], n: int, folder: Path, *args: Any, backend: str = "gloo"
) -> list[Any]:
    """What ``work(*args)`` returns in each of ``n`` processes that can reach each other; through "nccl", each has
    a GPU."""
    folder.mkdir(exist_ok=True)
    multiprocessing.set_forkserver_preload(["torch.nn.parallel"])
    mp.start_processes(
        _process, (n, backend, str(folder), work, args), nprocs=n, start_method="forkserver"
    )  # raises what a process raises
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n)]


def _process(
    rank: int, n: int, backend: str, folder: str, work: Callable[..., Any], args: tuple
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "a subnet was changed")
    warnings.filterwarnings("error", "`torch.distributed.*deprecated", FutureWarning)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, f"file://{folder}/store", timedelta(seconds=60), world_size=n, rank=rank
    )
    torch.save(work(*args), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device() -> torch.device:
    """Where this process computes."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", dist.get_rank()) if on_gpu else torch.device("cpu")


def share(batch: toys.Batch) -> toys.Batch:
    """This process's part of a batch: equally many examples on each."""
    rank, size = rank_and_size()
    return batch[0][rank::size].to(device()), batch[1][rank::size].to(device())


def data(dtype: torch.dtype = torch.float64) -> list[toys.Batch]:
    return toys.batches(STEPS, BATCH, dtype)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)


class Run:
    """An ordinary loop; of the processes it knows what every script does: the wrapper and the data's part."""

    def __init__(
        self, config=CONFIG, make=sgd, dtype=torch.float64, seed=0, model=None, wrap=True, **ddp
    ):
        self.model: nn.Module = toys.stack(dtype, seed).to(device()) if model is None else model
        self.losia = losia_pro.attach(self.model, config)
        self.net = self.wrapped(**ddp) if wrap and dist.is_initialized() else self.model
        self.optimizer = make(self.losia.parameters())
        self.bytes: list[int] = []  # a bucket's bytes, each time that one is reduced

    def wrapped(self, **ddp: Any) -> nn.Module:
        return DistributedDataParallel(self.model, **ddp)

    def bind(self, **how: Any) -> Run:
        self.losia.bind(self.optimizer, **how)
        return self

    def count_bytes(self) -> Run:
        if dist.is_initialized():
            self.net.register_comm_hook(self.bytes, _counting)
        return self

    def go(self, batches: list[toys.Batch], micro: int = 1) -> Run:
        """A step a batch, in ``micro`` parts of which the last alone is synchronized."""
        for batch in batches:
            self.optimizer.zero_grad()
            parts = list(zip(*(t.chunk(micro) for t in share(batch)), strict=True))
            for i, part in enumerate(parts):
                with self.in_sync(i + 1 == len(parts)):
                    (toys.loss_of(self.net, part) / micro).backward()
            self.optimizer.step()
        return self

    def in_sync(self, yes: bool) -> AbstractContextManager[Any]:
        """Whether a backward's gradients are averaged."""
        alone = yes or not dist.is_initialized()
        return contextlib.nullcontext() if alone else self.net.no_sync()

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "losia": self.losia}
        return {k: p.state_dict() for k, p in parts.items()}

    def load(self, state: dict[str, Any]) -> Run:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.losia.load_state_dict(state["losia"])
        return self

    def end(self) -> dict[str, Any]:
        """What a run leaves: the same on all ranks."""
        return {
            "places": toys.indices(self.losia),
            "steps": [(r.step, r.name) for r in self.losia.history],
            "model": self.end_of_model(),
            "profiles": profiles(self.losia),
            "subnets": {n: whole(m.subnet).cpu().clone() for n, m in self.losia.modules.items()},
        }

    def end_of_model(self) -> dict[str, torch.Tensor]:
        return {n: whole(t).cpu().clone() for n, t in self.model.state_dict().items()}


class Sharded(Run):
    """The same loop on a model that FSDP2 shards, block by block."""

    def wrapped(self, **fsdp: Any) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        if "mesh" in fsdp:
            names = ("replicate", "shard")
            fsdp["mesh"] = init_device_mesh(device().type, fsdp["mesh"], mesh_dim_names=names)
        for layer in getattr(self.model, "model", self.model).layers:
            fully_shard(layer, **fsdp)
        return fully_shard(self.model, **fsdp)

    def in_sync(self, yes: bool) -> AbstractContextManager[Any]:
        self.net.set_requires_gradient_sync(yes)
        return contextlib.nullcontext()


def _counting(seen, bucket):
    """What DistributedDataParallel does without a hook, and how many bytes it was."""
    grads = bucket.buffer()
    seen.append(grads.numel() * grads.element_size())
    future = dist.all_reduce(grads.div_(dist.get_world_size()), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])
