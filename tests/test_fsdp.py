"""FSDP2: a sharded model is trained as one process trains it on the whole batch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from ranks import CONFIG, STEPS, Run, Sharded, data, launch, rank_and_size, share
from test_distributed import BOUND, CALIBRATED, assert_equal
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losia_pro
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
    """With a step of two parts that the loop throws away, and without it."""
    ends = []
    for throws in (True, False):
        run = Sharded().bind().go(data()[:4])
        run.optimizer.zero_grad()
        if throws:
            for part in (data()[9], data()[10]):
                toys.loss_of(run.net, share(part)).backward()
            run.optimizer.zero_grad()
        for batch in data()[4:9]:
            toys.loss_of(run.net, share(batch)).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
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
    return {
        k: [local(t).numel() for t in ts] + [t.numel() for t in ts] for k, ts in tensors.items()
    }


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
    with pytest.raises(TypeError, match="does not undo fully_shard"):
        run.losia.detach()
    assert torch.equal(y, y_again)
    return {
        "tuned": tuned["model"], "base": base, "again": again, "loaded": other.end_of_model(),
        "y": y, "y_base": y_base,
        "on": run.go(data()[8:]).end(),
    }  # fmt: skip


def everything(folder: str) -> dict[str, Any]:
    return {
        "ways": every_way(),
        "half": half_precision() if rank_and_size()[1] == 2 else None,
        "resumed": resumed(),
        "skipped": skipped(),
        "overflowing": overflowing(),
        "clipped": clipped(),
        "calibrated": calibrated(),
        "traffic": traffic(),
        "held": held(),
        "files": files(folder),
    }


@pytest.fixture(scope="module")
def alone():
    return Run().bind().go(data()).end()


@pytest.fixture(scope="module", params=[2, 3], ids=["2-ranks", "3-ranks"])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return launch(everything, request.param, folder, str(folder))


def test_ranks_train_as_one_process_on_the_whole_batch(alone, ranks):
    for rank in ranks:
        toys.equal_bits(rank["ways"], ranks[0]["ways"])
    for way, end in ranks[0]["ways"].items():
        if "mixed" not in way:
            assert_equal(end, alone)


def test_mixed_precision_rounds_as_its_dtype_does(alone, ranks):
    bound = BOUND * 2 ** (53 - 24)  # fp32's rounding for fp64's
    untrained = toys.stack(torch.float64).state_dict()
    for end in (end for way, end in ranks[0]["ways"].items() if "mixed" in way):
        assert end["places"] == alone["places"] and end["steps"] == alone["steps"]
        for name, value in alone["model"].items():
            assert end["model"][name].dtype == torch.float64
            torch.testing.assert_close(end["model"][name], value, rtol=0, atol=bound)
        moved = max((alone["model"][n] - w).abs().max() for n, w in untrained.items())
        assert moved > 100 * bound


@pytest.mark.parametrize("ranks", [2], indirect=True)  # a sum of two does not depend on its order
def test_in_half_precision_sharded_is_data_parallel_bit_for_bit(ranks):
    for rank in ranks:
        one, other = rank["half"]
        assert {t.dtype for t in one["model"].values()} == {torch.bfloat16}
        assert {t.dtype for t in one["subnets"].values()} == {torch.float32}
        toys.equal_bits(other, one)


def test_a_resumed_run_is_bitwise_the_one_that_was_not_stopped(alone, ranks):
    for rank in ranks:
        assert len(rank["resumed"]) >= 2
        for end, again in rank["resumed"]:
            toys.equal_bits(again, end)
            assert_equal(again, alone)


def test_gradients_of_a_step_that_was_thrown_away_are_not_in_importance(ranks):
    for rank in ranks:
        toys.equal_bits(*rank["skipped"])


def test_an_overflow_on_one_rank_is_skipped_by_all(ranks):
    for rank in ranks:
        end, steps, other, other_steps = rank["overflowing"]
        assert steps == other_steps == STEPS - 1
        toys.equal_bits(end, other)  # scales are powers of two: exact


def test_clipping_takes_the_norm_of_all_ranks(ranks):
    one = clipped()
    for rank in ranks:
        assert_equal(rank["clipped"], one)


def test_calibration_takes_the_importance_of_the_whole_batches(ranks):
    one = calibrated()
    for rank in ranks:
        assert_equal(rank["calibrated"], one)


def test_gradients_travel_at_the_subnets_size(ranks):
    run = Run()
    n = len(ranks)
    padded = [n * -(-len(p) // n) * p[0].numel() for p in run.losia.parameters()]
    profiled = sum(m.weight.numel() for m in run.losia.group_modules(0).values())
    assert sum(padded) < sum(m.weight.numel() for m in run.losia.modules.values()) / 4
    for rank in ranks:
        without, profiling = rank["traffic"]
        assert without["_reduce_scatter_base_"] == sum(padded) * 8
        assert without["allreduce_"] == 0
        assert profiling["_reduce_scatter_base_"] == sum(padded) * 8
        assert profiling["allreduce_"] == profiled * 8


def test_each_rank_holds_its_part_of_importance_subnets_and_moments(ranks):
    for rank in ranks:
        for what, sizes in rank["held"].items():
            own, all_of_it = sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :])
            assert own < all_of_it, what
    for what in ("importance", "subnets", "moments"):
        parts = [r["held"][what] for r in ranks]
        half = len(parts[0]) // 2
        assert sum(sum(p[:half]) for p in parts) == sum(parts[0][half:])


def test_base_and_delta_are_exact(alone, ranks):
    untrained = {n: t.detach() for n, t in toys.stack(torch.float64).state_dict().items()}
    for end in (r["files"] for r in ranks):
        toys.equal_bits(end["base"], untrained)
        toys.equal_bits(end["again"], end["tuned"])
        toys.equal_bits(end["loaded"], end["tuned"])
        assert not torch.equal(end["y"], end["y_base"])
        assert_equal(end["on"], alone)


def test_a_delta_loads_into_the_plain_model(ranks, tmp_path_factory):
    folder = sorted(Path(tmp_path_factory.getbasetemp()).glob("ranks*"))[-1]
    model = losia_pro.load_delta(toys.stack(torch.float64), folder / "delta")
    toys.equal_bits(
        {n: t.detach() for n, t in model.state_dict().items()}, ranks[0]["files"]["tuned"]
    )
