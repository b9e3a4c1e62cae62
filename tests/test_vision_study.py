"""The vision study at toy size: what its record holds, and how a learning rate is found."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

pytest.importorskip("sklearn")
from benchmarks.quality import vision  # noqa: E402

FLAGS = ["--steps", "4", "--pretrain-steps", "4", "--seeds", "2", "--tuning-seeds", "1", "--jobs", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "vision.json"
    threads = torch.get_num_threads()
    vision.main([*FLAGS, "--output", str(path)])
    torch.set_num_threads(threads)
    return json.loads(path.read_text())


def test_each_methods_rate_is_the_best_that_was_judged_and_worse_ones_are_on_both_sides(study):
    for method in vision.FIRST:
        judged = {
            r["lr"]: r["judge"]["loss"]
            for r in study["runs"]
            if r["method"] == method and r["seed"] == 2
        }
        chosen = study["chosen"][method]
        assert judged[chosen["lr"]] == min(judged.values())
        assert chosen["interior"] == (min(judged) < chosen["lr"] < max(judged))


def test_the_table_is_the_mean_and_the_error_over_the_seeds_at_that_rate(study):
    for method, row in study["methods"].items():
        lr = study["chosen"][method]["lr"]
        runs = [
            r
            for r in study["runs"]
            if r["method"] == method and r["lr"] == lr and r["seed"] in (0, 1)
        ]
        assert len(runs) == 2
        for part in ("new", "old"):
            values = [r[part]["loss"] for r in runs]
            found = row[f"{part} loss"]
            assert found["mean"] == pytest.approx(statistics.mean(values))
            error = statistics.stdev(values) / math.sqrt(2)
            assert found["standard_error"] == pytest.approx(error)
            assert found["mean"] != study["base"][part]["loss"]["mean"]
    assert study["methods"]["lora"]["lora's new loss minus this"]["mean"] == 0
    sizes = {m: row["trainable"] for m, row in study["methods"].items()}
    assert sizes["losia-pro"] == sizes["losia-pro, fixed"] < 1.2 * sizes["lora"]
    assert sizes["full"] > 10 * sizes["lora"]


@pytest.mark.parametrize("best", [0.001, 0.02, 0.05])
def test_the_series_is_followed_until_the_best_has_worse_ones_on_both_sides(best):
    tried = []

    def loss_at(lr):
        tried.append(lr)
        return abs(math.log(lr / best))

    assert vision.best_rate((0.005, 0.01, 0.02), loss_at) == (best, True)
    assert min(tried) < best < max(tried)


def test_a_series_that_ends_before_that_says_so():
    assert vision.best_rate((0.1, 0.2, 0.5), lambda lr: -lr) == (0.5, False)


def test_the_readmes_table_is_the_recorded_one():
    record = json.loads(vision.RESULT.read_text())

    def say(value):
        return f"{value['mean']:.3f} ± {value['standard_error']:.3f}"

    new, old = record["base"]["new"], record["base"]["old"]["loss"]
    rows = [
        f"| the base model | | {say(new['loss'])} | {new['accuracy']['mean']:.1%} | {say(old)} |"
    ]
    for method, r in record["methods"].items():
        accuracy = f"{r['new accuracy']['mean']:.1%}"
        rows.append(
            f"| {method} | {r['trainable']:,} | {say(r['new loss'])} | {accuracy} | {say(r['old loss'])} |"
        )
    text = (vision.RESULT.parent.parent.parent / "README.md").read_text()
    assert "\n".join(rows) in text, "\n".join(rows)
    arguments, text = record["arguments"], " ".join(text.split())
    assert f"{arguments['steps']} steps of {record['settings']['batch']} images" in text
    assert f"over {arguments['seeds']} seeds" in text
    assert all(c["interior"] for c in record["chosen"].values())


def test_no_image_serves_two_purposes():
    """The test's images are never seen before, and a seed decides what the others are for."""
    one, two = vision.digits(0), vision.digits(1)
    sizes = [len(one[part][1]) for part in ("pretrain", "tune", "judge", "new")]
    assert sum(sizes) == 1797 and sizes[3] == 450
    assert torch.equal(one["new"][0], two["new"][0])
    assert not torch.equal(one["tune"][0], two["tune"][0])
    upright = {part: torch.rot90(-one[part][0], -1, (2, 3)) for part in ("tune", "judge", "new")}
    assert torch.equal(upright["new"], one["old"][0])
    images = torch.cat([one["pretrain"][0], *upright.values()]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
