"""Data parallel: several ranks train as one process does on the whole batch, or all of them raise."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toys
from ranks import LR, MOMENTUM, STEPS, Run, Sharded, data, launch, rank_and_size, share
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from losia_pro import LosiaConfig

# A gradient passes fewer than 300 rounded operations (2 (3 (16 + 24) + 16) products' terms and the batch's 12), each
# of 2^-53 of terms below 1; a step moves a weight by LR / (1 - MOMENTUM) = 1 times its gradient in the end.
BOUND = STEPS * 300 * 2**-53 * LR / (1 - MOMENTUM)

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"micro": 2},
    "static-graph": {"static_graph": True},
    "find-unused": {"find_unused_parameters": True},
    "bucket-views": {"gradient_as_bucket_view": True},
    "accumulation-bucket-views": {"micro": 2, "gradient_as_bucket_view": True},
}


def every_way() -> dict[str, dict[str, Any]]:
    """The same training with each of DistributedDataParallel's settings."""
    ends = {}
    for name, settings in WAYS.items():
        ddp = dict(settings)
        micro = ddp.pop("micro", 1)
        run = Run(**ddp).count_bytes().bind()
        ends[name] = {**run.go(data(), micro).end(), "bytes": run.bytes}
    return ends


@pytest.fixture(scope="module")
def alone():
    return Run().bind().go(data()).end()


@pytest.fixture(scope="module", params=[2, 3], ids=["2-ranks", "3-ranks"])
def together(request, tmp_path_factory):
    return launch(every_way, request.param, tmp_path_factory.mktemp("ranks"))


def assert_equal(end, other, bound=BOUND):
    """The same places at the same steps, and the same weights and importance up to rounding."""
    assert end["places"] == other["places"] and end["steps"] == other["steps"]
    for name, value in other["model"].items():
        torch.testing.assert_close(end["model"][name], value, rtol=0, atol=bound)
    assert end["profiles"].keys() == other["profiles"].keys() and other["profiles"]
    for name, buffers in other["profiles"].items():  # of weights below 1: as precise as gradients
        for mine, theirs in zip(end["profiles"][name], buffers, strict=True):
            assert theirs.max() > 1e4 * bound
            torch.testing.assert_close(mine, theirs, rtol=0, atol=bound)


@pytest.mark.parametrize("way", WAYS)
def test_ranks_train_as_one_process_on_the_whole_batch(alone, together, way):
    assert sorted({step for step, _ in alone["steps"]}) == [3, 6, 9, 12]
    for end in (ends[way] for ends in together):
        assert_equal(end, alone)
        toys.equal_bits({**end, "bytes": 0}, {**together[0][way], "bytes": 0})


def test_the_bound_tells_a_part_of_the_batch_from_the_whole(alone):
    halves = [(x[::2], target[::2]) for x, target in data()]
    other = Run().bind().go(halves).end()
    assert other["places"] != alone["places"]
    far = max((other["model"][n] - w).abs().max() for n, w in alone["model"].items())
    assert far > 1e6 * BOUND


@pytest.mark.parametrize("way", WAYS)
def test_gradients_travel_at_the_subnets_size(together, way):
    run = Run()
    per_step = sum(p.numel() * p.element_size() for p in run.losia.parameters())
    dense = sum(m.weight.numel() * m.weight.element_size() for m in run.losia.modules.values())
    assert per_step < dense / 8
    for ends in together:
        assert sum(ends[way]["bytes"]) == STEPS * per_step


def resumed() -> list[tuple[dict, dict]]:
    """A run that was not stopped, and one that was saved and loaded, before and after bind."""
    pairs = []
    for stop in (5, 6):
        whole = Run().bind().go(data()).end()
        state = Run().bind().go(data()[:stop]).state()
        for again in (Run().bind().load(state), Run().load(state).bind()):
            pairs.append((whole, again.go(data()[stop:]).end()))
    return pairs


def test_a_resumed_run_is_bitwise_the_one_that_was_not_stopped(alone, tmp_path):
    for pairs in launch(resumed, 2, tmp_path):
        assert len(pairs) == 4
        for whole, again in pairs:
            toys.equal_bits(again, whole)
            assert_equal(again, alone)


class Gated(toys.Stack):
    """Its second block is skipped by some batches."""

    def forward(self, x):
        skips = self.skips(x)
        for i, layer in enumerate(self.layers):
            x = x if i == 1 and skips else layer(x)
        return self.head(self.norm(x))

    @staticmethod
    def skips(x) -> bool:
        return bool(x[:, 12].sum() > 0)


def gated() -> Gated:
    torch.manual_seed(0)
    return Gated().double()


def unused() -> dict[str, Any]:
    run = Run(model=gated(), find_unused_parameters=True).bind()
    return run.go(data()).end()


def test_a_rank_without_a_layers_gradient_takes_part(tmp_path):
    run = Run(model=gated()).bind()
    halves = [[(x[r::2], target[r::2]) for r in (0, 1)] for x, target in data()]
    skipped = [tuple(Gated.skips(x) for x, _ in half) for half in halves]
    assert {(True, False), (False, True), (True, True)} <= set(skipped[3:6])  # block 1 is profiled
    for half in halves:
        run.optimizer.zero_grad()
        for part in half:
            (toys.loss_of(run.model, part) / 2).backward()
        run.optimizer.step()
    for end in launch(unused, 2, tmp_path):
        assert_equal(end, run.end())


