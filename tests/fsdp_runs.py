"""What each process of FSDP2's tests does."""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from ranks import CONFIG, Run, Sharded, data, rank_and_size, share
from test_distributed import CALIBRATED
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losia_pro
from losia_pro import LosiaConfig
from losia_pro.sharded import local

MIXED = MixedPrecisionPolicy(torch.float32, torch.float64)

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-reshard": {"reshard_after_forward": False},
    "accumulation": {"micro": 2},
    "accumulation-in-sync": {"micro": 2, "in_sync": True},
    "cpu-offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "replicated": {"mesh": (2, 1)},
    "mixed": {"mp_policy": MIXED},
    "mixed-accumulation": {"mp_policy": MIXED, "micro": 2},
}


class InSync(Sharded):
    def in_sync(self, yes: bool):
        return super().in_sync(True)


def every_way() -> dict[str, dict[str, Any]]:
    """The same training with each of fully_shard's settings."""
    ends = {}
    names = WAYS if rank_and_size()[1] == 2 else ("plain", "mixed-accumulation")
    for name in names:
        fsdp = dict(WAYS[name])
        micro = fsdp.pop("micro", 1)
        run = InSync if fsdp.pop("in_sync", False) else Sharded
        ends[name] = run(**fsdp).bind().go(data(), micro).end()
    return ends


def overflowing() -> tuple[dict[str, Any], int, dict[str, Any], int]:
    """A run in which one rank's part of one batch overflows, and one without that batch."""
    ends: list[Any] = []
    for bad in (4, None):
        batches = data(torch.float32)
        if bad is None:
            del batches[4]
        else:
            batches[bad][0][1] = float("inf")  # the second example: rank 1's
        run = Sharded(dtype=torch.float32, make=lambda p: torch.optim.AdamW(p, 1e-2))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        run.bind(scaler=scaler)
        for batch in batches:
            run.optimizer.zero_grad()
            scaler.scale(toys.loss_of(run.net, share(batch))).backward()
            scaler.step(run.optimizer)
            scaler.update()
        ends += [run.end(), run.losia.step]
    return tuple(ends)


def half_precision() -> list[dict[str, Any]]:
    """bf16 weights with fp32 subnets, data parallel and sharded."""
    config = dataclasses.replace(CONFIG, train_bias=False)
    batches = [(x.bfloat16(), target) for x, target in data(torch.float32)]
    runs = [
        new(config, lambda p: torch.optim.AdamW(p, 1e-2), torch.bfloat16) for new in (Run, Sharded)
    ]
    return [run.bind().go(batches).end() for run in runs]


def bf16_subnets() -> tuple[dict[str, Any], dict[str, Any]]:
    """A run that was not stopped, and one that was; the optimizer rounds stochastically."""
    config = dataclasses.replace(CONFIG, train_bias=False, subnet_dtype="bfloat16")
    batches = [(x.bfloat16(), target) for x, target in data(torch.float32)]

    def run() -> Run:
        return Sharded(config, lambda p: losia_pro.optim.AdamW(p, 1e-2), torch.bfloat16).bind()

    state = run().go(batches[:5]).state()
    return run().go(batches).end(), run().load(state).go(batches[5:]).end()


class HeadWhole(Sharded):
    """The head's subnet is whole on each process."""

    def wrapped(self, **fsdp: Any) -> nn.Module:
        *_, head = self.losia.modules.values()
        return super().wrapped(ignored_params={head.subnet}, **fsdp)


def between_two_numbers() -> dict[str, dict[str, Tensor]]:
    """What this process holds of bf16 subnets that decay, or a rewarmed step, takes to where rounding decides: the
    same everywhere, for weights, gradients and both processes' data are the same."""
    batches = [(x.bfloat16(), target) for x, target in data(torch.float32)[:3]]
    same = [tuple(t.repeat_interleave(2, 0) for t in batch) for batch in batches]
    ends = {}
    for what, settings, fsdp in (
        ("decay", {"rewarm": False}, {}),
        ("rewarming", {"base_decay": 0.0}, {}),
        ("replicated decay", {"rewarm": False}, {"mesh": (2, 1)}),
    ):
        config = LosiaConfig(
            rank_factor=1, output_factor=1, period=3, schedule="sync", subnet_dtype="bfloat16",
            **{"base_decay": 0.5, **settings},
        )  # fmt: skip
        model = toys.stack(torch.bfloat16)
        for p in model.parameters():
            nn.init.ones_(p)
        run = HeadWhole(config, signs, model=model, **fsdp).bind().go(same)
        with torch.no_grad():
            for p in run.losia.parameters():
                local(p).fill_(1.5)
                p.grad = torch.ones_like(p)
        run.optimizer.step()
        ends[what] = {n: local(m.subnet.detach()).clone() for n, m in run.losia.modules.items()}
    return ends


def signs(parameters: Any) -> torch.optim.Optimizer:
    """Steps of two units at 1..2: exact in bf16."""
    return losia_pro.optim.AdamW(parameters, 2**-6, (0.0, 0.0), weight_decay=0)


def resumed() -> list[tuple[dict, dict]]:
    """A run that was not stopped, and one that was saved and loaded, before and after bind."""
    pairs = []
    for stop in (5, 6) if rank_and_size()[1] == 2 else (6,):
        end = Sharded().bind().go(data()).end()
        state = Sharded().bind().go(data()[:stop]).state()
        for again in (Sharded().bind().load(state), Sharded().load(state).bind()):
            pairs.append((end, again.go(data()[stop:]).end()))
    return pairs


