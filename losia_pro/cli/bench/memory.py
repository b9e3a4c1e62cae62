"""Where a training step's memory goes: its peak by component, for each method.

    weights      the model as it was built
    activations  kept after the forward for the backward, the loss's logits among them
    trained      what the method adds (subnets and their indices, adapters) and the gradients
    optimizer    AdamW's state
    profiling    of a profiled layer: importance and uncertainty, and the operands of its full gradient
    rest         the peak less all of these: temporaries of the moment of the peak. It is negative where the
                 gradients come into being only as activations are freed, so that both are never there at once

Each is a difference of allocated memory around the moment at which it comes into being; the peak is of a step
after the first, which has the optimizer's state from its beginning.

Methods:
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch

from ..memory import GB, say_bytes
from . import methods, models, runs
from .estimate import row_seconds, step_seconds
from .meter import Meter, metered
from .record import Record
from .table import table
from .trainer import Trainer

__doc__ += "\n".join((methods.__doc__ or "").splitlines()[2:])

COMPONENTS = ("weights", "activations", "trained", "optimizer", "profiling", "rest")
NOT_SHOWN = [
    "On a GPU: allocated memory; what the allocator reserves beyond it, and CUDA's own context, come on top.",
    "On a CPU: storages of tensors; temporaries inside one operation are not seen.",
    "Activations are counted when the forward ends; the peak may come at another moment of the step.",
    "Weights and tokens are random; memory does not depend on their values.",
]
STEPS = 4  # the first one, two that settle, and the one whose peak is read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    device = runs.complete(args)
    record = Record("memory", args, device, NOT_SHOWN)
    shape = (args.model, args.layers, args.batch, args.length)
    rate = 400e12 if device.type == "cuda" else 20e9  # for the estimate alone

    def planned(mode: str, method: str) -> runs.Measurement:
        step = step_seconds(*shape, method, mode, rate)
        return runs.Measurement(mode, method, row_seconds(step, STEPS, mode, device.type))

    plan = [planned(mode, method) for mode in args.modes for method in args.methods]
    ids = models.tokens(args.model, args.batch, args.length, device)
    _warm(device, runs.DTYPES[args.dtype])

    def measure(m: runs.Measurement) -> runs.Row:
        return _measure(args, m.mode, m.method, ids, device)

    return runs.carry_out(args, record, device, plan, measure, _said, _table)


def _warm(device: torch.device, dtype: torch.dtype) -> None:
    """Let the libraries take the workspaces that they keep, in the backward's thread too."""
    x = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
    (x @ x).sum().backward()


def _measure(
    args: argparse.Namespace, mode: str, method: str, ids: torch.Tensor, device: torch.device
) -> dict[str, Any]:
    if mode == "compiled" and device.type == "cpu":
        raise methods.Skip("compiled code allocates where a CPU's meter does not see it")
    gc.freeze()  # collecting before each reading then looks at this measurement's objects alone
    try:
        with metered(device) as meter:
            return components(args, mode, method, ids, meter)
    finally:
        gc.unfreeze()


def components(
    args: argparse.Namespace, mode: str, method: str, ids: torch.Tensor, meter: Meter
) -> dict[str, Any]:
    """Bytes of each component, and the peak."""
    ids = ids.clone()  # so that a meter of tensors has seen it made
    start = meter.now()
    model = runs.build(args, ids.device)
    weights = _now(meter) - start
    prepared = methods.parse(method)(model)
    models.set_mode(model, mode)
    added = _now(meter) - start - weights
    trainer = Trainer(prepared, ids, args.lr, args.optimizer == "fused")
    profiling = _now(meter) - start - weights - added  # bind gives a profiled layer its buffers
    sizes = _first_step(trainer, meter)
    for _ in range(STEPS - 2):
        trainer.step()
    before = trainer.bits()
    meter.restart()
    loss = trainer.step()
    peak = meter.peak() - start
    trainer.check(before, [float(loss)])
    found = {
        "weights": weights,
        "activations": sizes["activations"],
        "trained": added + sizes["gradients"],
        "optimizer": sizes["optimizer"],
        "profiling": profiling + sizes["operands"],
    }
    found["rest"] = peak - sum(found.values())
    return {"bytes": found, "peak_bytes": peak}


def _first_step(trainer: Trainer, meter: Meter) -> dict[str, int]:
    """Differences over the parts of a step whose optimizer has no state yet."""
    before = _now(meter)
    loss = trainer.forward()
    activations = _now(meter) - before
    loss.backward()
    del loss
    after_backward = _now(meter) - before
    gradients = sum(_size(p.grad) for p in trainer.prepared.parameters)
    trainer.update()
    trainer.clear()
    return {
        "activations": activations,
        "gradients": gradients,
        "operands": max(0, after_backward - gradients),
        "optimizer": _now(meter) - before,
    }


def _now(meter: Meter) -> int:
    gc.collect()
    return meter.now()


def _size(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.untyped_storage().nbytes()


def _said(row: runs.Row) -> str:
    return f"peak {say_bytes(row['peak_bytes'])}"


def _table(rows: list[dict[str, Any]]) -> str:
    """In GB, or MB where nothing is as large."""
    measured = [row for row in rows if row["status"] == "ok"]
    large = any(row["peak_bytes"] >= GB for row in measured)
    unit, size = ("GB", GB) if large else ("MB", 1e6)
    floor = next((row["peak_bytes"] for row in measured if row["method"] == "floor"), None)
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append([row["method"], row["status"], *["-"] * (len(COMPONENTS) + 1)])
            continue
        over = "-" if floor is None else f"{(row['peak_bytes'] - floor) / size:+.3f}"
        cells = [f"{row['bytes'][name] / size:.3f}" for name in COMPONENTS]
        lines.append([row["method"], *cells, f"{row['peak_bytes'] / size:.3f}", over])
    return table([f"{unit} of", *COMPONENTS, "peak", "over floor"], lines)
