"""A plain loop of accelerate's, with the two added lines: ``accelerate launch accelerate_loop.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import toys
from accelerate import Accelerator
from torch.utils.data import DataLoader

import losia_pro

STEPS, PER_STEP, LR = 8, 8, 0.5
CONFIG = losia_pro.LosiaConfig(rank_factor=1 / 4, period=3)


def run(folder: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    size = accelerator.num_processes
    rows = [(x, y) for x, y in zip(*toys.batches(1, 2 * STEPS * PER_STEP)[0], strict=True)]
    loader = DataLoader(rows, batch_size=PER_STEP // size)
    model = toys.stack()
    losia = losia_pro.attach(model, CONFIG)  # the one
    optimizer = torch.optim.SGD(losia.parameters(), lr=LR)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losia.bind(optimizer)  # the other
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(toys.loss_of(model, batch))
            accelerator.clip_grad_norm_(losia.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    if accelerator.is_main_process:
        losia.save_delta(folder / f"{size}.safetensors")
    moves = [(r.step, r.group, r.name) for r in losia.history]
    end = {
        "step": losia.step,
        "moves": moves,
        "places": toys.indices(losia),
        "weights": toys.weights(losia),
    }
    torch.save(end, folder / f"{size}-{accelerator.process_index}.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