def skipped() -> list[dict[str, Any]]:
    """Without a step of two parts that the loop throws away, and with it: gradients gone, or zero."""
    ends = []
    for throws, to_none in ((False, True), (True, True), (False, False), (True, False)):
        run = Sharded().bind().go(data()[:4])
        run.optimizer.zero_grad(set_to_none=to_none)
        if throws:
            for part in (data()[9], data()[10]):
                toys.loss_of(run.net, share(part)).backward()
            run.optimizer.zero_grad(set_to_none=to_none)
        for batch in data()[4:9]:
            for part in zip(*(t.chunk(2) for t in batch), strict=True):
                toys.loss_of(run.net, share(part)).backward()
                for p in run.losia.parameters() if ends else ():
                    p.grad.mul_(1)  # not every change throws them away
            nn.utils.clip_grad_norm_(run.losia.parameters(), 0.1)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=to_none)
        ends.append(run.end())
    return ends


def clipped() -> dict[str, Any]:
    run = (Sharded if torch.distributed.is_initialized() else Run)().bind()
    for batch in data():
        run.optimizer.zero_grad()
        toys.loss_of(run.net, share(batch)).backward()
        nn.utils.clip_grad_norm_(run.losia.parameters(), 0.1)
        run.optimizer.step()
    return run.end()


def calibrated() -> dict[str, Any]:
    run = (Sharded if torch.distributed.is_initialized() else Run)(CALIBRATED)
    run.losia.calibrate([share(b) for b in data()[:4]], toys.loss_of)
    return run.bind().go(data()).end()


class Traffic(TorchDispatchMode):
    """The bytes that go into each kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.namespace != "_c10d_functional", "gloo may crash beside FSDP2's own collectives"
        if op.namespace == "c10d":
            name = op.__name__.split(".")[0]
            given = args[1] if name == "_reduce_scatter_base_" else args[0]
            self.bytes[name] += sum(t.nbytes for t in tree_leaves(given) if isinstance(t, Tensor))
        return op(*args, **(kwargs or {}))


def traffic() -> list[Counter[str]]:
    """Of each step, without profiling and with it."""
    counts = []
    for period in (None, 3):
        run = Sharded(dataclasses.replace(CONFIG, period=period)).bind().go(data()[:1])
        with Traffic() as seen:
            run.go(data()[1:2])
        counts.append(seen.bytes)
    return counts


def held() -> dict[str, list[int]]:
    """Entries that this process holds, while the first block is profiled."""
    run = Sharded().bind().go(data()[:1])
    modules = run.losia.group_modules(0).values()
    tensors = {
        "importance": [t for m in modules for t in (m.profile.importance, m.profile.uncertainty)],
        "subnets": [m.subnet for m in modules],
        "moments": [run.optimizer.state[m.subnet]["momentum_buffer"] for m in modules],
    }
    base = [run.losia._anchors.of(m).untyped_storage() for m in modules]
    sizes = {
        k: [local(t).numel() for t in ts] + [t.numel() for t in ts] for k, ts in tensors.items()
    }
    return sizes | {"base": [t.nbytes() // 8 for t in base] + [m.subnet.numel() for m in modules]}


def whole_ones() -> list[str]:
    """The parameters of before that are in memory still, once the model is sharded."""
    model = toys.stack()
    before = {name: weakref.ref(p) for name, p in model.named_parameters()}
    run = Sharded(model=model).bind()
    gc.collect()
    assert run.losia.modules
    return [name for name, whole in before.items() if whole() is not None]


def files(folder: str) -> dict[str, Any]:
    """What losia.base(), save_delta and load_delta do, and values before and after."""
    run = Sharded().bind().go(data()[:8])
    tuned = run.end()
    x = data()[0][0]
    with torch.no_grad():
        y = run.net(x)
        with run.losia.base():
            base, y_base = run.end_of_model(), run.net(x)
        again, y_again = run.end_of_model(), run.net(x)
    rank, _ = rank_and_size()
    run.losia.save_delta(
        f"{folder}/delta{rank or ''}"
    )  # every rank says where, the first one writes
    assert (Path(folder) / f"delta{rank or ''}").exists() == (rank == 0)
    other = Sharded()
    losia_pro.load_delta(other.model, f"{folder}/delta")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run.losia.save_delta(f"{folder}/no/delta")
    with pytest.raises(TypeError, match="cannot undo fully_shard.*Trainer.save_model"):
        run.losia.detach()
    assert torch.equal(y, y_again)
    return {
        "tuned": tuned["model"], "base": base, "again": again, "loaded": other.end_of_model(),
        "y": y, "y_base": y_base,
        "on": run.go(data()[8:]).end(),
    }  # fmt: skip


def unwritten() -> list[list[str]]:
    """What is warned of where an optimizer is bound, where it is not, and where that one is fused."""
    said = []
    for fused, bind in ((True, True), (False, False), (True, False)):
        run = Sharded(make=lambda p, fused=fused: torch.optim.AdamW(p, 1e-2, fused=fused))
        if bind:
            get_state_dict(run.model, run.optimizer)  # a step at a rate of 0
            run.bind()
        losia_pro.linear._warn_stale.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.go(data()[:3])
        said.append([str(w.message) for w in caught if "a subnet was changed" in str(w.message)])
    losia_pro.linear._warn_stale.cache_clear()
    return said


def everything(folder: str) -> dict[str, Any]:
    on_two = (half_precision, skipped, overflowing, clipped, calibrated, between_two_numbers)
    return {
        **{f.__name__: f() for f in on_two if rank_and_size()[1] == 2},
        "ways": every_way(),
        "bf16 subnets": bf16_subnets(),
        "resumed": resumed(),
        "traffic": traffic(),
        "held": held(),
        "whole": whole_ones(),
        "unwritten": unwritten(),
        "files": files(folder),
    }
