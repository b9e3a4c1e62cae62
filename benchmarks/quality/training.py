"""One run: a copy of the base model is tuned by one method, at one learning rate, with one seed."""

from __future__ import annotations

import copy
import itertools
import math
import time
from typing import Any

import torch
from torch import nn

from . import levers, methods, model
from .arrange import arrange
from .corpora import Domain, Part
from .period_data import share_of
from .plan import rate
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
    """The figures of a job ``{"method", "target", "lr", "seed", "before"}``: losses, seconds of training, trained
    values, peak memory. A loss that is not finite is None.

    With ``before``, pairs of a target and an exponent, the model is first tuned to those, each time as a plain model
    with the weights that the last tuning left; ``matrix`` has the loss on each target's test part, in their order,
    after each tuning.
    """
    device = domains[PYTHON]["test"].rows.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = [*((t, rate(e)) for t, e in job.get("before", ())), (job["target"], job["lr"])]
    net: Any = copy.deepcopy(base)
    matrix = []
    seconds = 0.0
    for target, lr in steps:
        prepared, took = train(setting, net, domains, job, target, lr, compiled)
        seconds += took
        if len(steps) > 1:
            net = prepared.finish()
            size = {t: 2 * batch_size(setting, t) for t, _ in steps}
            losses = [model.evaluate(net, domains[t]["test"], size[t])[0] for t, _ in steps]
            matrix.append([_finite(loss) for loss in losses])
    row = measure(setting, prepared.model if len(steps) == 1 else net, domains, job["target"])
    row |= {"seconds": round(seconds, 3), "trainable": prepared.trainable, "compiled": compiled}
    row["peak_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    if matrix:
        row |= {"matrix": matrix, "sequence": [t for t, _ in steps]}
    if prepared.rank is not None:
        row["rank"] = prepared.rank
    if prepared.losia is not None:
        row["reselections"] = len(prepared.losia.history)
    return row


def train(
    setting: Setting,
    net: nn.Module,
    domains: dict[str, Domain],
    job: dict[str, Any],
    target: str,
    lr: float,
    compiled: bool,
) -> tuple[methods.Prepared, float]:
    """Tune ``net`` itself to one target; the seconds that the steps took."""
    method, seed = methods.METHODS[job["method"]], job["seed"]
    data, setting = share_of(method.lever, domains[target]["train"], setting)
    size = batch_size(setting, target)
    cuda = data.rows.device.type == "cuda"
    torch.manual_seed(seed)

    def first() -> list[Any]:
        return list(
            itertools.islice(model.batches(data, size, setting.steps, seed), methods.CALIBRATION)
        )

    with levers.pulled(method.lever):
        prepared = methods.prepare(method, net, seed, first)
        arrange(method.lever, prepared, first)
        optimizer = levers.optimizer_of(method.lever, prepared, lr, cuda)
        if method.settings.get("use_dora"):  # whose graph breaks in every linear
            compiled = False
        return prepared, _steps(setting, prepared, optimizer, data, size, lr, seed, compiled)


def _steps(
    setting: Setting,
    prepared: methods.Prepared,
    optimizer: torch.optim.Optimizer,
    data: Part,
    size: int,
    lr: float,
    seed: int,
    compiled: bool,
) -> float:
    """The seconds that they took."""
    tuned, cuda = prepared.model, data.rows.device.type == "cuda"
    if compiled:
        model.compile_blocks(tuned)
    if cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for step, batch in enumerate(model.batches(data, size, setting.steps, seed)):
        optimizer.param_groups[0]["lr"] = lr * learning_rate(step, setting.steps, setting.warmup)
        model.training_loss(tuned, batch).backward()
        nn.utils.clip_grad_norm_(prepared.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if cuda:
        torch.cuda.synchronize()
    model.stop_compiling(tuned)
    return time.perf_counter() - begun
