"""The processes that run one command together, as ``torchrun`` starts them: each trains on its own batches."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import CliError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # how long the others wait while one writes the model


def command(size: int) -> list[str]:
    """How a run of so many processes is started, up to the subcommand."""
    return (
        ["torchrun", "--nproc_per_node", str(size), "-m", "losia_pro"]
        if size > 1
        else ["losia-pro"]
    )


@dataclass(frozen=True)
class Processes:
    """``size`` of them, of which this is number ``rank``. The first one alone prints and writes."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def all(self, mine: T) -> list[T]:
        """What each of them gives, in the order of their ranks; collective."""
        if self.size == 1:
            return [mine]
        gathered: list[T] = [mine] * self.size
        dist.all_gather_object(gathered, mine)
        return gathered


def join(device: torch.device) -> Processes:
    """Meet the others, if ``torchrun`` started several; from then on, the first one alone prints.

    Raises:
        CliError: the environment names several processes and not how they meet; there are fewer GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size == 1:
        return Processes()
    missing = [
        n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ
    ]
    if missing:
        raise CliError(
            f"the environment has WORLD_SIZE={size}, but no {', '.join(missing)}: start {size} processes by "
            f"{' '.join(command(size))} finetune ..., or one with WORLD_SIZE unset"
        )
    if device.type == "cuda" and local_size() > torch.cuda.device_count():
        raise CliError(
            f"{local_size()} processes, but {torch.cuda.device_count()} GPUs: each process needs its own; use torchrun "
            f"--nproc_per_node {torch.cuda.device_count()}, or --device cpu"
        )
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
    if state.process_index > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    return Processes(state.process_index, state.num_processes)


def leave() -> None:
    """Part from the others, at the end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def local_size() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def local_rank() -> int:
    """Which of these this is."""
    return int(os.environ.get("LOCAL_RANK") or 0)
