"""What each process of a Trainer run does: ``python -m torch.distributed.run ... trainer_ranks.py FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from test_trainer import entries, tiny_llama, train
from toys import indices

LR = 0.5
PER_STEP = 4  # examples, on however many processes
SGD = {"optim": "sgd", "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}


def without_dropout() -> torch.nn.Module:
    model = tiny_llama()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def end(losia, trainer) -> dict[str, Any]:
    return {
        "step": losia.step,
        "moves": [(r.step, r.group, r.name) for r in losia.history],
        "places": indices(losia),
        "weights": entries(losia),
        "log": [log for log in trainer.state.log_history if "losia_moved" in log],
    }


def on_the_whole_batch(folder: Path, n: int, **more: Any) -> tuple[Any, Any]:
    """The same examples a step for any number of processes, which must be ``n``; the controller and the trainer."""
    changes = {**SGD, "per_device_train_batch_size": PER_STEP // n, "learning_rate": LR}
    return train(folder, model=without_dropout(), **changes, **more)


if __name__ == "__main__":
    from test_peft import train as train_with_peft

    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    ends = {"whole batch": end(*on_the_whole_batch(folder / "whole", 2))}
    ends["not stopped"] = end(*train(folder / "a"))
    train(folder / "b", stop_at=5)
    ends["resumed"] = end(*train(folder / "b", resume=True))
    peft_model, trainer = train_with_peft(folder / "c")
    ends["peft"] = end(peft_model.losia, trainer)
    torch.save(ends, folder / f"{rank}.pt")
