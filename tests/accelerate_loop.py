"""A plain loop of accelerate's, with the two added lines: ``accelerate launch accelerate_loop.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import toys
from accelerate import Accelerator
from torch.utils.data import DataLoader

import losia_pro
from losia_pro.sharded import whole

STEPS, PER_STEP, LR = 8, 8, 0.5
CONFIG = losia_pro.LosiaConfig(rank_factor=1 / 4, period=3)

# fp32: fewer than 1000 rounded operations a gradient, of terms below 1, whose errors add up as their root.
BOUND = STEPS * LR * 1000**0.5 * 2**-24


def run(
    folder: Path, plugin: Any = None, stop: int | None = None, resume: bool = False
) -> dict[str, Any]:
    """Saves accelerate's state after ``stop`` steps and ends there, or goes on from it."""
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=2, fsdp_plugin=plugin)
    size = accelerator.num_processes
    rows = [(x, y) for x, y in zip(*toys.batches(1, 2 * STEPS * PER_STEP)[0], strict=True)]
    loader = DataLoader(rows, batch_size=PER_STEP // size)
    model = toys.stack()
    losia = losia_pro.attach(model, CONFIG)  # the one
    optimizer = torch.optim.SGD(losia.parameters(), lr=LR, momentum=0.5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losia.bind(optimizer)  # the other
    accelerator.register_for_checkpointing(losia)
    if resume:
        accelerator.load_state(folder / "state")
        loader = accelerator.skip_first_batches(loader, 2 * losia.step)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(toys.loss_of(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(losia.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and losia.step == stop:
            accelerator.save_state(folder / "state")
            break
    folder.mkdir(exist_ok=True)
    if accelerator.is_main_process or plugin is not None:  # of what is sharded, each has a part
        losia.save_delta(folder / f"{size}.safetensors")
    moves = [(r.step, r.group, r.name) for r in losia.history]
    return {
        "step": losia.step,
        "moves": moves,
        "places": toys.indices(losia),
        "weights": {n: whole(m.weight).cpu().clone() for n, m in losia.modules.items()},
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    end = run(folder)
    run(folder, stop=6)
    again = run(folder, resume=True)
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if size > 1 else 0
    torch.save((end, again), folder / f"{size}-{rank}.pt")
