"""One run: a copy of the base model is tuned by one method, at one learning rate, with one seed."""

from __future__ import annotations

import copy
import itertools
import math
import time
from typing import Any

import torch
from torch import nn

from . import methods, model
from .corpora import Domain
from .settings import Setting, learning_rate
from .sources import PYTHON
from .tasks import TASKS


def batch_size(setting: Setting, target: str) -> int:
    return setting.task_batch if target in TASKS else setting.batch


def measure(
    setting: Setting, tuned: nn.Module, domains: dict[str, Domain], target: str
) -> dict[str, Any]:
    """Losses on the target's two held-out parts and on the old domain; exact match of a structured task."""
    row: dict[str, Any] = {}
    size = 2 * batch_size(setting, target)
    for part in ("valid", "test"):
        loss, exact = model.evaluate(tuned, domains[target][part], size)
        row[f"{part}_loss"] = _finite(loss)
        if target in TASKS:
            row[f"{part}_exact"] = exact
    row["old_loss"] = _finite(model.evaluate(tuned, domains[PYTHON]["test"], 2 * setting.batch)[0])
    return row


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def tune(
    setting: Setting,
    base: nn.Module,
    domains: dict[str, Domain],
    job: dict[str, Any],
    compiled: bool,
) -> dict[str, Any]:
    """The figures of a job ``{"method", "target", "lr", "seed"}``: losses, seconds of training, trained values,
    peak memory. A loss that is not finite is None."""
    method = methods.METHODS[job["method"]]
    target, seed, lr = job["target"], job["seed"], job["lr"]
    train, size = domains[target]["train"], batch_size(setting, target)
    device = train.rows.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(seed)

    def first() -> list[Any]:
        return list(
            itertools.islice(model.batches(train, size, setting.steps, seed), methods.CALIBRATION)
        )

    prepared = methods.prepare(method, copy.deepcopy(base), seed, first)
    tuned, losia = prepared.model, prepared.losia
    optimizer = torch.optim.AdamW(prepared.parameters, lr=lr, weight_decay=0.0, fused=cuda)
    if losia is not None:
        losia.bind(optimizer)
    compiled = compiled and not method.settings.get("use_dora")  # its graph breaks in every linear
    if compiled:
        model.compile_blocks(tuned)
    if cuda:
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for step, batch in enumerate(model.batches(train, size, setting.steps, seed)):
        optimizer.param_groups[0]["lr"] = lr * learning_rate(step, setting.steps, setting.warmup)
        model.training_loss(tuned, batch).backward()
        nn.utils.clip_grad_norm_(prepared.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begun
    model.stop_compiling(tuned)
    row = measure(setting, tuned, domains, target)
    row |= {"seconds": round(seconds, 3), "trainable": prepared.trainable, "compiled": compiled}
    row["peak_bytes"] = torch.cuda.max_memory_allocated(device) if cuda else None
    if prepared.rank is not None:
        row["rank"] = prepared.rank
    if losia is not None:
        row["reselections"] = len(losia.history)
    return row
