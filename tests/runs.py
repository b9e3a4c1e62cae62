"""A training run whose four pieces of state are saved and loaded: what the resume tests share."""

from __future__ import annotations

import copy
import io

import torch
import toys

import losia_pro
from losia_pro import LosiaConfig

LR, STEPS = 1e-2, 14
CONFIG = LosiaConfig(
    rank_factor=1 / 4, period=3, output_factor=1 / 2, train_bias=True, base_decay=0.5
)

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=LR),
}


class Run:
    """A training run and its four pieces of state."""

    def __init__(self, config=CONFIG, make=OPTIMIZERS["adamw"], dtype=torch.bfloat16, seed=0):
        self.model = toys.stack(dtype, seed)
        self.losia = losia_pro.attach(self.model, config)
        self.optimizer = make(self.losia.parameters())
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS, LR / 10)
        self.losses: list[float] = []
        xs = toys.batches(STEPS)
        self.data = [(x.to(dtype), target) for x, target in xs]

    def bind(self):
        self.losia.bind(self.optimizer)
        return self

    def go(self, start, stop):
        loop = toys.train(self.model, self.optimizer, self.data[start:stop], self.scheduler)
        self.losses += list(loop)
        return self

    def parts(self):
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "losia": self.losia,
        }

    def save(self):
        """Through a file that holds no code."""
        file = io.BytesIO()
        torch.save({k: p.state_dict() for k, p in self.parts().items()}, file)
        return file.getvalue()

    def load(self, saved, order=("model", "optimizer", "scheduler", "losia")):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for key in order:
            self.parts()[key].load_state_dict(state[key])
        return self

    def end(self):
        """Everything a run leaves."""
        state = {k: copy.deepcopy(p.state_dict()) for k, p in self.parts().items()}
        state["subnets"] = {n: m.subnet.detach().clone() for n, m in self.losia.modules.items()}
        return state
