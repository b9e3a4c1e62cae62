"""The command line's flags: what they resolve to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from losia_pro import LosiaConfig
from losia_pro.cli import options, values
from losia_pro.cli.errors import CliError

ROOT = Path(__file__).parent.parent


def test_rates_by_method_override_one_for_all():
    rates = values.learning_rates("1e-3, lora=3e-3")
    assert rates == {"losia-pro": 1e-3, "losia": 1e-3, "lora": 3e-3, "full": 1e-3}
    resolved = options.resolve({"model": "m", "data": "d", "lr": {"full": 0.5}})
    assert resolved.lr == {"losia-pro": 3.7, "losia": 3.7, "lora": 2e-4, "full": 0.5}


@pytest.mark.parametrize(
    ("sizes", "rate"),
    [
        ({}, 1.5e-4),  # 2e-5 (32/3)^0.84
        ({"rank_factor": 1 / 8}, 6.6e-4),  # 2e-5 64^0.84
        ({"in_factor": 1 / 64}, 6.6e-4),
        ({"rank_factor": 1.0}, 2e-5),
        ({"rank_factor": 1 / 8, "lr": {"losia-pro": 1e-3}}, 1e-3),
    ],
)
def test_subnets_begin_at_the_rate_that_their_share_asks_for(sizes, rate):
    record = json.loads((ROOT / "benchmarks" / "results" / "quality-26m.json").read_text())
    assert round(record["rate_rule"]["power"], 2) == options.RATE_POWER
    assert options.resolve({"model": "m", "data": "d", **sizes}).lr["losia-pro"] == rate


def test_a_size_that_cannot_be_is_refused_with_the_flags():
    with pytest.raises(CliError, match="rank_factor must be in .*, got 0"):
        options.resolve({"model": "m", "data": "d", "rank_factor": 0.0})


def test_a_share_may_be_a_fraction():
    assert [values.share(text) for text in ("1/8", "3/32", "0.125", "1", "0")] == [
        0.125,
        0.09375,
        0.125,
        1,
        0,
    ]
    for text in ("1/0", "an eighth", "1/8/2", ""):
        with pytest.raises(
            argparse.ArgumentTypeError, match=f"share such as 1/8 or 0.125, got '{text}'"
        ):
            values.share(text)


def test_target_modules_are_names_or_what_peft_takes_as_one_string():
    assert values.modules("q_proj, layers.0.mlp.up_proj") == ["q_proj", "layers.0.mlp.up_proj"]
    for text in ("all-linear", r".*\.layers\.[0-3]\..*", "q_proj|v_proj", "[a,b]_proj"):
        assert values.modules(text) == text


def test_the_main_method_is_not_compared_with_itself():
    given = {"model": "m", "data": "d", "method": "lora", "compare": ["lora", "full"]}
    assert options.resolve(given).compare == ["full"]
    assert values.methods("none") == [] and values.methods("full,lora,full") == ["full", "lora"]


def test_paths_of_the_record_hold_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "d.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    resolved = options.resolve({"model": "some/hub-id", "data": "d.jsonl"})
    assert resolved.data == str(tmp_path / "d.jsonl") and resolved.model == "some/hub-id"


def test_differing_flags_are_told_apart_from_equal_ones():
    recorded = vars(argparse.Namespace(steps=5, compare=["full"], lr={"lora": 1e-3, "full": 1e-4}))
    assert (
        options.differing({"steps": 5, "compare": ["full"], "lr": {"lora": 1e-3}}, recorded) == []
    )
    assert options.differing({"lr": {"lora": 2e-3}}, recorded)
    assert options.differing({"seed": 2}, recorded) == ["--seed was None, now 2"]


def test_the_examples_learning_rates_are_the_tuned_ones():
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "example-learning-rates.json"
    tuned = json.loads(results.read_text())
    rates = options.JOB["lr"]
    assert {m: rates[m] for m in tuned["chosen"]} == tuned["chosen"]
    assert rates["losia"] == rates["losia-pro"]
    job, settings = {**options.DEFAULTS, **options.JOB}, dict(tuned["settings"])
    sizes = ("rank_factor", "in_factor", "out_factor", "neuron_group")
    factors = {n: settings.pop(n, None) for n in sizes}
    then, now = LosiaConfig(**factors), LosiaConfig(**{n: job[n] for n in factors})
    for n in (256, 640, 4096):
        assert (then.n_in(n), then.n_out(n), then.group(n)) == (
            now.n_in(n),
            now.n_out(n),
            now.group(n),
        )
    for name, value in settings.items():
        assert job[name] == value, name
    for method, chosen in tuned["chosen"].items():
        runs = [r for r in tuned["runs"] if r["method"] == method]
        mean = {
            lr: sum(r["loss"] for r in runs if r["lr"] == lr) / 3 for lr in {r["lr"] for r in runs}
        }
        assert min(mean, key=mean.get) == chosen
        assert min(mean) < chosen < max(mean), "a worse rate on both sides"
