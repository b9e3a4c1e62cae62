"""FSDP2: a sharded model is trained as one process trains it on the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
from fsdp_runs import calibrated, clipped, everything
from ranks import STEPS, Run, data, launch
from test_distributed import BOUND, assert_equal

import losia_pro


@pytest.fixture(scope="module")
def alone():
    return Run().bind().go(data()).end()


@pytest.fixture(scope="module", params=[2, 3], ids=["2-ranks", "3-ranks"])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return launch(everything, request.param, folder, str(folder))


on_two = pytest.mark.parametrize("ranks", [2], indirect=True)


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


@on_two
def test_in_half_precision_sharded_is_data_parallel_bit_for_bit(ranks):
    for rank in ranks:
        one, other = rank["half_precision"]  # a sum of two does not depend on its order
        assert {t.dtype for t in one["model"].values()} == {torch.bfloat16}
        assert {t.dtype for t in one["subnets"].values()} == {torch.float32}
        toys.equal_bits(other, one)


def test_bf16_subnets_are_rounded_by_the_shards(ranks):
    for rank in ranks:
        end, again = rank["bf16 subnets"]
        assert {t.dtype for t in end["subnets"].values()} == {torch.bfloat16}
        toys.equal_bits(again, end)
        toys.equal_bits(end, ranks[0]["bf16 subnets"][0])


@on_two
def test_shards_are_rounded_by_bits_of_their_own_and_what_both_ranks_hold_alike(ranks):
    one, other = (rank["between_two_numbers"] for rank in ranks)
    for what, subnets in one.items():
        for name, mine in subnets.items():
            theirs = other[what][name]
            assert mine.shape == theirs.shape and len(mine.unique()) == 2  # up and down
            held_by_both = name == "head" or what == "replicated decay"
            assert torch.equal(mine, theirs) == held_by_both, (what, name)


def test_a_resumed_run_is_bitwise_the_one_that_was_not_stopped(alone, ranks):
    for rank in ranks:
        assert len(rank["resumed"]) >= 2
        for end, again in rank["resumed"]:
            toys.equal_bits(again, end)
            assert_equal(again, alone)


@on_two
def test_gradients_of_a_step_that_was_thrown_away_are_not_in_importance(ranks):
    for rank in ranks:
        for end in rank["skipped"][1:]:
            toys.equal_bits(end, rank["skipped"][0])


@on_two
def test_an_overflow_on_one_rank_is_skipped_by_all(ranks):
    for rank in ranks:
        end, steps, other, other_steps = rank["overflowing"]
        assert steps == other_steps == STEPS - 1
        toys.equal_bits(end, other)  # scales are powers of two: exact


@on_two
def test_clipping_takes_the_norm_of_all_ranks(ranks):
    one = clipped()
    for rank in ranks:
        assert_equal(rank["clipped"], one)


@on_two
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


def test_each_rank_holds_its_part_of_importance_subnets_moments_and_base(ranks):
    for rank in ranks:
        for what, sizes in rank["held"].items():
            own, all_of_it = sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :])
            assert own < all_of_it, what
    for what in ("importance", "subnets", "moments", "base"):
        parts = [r["held"][what] for r in ranks]
        half = len(parts[0]) // 2
        assert sum(sum(p[:half]) for p in parts) == sum(parts[0][half:])


def test_stepping_an_unbound_sharded_model_warns_once(ranks):
    for rank in ranks:
        assert [len(said) for said in rank["unwritten"]] == [0, 1, 1]


def test_no_weight_stays_whole_on_a_rank(ranks):
    for rank in ranks:
        assert rank["whole"] == []


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
