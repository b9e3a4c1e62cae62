"""States that do not fit a run are refused, and nothing of the run has changed then."""

from __future__ import annotations

import pytest
import toys
from runs import Run

import losia_pro
from losia_pro import LosiaConfig


def other_version(state):
    state["version"] += 1


def no_version(state):
    del state["version"]


def other_modules(state):
    state["modules"]["layers.9.up"] = state["modules"].pop("layers.0.up")


def other_sizes(state):
    m = state["modules"]["layers.2.down"]
    m["subnet"] = m["subnet"][:, :2]
    m["in_idx"] = m["in_idx"][:2]


def setting(key, value):
    def change(state):
        state["config"][key] = value

    return change


@pytest.mark.parametrize(
    "spoil, message",
    [
        (other_version, "version"),
        (no_version, "version"),
        (other_modules, r"layers\.0\.up|layers\.9\.up"),
        (other_sizes, r"layers\.2\.down"),
        (setting("period", 7), "period"),
        (setting("schedule", "sync"), "schedule"),
        (setting("strategy", "rows"), "strategy"),
        (setting("importance", "first"), "importance"),
        (setting("score", "u"), "score"),
        (setting("beta1", 0.9), "beta1"),
        (setting("beta2", 0.9), "beta2"),
        (setting("rewarm", False), "rewarm"),
        (setting("neuron_group", 2), "neuron_group"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(spoil, message):
    saved = Run().bind().go(0, 5).losia.state_dict()
    run = Run(seed=1).bind().go(0, 1)
    spoil(saved)
    refused(run, saved, message)


def refused(run, saved, message):
    end, model = run.end(), toys.snapshot(run.model)
    step, history = run.losia.step, list(run.losia.history)
    with pytest.raises(ValueError, match=message):
        run.losia.load_state_dict(saved)
    toys.equal_bits(run.end(), end)
    toys.assert_same(model, toys.snapshot(run.model))
    assert (run.losia.step, run.losia.history) == (step, history)


@pytest.mark.parametrize("theirs, ours", [(16, 32), (32, 16)], ids=["larger", "smaller"])
def test_a_state_of_another_width_with_equal_subnets_is_refused(theirs, ours):
    """1/4 of 16 is 1/8 of 32: the subnets' shapes agree, the layers' do not."""

    def attach(width):
        factors = {"in_factor": 4 / width, "out_factor": 4 / width}
        model = toys.stack(width=width, hidden=width)
        return model, losia_pro.attach(model, LosiaConfig(period=3, **factors))

    _, other = attach(theirs)
    model, losia = attach(ours)
    before, start = toys.snapshot(model), losia.state_dict()
    with pytest.raises(ValueError, match=r"layers\.0\.up"):
        losia.load_state_dict(other.state_dict())
    toys.assert_same(before, toys.snapshot(model))
    toys.equal_bits(losia.state_dict(), start)


@pytest.mark.parametrize(
    "garbage", [{}, {"state": {}, "param_groups": []}, {"version": 1}], ids=str
)
def test_something_that_is_no_state_is_refused(garbage):
    run = Run().bind()
    refused(run, garbage, "version|state")
