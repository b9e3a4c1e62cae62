"""How large everything is: model, data, training. One object, whose hash is part of every run's key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """Bytes are tokens. A text target trains on windows of ``length`` tokens, a structured task on examples of at
    most ``task_length``; ``steps`` is the number of optimizer steps of every tuning run."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    length: int
    batch: int
    task_length: int
    task_batch: int
    steps: int
    warmup: float  # share of the steps
    pretrain_batch: int
    pretrain_steps: int
    pretrain_lr: float
    python_bytes: int  # most that the base model reads
    target_bytes: int  # most that a target has for training
    smallest: int  # bytes: a target with less is left out
    examples: int  # most that a structured task has for training
    held_out: int  # windows, and a quarter of the examples, in each of the two held-out parts

    def digest(self) -> str:
        return hashlib.sha256(
            json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        ).hexdigest()[:12]


_26M: dict[str, Any] = dict(
    hidden=512, intermediate=1376, layers=8, heads=8, length=512, batch=16, task_length=192, task_batch=32,
    steps=400, warmup=0.1, pretrain_batch=64, pretrain_steps=2000, pretrain_lr=2e-3, python_bytes=64_000_000,
    target_bytes=4_000_000, smallest=600_000, examples=16_000, held_out=128,
)  # fmt: skip
_TOY: dict[str, Any] = dict(
    hidden=64, intermediate=176, layers=2, heads=4, length=64, batch=8, task_length=128, task_batch=16,
    steps=30, warmup=0.1, pretrain_batch=16, pretrain_steps=150, pretrain_lr=5e-3, python_bytes=2_000_000,
    target_bytes=300_000, smallest=50_000, examples=1_000, held_out=16,
)  # fmt: skip
_100M: dict[str, Any] = {**_26M, **dict(
    hidden=768, intermediate=2048, layers=14, heads=12, pretrain_steps=3000, pretrain_lr=1e-3,
)}  # fmt: skip
SIZES = {"toy": Setting(**_TOY), "26m": Setting(**_26M), "100m": Setting(**_100M)}
TARGETS = {"toy": 3, "26m": 5, "100m": 5}  # the first ones of those that a machine has
WORKERS = {"toy": 8, "26m": 8, "100m": 4}  # on one GPU of 80 GB; never more than half of the cores


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak rate at ``step`` (from 0): linear warm-up, then a cosine to a tenth."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
