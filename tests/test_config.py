"""Every setting is judged at the door, in words that name it and the value; sizes are floors."""

from __future__ import annotations

import dataclasses
import json
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losia_pro import LosiaConfig
from losia_pro.config import subnet_size

NAN, INF = float("nan"), float("inf")

REFUSED = {
    "rank_factor": (0, -0.1, 1.5, NAN, INF, "a", True, [0.1], 1j),
    "in_factor": (0, 2, NAN, "1/8", False),
    "out_factor": (0.0, -1, 1.01, "", True),
    "output_factor": (-0.1, 1.1, NAN, None, "0.5", True),
    "period": (0, -3, 2.0, 2.5, "10", True, [3]),
    "base_decay": (-0.1, NAN, INF, None, "0.5", True),
    "beta1": (-0.1, 1, 1.0, NAN, "a", None, False),
    "beta2": (-1, 1.0, INF, "0.8", None, True),
    "neuron_group": (0, -8, 2.5, 8.0, "8", True),
    "seed": (-1, 2**64, 1.0, "a", None, True),
    "mode": ("Pro", "", None, 1),
    "init": ("calibrated", None, True),
    "schedule": ("asynchronous", None, 0),
    "strategy": ("greedy", None, ["best"]),
    "importance": ("third", None, 2),
    "score": ("ui", None, 1),
    "impl": ("numpy", "", 0),
    "share_inputs": (1, "yes", None),
    "rewarm": (1, 0, "no", None),
    "subnet_dtype": ("bf16", "float16", torch.bfloat16, False),
    "train_bias": (1, "all", None),
    "target_modules": ((), [], set(), 3, True, ["up", 3], [None], b"up"),
}


def test_every_setting_has_its_refusals():
    assert REFUSED.keys() == {f.name for f in dataclasses.fields(LosiaConfig)}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in REFUSED.items() for v in values], ids=repr
)
def test_a_wrong_value_is_refused_by_name_and_shown(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*{re.escape(repr(value))}$"):
        LosiaConfig(**{name: value})


def test_a_synchronous_schedule_needs_a_period():
    with pytest.raises(ValueError, match=r"^schedule='sync' .*period=None.*'async'$"):
        LosiaConfig(schedule="sync")
    with pytest.raises(ValueError, match="period=None"):
        LosiaConfig.paper(schedule="sync", period=None)
    assert LosiaConfig(schedule="sync", period=1).schedule == "sync"
    assert LosiaConfig(schedule="async", period=None).period is None


@pytest.mark.parametrize("score", ["iu", "u"])
def test_scores_that_would_all_be_zero_are_refused(score):
    for use in ({"period": 1}, {"init": "calibrate"}):
        with pytest.raises(
            ValueError, match=rf"^beta1=0 .*score='{score}'.*above 0, or score='i'$"
        ):
            LosiaConfig(beta1=0, score=score, **use)
        assert LosiaConfig(beta1=0, score="i", **use).beta1 == 0
    assert LosiaConfig(beta1=0, score=score).beta1 == 0  # nobody asks for a score


ACCEPTED = {
    "ends": {"rank_factor": 1, "output_factor": 1, "beta1": 0, "beta2": 0.0, "period": 1, "score": "i"},
    "other ends": {"rank_factor": 1e-6, "in_factor": 1, "out_factor": 1.0, "seed": 2**64 - 1},
    "nothing profiled": {"period": None},
    "numpy": {"rank_factor": np.float32(0.125), "period": np.int64(7), "neuron_group": np.int8(2)},
    "fraction": {"rank_factor": Fraction(1, 8), "in_factor": Fraction(1, 64)},
    "names": {"target_modules": ["up", "layers.0.down"]},
    "pattern": {"target_modules": r".*\.(up|down)"},
    "choices": {
        "mode": "dense", "init": "calibrate", "schedule": "sync", "period": 3, "strategy": "rows",
        "importance": "first", "score": "u", "impl": "torch", "rewarm": False, "train_bias": True,
        "subnet_dtype": "bfloat16",
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", ACCEPTED.values(), ids=ACCEPTED)
def test_settings_survive_json(settings):
    config = LosiaConfig(**settings)
    for name, value in settings.items():
        mine = getattr(config, name)
        assert mine == (tuple(value) if isinstance(value, list) else value)
    assert LosiaConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_how_scores_are_made_is_the_papers_by_default():
    c = LosiaConfig()
    assert (c.beta1, c.beta2, c.output_factor) == (0.85, 0.85, 0)
    assert (c.mode, c.init, c.schedule, c.strategy) == ("pro", "random", "async", "best")
    assert (c.importance, c.score, c.rewarm) == ("taylor", "iu", True)


def test_a_config_is_hashable_and_cannot_be_changed():
    c = LosiaConfig(target_modules=["up"])
    assert hash(c) == hash(LosiaConfig(target_modules=("up",)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.period = 3


@given(features=st.integers(1, 100_000), over=st.integers(1, 64), group=st.integers(1, 16))
def test_a_size_is_the_exact_floor_in_whole_groups(features, over, group):
    """In rationals, where 0.1 * 30 is 3: ``features * p`` is an integer or at least 1/64 from one, which is
    more than the rounding to 9 digits and more than the error of ``p`` in floating point."""
    for part in range(1, over + 1):
        exact = features * part // over
        whole = exact if exact == features else exact - exact % group
        assert subnet_size(features, part / over, group) == whole


@pytest.mark.parametrize(
    ("settings", "n_out", "n_in"),
    [
        ({}, 100, 6),
        ({"rank_factor": 0.3}, 30, 19),
        ({"in_factor": 1 / 64}, 100, 1),
        ({"out_factor": 0.5}, 50, 6),
        ({"in_factor": 1 / 64, "rank_factor": 1 / 8}, 12, 1),
        ({"out_factor": 1.0, "rank_factor": 1 / 8}, 100, 8),
        ({"in_factor": 0.5, "out_factor": 0.25, "rank_factor": 1.0}, 25, 32),
        ({"neuron_group": 8, "rank_factor": 1 / 8}, 8, 8),
        ({"out_factor": 1.0, "neuron_group": 16, "in_factor": 0.49}, 100, 16),
    ],
    ids=str,
)
def test_in_factor_and_out_factor_override_the_rank_factor(settings, n_out, n_in):
    config = LosiaConfig(**settings)
    assert (config.n_out(100), config.n_in(64)) == (n_out, n_in)


def test_the_published_settings():
    instruction, commonsense = LosiaConfig.paper(), LosiaConfig.paper("commonsense")
    for config in (instruction, commonsense):
        assert (config.rank_factor, config.beta1, config.beta2) == (1 / 8, 0.85, 0.85)
        assert (config.importance, config.score, config.schedule) == ("taylor", "iu", "async")
        assert config.init == "random" and config.rewarm and config.base_decay == 0
    assert (instruction.period, instruction.output_factor) == (150, 1 / 8)
    assert (commonsense.period, commonsense.output_factor) == (50, 1.0)


def test_published_settings_can_be_changed_one_by_one():
    assert LosiaConfig.paper(period=10, beta1=0.5) == LosiaConfig(
        rank_factor=1 / 8, period=10, beta1=0.5, output_factor=1 / 8, base_decay=0.0
    )
    with pytest.raises(ValueError, match="instruction.*commonsense.*got 'math'"):
        LosiaConfig.paper("math")
