"""What each process of sharded runs does: ``accelerate launch --use_fsdp ... trainer_fsdp.py FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate_loop import run as loop
from test_trainer import train
from trainer_ranks import end, on_the_whole_batch

from losia_pro.sharded import is_sharded

ON_CPU = not torch.cuda.is_available()


def take_cpus_for_gpus() -> None:
    """accelerate shares models out over accelerators alone."""
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def fsdp(**config: Any) -> dict[str, Any]:
    """Trainer's arguments."""
    return {"fsdp": True, "fsdp_config": {"version": 2, **config}, "use_cpu": ON_CPU}


def ended(losia: Any, trainer: Any) -> dict[str, Any]:
    in_parts = all(is_sharded(p) for p in trainer.model.parameters())
    return {"sharded": in_parts, **end(losia, trainer)}


def resumed(folder: Path, stop: int, **how: Any) -> dict[str, Any]:
    _, stopped = train(folder, stop_at=stop, **how)
    left = "losia" in vars(stopped.lr_scheduler)
    return {"left on the scheduler": left, **ended(*train(folder, resume=True, **how))}


def loops(folder: Path) -> dict[str, Any]:
    """A run that was not stopped, and one that was, for each kind of saved state."""
    ends = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        ends[kind] = []
        for part in ({}, {"stop": 6}, {"resume": True}):
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, state_dict_type=kind, cpu_ram_efficient_loading=False,
                auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"],
            )  # fmt: skip
            AcceleratorState._reset_state(reset_partial_state=True)  # Trainer's plugin is in it
            done = loop(folder / kind, plugin, **part)
            if "stop" not in part:
                ends[kind].append(done)
    return ends


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    if ON_CPU:
        take_cpus_for_gpus()
    losia, trainer = on_the_whole_batch(folder / "whole", 2, **fsdp())
    ends = {"whole batch": ended(losia, trainer)}
    trainer.save_model(str(folder / "tuned"))
    losia.save_delta(folder / "delta.safetensors")
    how = fsdp(activation_checkpointing=True)
    ends["checkpointing"] = ended(*on_the_whole_batch(folder / "again", 2, **how))
    ends["not stopped"] = ended(*train(folder / "a", **fsdp()))
    ends["full state"] = resumed(folder / "full", 5, **fsdp(state_dict_type="FULL_STATE_DICT"))
    ends["state in parts"] = resumed(folder / "parts", 6, use_cpu=ON_CPU)  # as launched
    ends["loops"] = loops(folder)
    torch.save(ends, folder / f"{rank}.pt")
