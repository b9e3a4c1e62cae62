"""One training step of a prepared model, in parts that can be measured one by one."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from losia_pro import optim

from ..memory import Peak
from .methods import Prepared
from .timing import Stats, stats, synchronize

TURN = 4  # steps
INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Trainer:
    """Forward, backward and AdamW on one batch, the same each step. No clipping, no scheduler.

    Args:
        prepared: the model and what of it is trained; nothing for the floor, which then has no optimizer.
        ids: ``(batch, length)`` token ids, which are also the labels.
        lr: large enough that bf16 weights move; what is learnt does not matter here.
        fused: PyTorch's fused AdamW, as transformers' Trainer uses it; else the default of foreach. Subnets in
            bf16 take ``losia_pro.optim.AdamW``.
    """

    def __init__(self, prepared: Prepared, ids: Tensor, lr: float, fused: bool) -> None:
        self.prepared, self.ids = prepared, ids
        self.optimizer: torch.optim.Optimizer | None = None
        if prepared.parameters:
            losia = prepared.losia
            short = losia is not None and losia.config.subnet_dtype is not None
            make = optim.AdamW if short else torch.optim.AdamW
            self.optimizer = make(prepared.parameters, lr=lr, fused=fused or None)
        if prepared.losia is not None:
            assert self.optimizer is not None
            prepared.losia.bind(self.optimizer)

    def forward(self) -> Tensor:
        context: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.prepared.autocast:
            context = torch.autocast(self.ids.device.type, torch.bfloat16)
        with context:
            loss: Tensor = self.prepared.model(input_ids=self.ids, labels=self.ids).loss
        return loss

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def clear(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        self.update()
        self.clear()
        return loss.detach()

    def frozen(self) -> None:
        """The floor's step on the same model: nothing of it is trained for once."""
        parameters = self.prepared.parameters
        for p in parameters:
            p.requires_grad_(False)
        try:
            self.forward().backward()
        finally:
            for p in parameters:
                p.requires_grad_(True)

    def bits(self) -> list[int]:
        """A sum of each trained parameter's bits: another one if the parameter changed."""
        sums = []
        for p in self.prepared.parameters:
            bits = p.detach().contiguous().view(INTEGER[p.element_size()])
            sums.append(bits.sum(dtype=torch.int64))
        return torch.stack(sums).tolist() if sums else []  # type: ignore[no-any-return]

    def check(self, before: list[int], losses: list[float]) -> None:
        """After some steps: the losses are finite and everything trained has changed.

        A bf16 vector, such as a norm's weights near 1, may be too coarse for the steps that were made; all
        else must change.
        """
        if not all(abs(loss) < float("inf") for loss in losses):
            raise AssertionError(f"the loss is not finite: {losses}")
        after = self.bits()
        same = [
            k
            for k, p in enumerate(self.prepared.parameters)
            if before[k] == after[k] and (p.dim() > 1 or p.dtype.itemsize > 2)
        ]
        if same:
            raise AssertionError(
                f"{len(same)} of {len(after)} trained parameters did not change, the first of shape "
                f"{tuple(self.prepared.parameters[same[0]].shape)}"
            )
        self.prepared.check()


@dataclass(frozen=True)
class Timed:
    """Milliseconds a step, and of the frozen model's if they were timed in turn; peak memory over the timed steps, the
    losses of the first and the last one, and how long the first took, compilers and all."""

    ms: Stats
    frozen_ms: Stats | None
    peak_bytes: int  # allocated on a GPU; resident in the process on a CPU
    first_loss: float
    last_loss: float
    first_step_s: float


def time_steps(
    trainer: Trainer, warmup: int, steps: int, device: torch.device, in_turn: bool = False
) -> Timed:
    """Time ``steps`` steps after ``warmup`` of them, which are checked.

    On a GPU a step lasts from one event to the next without a wait between them, so the host runs ahead
    as in training. ``in_turn``: as many steps of the frozen model too, TURN of each by turns, so that a device whose
    clock drifts does so for both.
    """
    before = trainer.bits()
    began = time.perf_counter()
    losses = [float(trainer.step())]
    first_step_s = time.perf_counter() - began
    losses += [float(trainer.step()) for _ in range(warmup - 1)]
    trainer.check(before, losses)
    for _ in range(warmup if in_turn else 0):
        trainer.frozen()
    synchronize(device)
    peak = Peak(device)
    trained: list[bool] = []
    while sum(trained) < steps:
        turn = min(TURN, steps - sum(trained))
        trained += [True] * turn + [False] * (turn if in_turn else 0)
    last = torch.tensor(0.0)

    def run(step: bool) -> None:
        nonlocal last
        if step:
            last = trainer.step()
        else:
            trainer.frozen()

    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(trained) + 1)]
        events[0].record()
        for step, event in zip(trained, events[1:], strict=True):
            run(step)
            event.record()
        synchronize(device)
        ms = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    else:
        ms = []
        for step in trained:
            start = time.perf_counter()
            run(step)
            ms.append((time.perf_counter() - start) * 1e3)
    final = float(last)
    if not abs(final) < float("inf"):
        raise AssertionError(f"the last loss is not finite: {final}")
    own, frozen = (
        [t for t, step in zip(ms, trained, strict=True) if step is k] for k in (True, False)
    )
    return Timed(
        stats(own), stats(frozen) if frozen else None, peak.read(), losses[0], final, first_step_s
    )
