"""A run that stops at any step and goes on from state dicts is, bit for bit, the run that did not stop."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import toys
from runs import OPTIMIZERS, STEPS, Run

import losia_pro
from losia_pro import LosiaConfig

ORDERS = list(itertools.permutations(["model", "optimizer", "scheduler", "losia"]))


def assert_resumed_equals_whole(whole, resumed, stop):
    toys.equal_bits(resumed.end(), whole.end())
    assert resumed.losses == whole.losses[stop:]


@pytest.fixture(scope="module", params=OPTIMIZERS)
def whole(request):
    run = Run(make=OPTIMIZERS[request.param]).bind().go(0, STEPS)
    assert [r.step for r in run.losia.history] == [3, 3, 6, 6, 9, 9, 12]
    return request.param, run


@pytest.mark.parametrize("stop", range(STEPS + 1))
def test_stop_at_any_step(whole, stop):
    """Before the first step, in the middle of profiling and of rewarming, before and after each move."""
    name, run = whole
    make = OPTIMIZERS[name]
    saved = Run(make=make).bind().go(0, stop).save()
    resumed = Run(make=make, seed=1).load(saved).bind().go(stop, STEPS)
    assert_resumed_equals_whole(run, resumed, stop)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("bound", ["bind-first", "bind-last"])
def test_states_load_in_any_order_before_and_after_bind(order, bound):
    run = Run().bind().go(0, STEPS)
    for stop in (5, 9):
        saved = Run().bind().go(0, stop).save()
        resumed = Run(seed=1)
        if bound == "bind-first":
            resumed.bind().load(saved, order)
        else:
            resumed.load(saved, order).bind()
        assert_resumed_equals_whole(run, resumed.go(stop, STEPS), stop)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "sync"},
        {"period": None},
        {"period": 1},
        {"rewarm": False},
        {"mode": "dense"},
        {"neuron_group": 4, "rank_factor": 1 / 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stop_under_each_setting(settings, dtype):
    config = LosiaConfig(**{"rank_factor": 1 / 4, "period": 3, **settings})
    run = Run(config, dtype=dtype).bind().go(0, STEPS)
    for stop in (1, 3, 7):
        saved = Run(config, dtype=dtype).bind().go(0, stop).save()
        resumed = Run(config, dtype=dtype, seed=1).load(saved).bind().go(stop, STEPS)
        assert_resumed_equals_whole(run, resumed, stop)


@pytest.mark.parametrize("bound", ["bind-first", "bind-last"])
def test_state_taken_before_bind_starts_the_run_anew(bound):
    """It holds no importance yet, also when it is loaded into a bound run."""
    config = LosiaConfig(rank_factor=1 / 4, period=1)
    run = Run(config).bind().go(0, STEPS)
    saved = Run(config).save()
    other = Run(config, seed=1)
    if bound == "bind-first":
        other.bind().load(saved)
    else:
        other.load(saved).bind()
    assert_resumed_equals_whole(run, other.go(0, STEPS), 0)


def test_a_run_that_went_on_can_go_back():
    """Loading an earlier state into the bound run that is past it: another slot, other places."""
    run = Run().bind().go(0, 4)
    saved = run.save()
    run.go(4, STEPS)
    end = run.end()
    run.losses.clear()
    run.load(saved).go(4, STEPS)
    toys.equal_bits(run.end(), end)


def test_a_resumed_run_continues_its_record_and_its_delta(tmp_path):
    """History goes on; the delta holds what was changed before the stop, too, and names the same base."""
    run = Run().bind().go(0, STEPS)
    saved = Run().bind().go(0, 8).save()
    resumed = Run(seed=1).load(saved).bind().go(8, STEPS)
    assert resumed.losia.history == run.losia.history
    assert all(isinstance(r, losia_pro.controller.Reselection) for r in resumed.losia.history)
    for name, one in (("whole", run), ("resumed", resumed)):
        one.losia.save_delta(tmp_path / name)
    toys.equal_bits(*(losia_pro.delta.read(tmp_path / name) for name in ("whole", "resumed")))
    base = toys.stack(torch.bfloat16)
    losia_pro.load_delta(base, tmp_path / "resumed")
    toys.equal_bits(base.state_dict(), run.model.state_dict())


def test_calibrated_run_resumes_without_calibrating_again():
    config = LosiaConfig(rank_factor=1 / 4, period=3, init="calibrate")

    def calibrated():
        run = Run(config)
        run.losia.calibrate(run.data[:2], toys.loss_of)
        return run.bind()

    whole = calibrated().go(0, STEPS)
    saved = calibrated().go(0, 4).save()
    resumed = Run(config, seed=1).load(saved).bind().go(4, STEPS)
    assert_resumed_equals_whole(whole, resumed, 4)
    assert [r.step for r in resumed.losia.history[:6]] == [0] * 6


def test_resume_in_the_middle_of_scaled_training():
    def go(run, scaler, start, stop):
        for batch in run.data[start:stop]:
            run.optimizer.zero_grad()
            scaler.scale(toys.loss_of(run.model, batch)).backward()
            scaler.step(run.optimizer)
            scaler.update()
            run.scheduler.step()
        return run

    def scaled(seed=0):
        run = Run(dtype=torch.float32, seed=seed)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        run.losia.bind(run.optimizer, scaler=scaler)
        return run, scaler

    whole = go(*scaled(), 0, STEPS)
    first, scaler = scaled()
    saved, scale = go(first, scaler, 0, 5).save(), scaler.state_dict()
    second, scaler = scaled(seed=1)
    scaler.load_state_dict(scale)
    resumed = go(second.load(saved), scaler, 5, STEPS)
    toys.equal_bits(resumed.end(), whole.end())


def test_state_dict_is_a_copy_that_training_does_not_change():
    run = Run().bind().go(0, 4)
    state = run.losia.state_dict()
    kept = copy.deepcopy(state)
    run.go(4, 8)
    toys.equal_bits(state, kept)


def test_loading_does_not_tie_the_run_to_the_state():
    saved = Run().bind().go(0, 4).losia.state_dict()
    kept = copy.deepcopy(saved)
    run = Run(seed=1)
    run.losia.load_state_dict(saved)
    run.bind().go(4, 8)
    toys.equal_bits(saved, kept)