def two_forwards(run: Run, batches) -> dict[str, Any]:
    """Both losses of a step before its backward."""
    rank, size = rank_and_size()
    for x, target in batches:
        run.optimizer.zero_grad()
        x, target = x[rank::size], target[rank::size]
        halves = zip(x.chunk(2), target.chunk(2), strict=True)
        sum(toys.loss_of(run.net, half) / 2 for half in halves).backward()
        run.optimizer.step()
    return run.end()


def two_forwards_on_ranks() -> dict[str, Any]:
    return two_forwards(Run().bind(), data()[:7])


def test_two_forwards_before_a_backward(tmp_path):
    alone = two_forwards(Run().bind(), data()[:7])
    for end in launch(two_forwards_on_ranks, 2, tmp_path):
        assert_equal(end, alone)


def wrapped_last() -> dict[str, Any]:
    """bind() first, then DistributedDataParallel, which writes to parameters as it starts."""
    run = Run(wrap=False).bind()
    run.net = DistributedDataParallel(run.model)
    return run.go(data()).end()


def test_bind_may_come_before_the_wrapper(alone, tmp_path):
    for end in launch(wrapped_last, 2, tmp_path):
        assert_equal(end, alone)


def optimizer_in_parts() -> dict[str, Any]:
    def make(parameters):
        optimizer = torch.optim.SGD
        return ZeroRedundancyOptimizer(parameters, optimizer, lr=LR, momentum=MOMENTUM)

    return Run(make=make).bind().go(data()).end()


def test_a_moved_subnet_is_forgotten_by_an_optimizer_whose_state_is_in_parts(alone, tmp_path):
    for end in launch(optimizer_in_parts, 2, tmp_path):
        assert_equal(end, alone)


def overflowing() -> list[tuple[dict, dict, float]]:
    """Runs in which one rank's part of one batch overflows, and runs without that batch."""
    pairs = []
    for fused in (False, True):
        ends = []
        for bad in (4, None):
            batches = data(torch.float32)
            if bad is None:
                del batches[4]
            else:
                batches[bad][0][1] = float("inf")  # the second example: rank 1's
            run = Run(dtype=torch.float32, make=lambda p: torch.optim.AdamW(p, 1e-2, fused=fused))  # noqa: B023
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            run.bind(scaler=scaler)
            for batch in batches:
                run.optimizer.zero_grad()
                rank, size = rank_and_size()
                part = batch[0][rank::size], batch[1][rank::size]
                scaler.scale(toys.loss_of(run.net, part)).backward()
                scaler.step(run.optimizer)
                scaler.update()
            ends.append((run.end(), run.losia.step, scaler.get_scale()))
        pairs.append(tuple(ends))
    return pairs


def test_an_overflow_on_one_rank_is_skipped_by_all(tmp_path):
    for pairs in launch(overflowing, 2, tmp_path):
        for (end, steps, scale), (other, other_steps, other_scale) in pairs:
            assert steps == other_steps == STEPS - 1
            assert (scale, other_scale) == (2.0**9, 2.0**10)
            toys.equal_bits(end, other)  # scales are powers of two: exact


CALIBRATED = LosiaConfig(rank_factor=1 / 4, period=3, init="calibrate", output_factor=1 / 2)


def calibrated(n_batches: int | None = None) -> dict[str, Any] | str:
    run = Run(CALIBRATED)
    rank, size = rank_and_size()
    batches = [(x[rank::size], target[rank::size]) for x, target in data()[:4]]
    run.losia.calibrate(batches, toys.loss_of)
    return run.bind().go(data()).end()


def test_calibration_takes_the_importance_of_the_whole_batches(tmp_path):
    alone = calibrated()
    assert len(alone["steps"]) > 4
    for end in launch(calibrated, 2, tmp_path):
        assert_equal(end, alone)


def llamas() -> dict[str, dict[str, Any]]:
    """Shared inputs in aligned runs, and checkpointing in both modes."""
    from test_trainer import dataset  # here: the other tests' processes start without transformers
    from trainer_ranks import without_dropout

    ends = {}
    for name, new in itertools.product(LLAMAS, (Run, Sharded)):
        if new is Sharded and not dist.is_initialized():
            continue
        config = LLAMAS[name]
        model = without_dropout().train()
        if "reentrant" in name:
            model.gradient_checkpointing_enable({"use_reentrant": name == "reentrant"})
            model.enable_input_require_grads()
        run = new(config, model=model)
        run.bind()
        for i in range(7):
            ids = torch.stack([row["input_ids"] for row in dataset()[4 * i : 4 * i + 4]])
            ids, _ = share((ids, ids))
            run.optimizer.zero_grad()
            run.net(input_ids=ids, labels=ids).loss.backward()
            run.optimizer.step()
        ends[name, new.__name__] = run.end()
    return ends


LLAMAS = {
    "shared": LosiaConfig(rank_factor=1 / 4, period=3, share_inputs=True, neuron_group=2),
    **dict.fromkeys(("reentrant", "not-reentrant"), LosiaConfig(rank_factor=1 / 8, period=3)),
}


def test_ranks_of_a_transformer_choose_what_one_process_does(tmp_path):
    alone = llamas()
    for ends in launch(llamas, 2, tmp_path):
        assert len(ends) == 2 * len(LLAMAS)
        for (name, how), end in ends.items():
            one = alone[name, "Run"]
            assert len(one["steps"]) == 2 * 7
            assert end["steps"] == one["steps"]
            assert end["places"] == one["places"], (name, how)
