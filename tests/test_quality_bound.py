"""benchmarks/quality/bound.py: the error that is measured is a real step's, and what the record says of the bound."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks import draw_quality_bound
from benchmarks.quality import bound, model, settings
from benchmarks.quality.__main__ import main
from benchmarks.quality.bound import GREEDY, LARGEST, LOCALIZED, RANDOM, SIZES, WAYS
from benchmarks.quality.corpora import windows

import losia_pro

TOY = settings.SIZES["toy"]
NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def part():
    return model.Part(*(t[:8] for t in windows([Path(bound.__file__).read_text()], 64, None)))


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return model.build(TOY, torch.device("cpu"))


@pytest.fixture(scope="module")
def step(base, part):
    return bound.Step(copy.deepcopy(base).double(), part, bound.names(base))


@pytest.mark.parametrize("way", [RANDOM, LOCALIZED])
def test_the_error_is_what_a_step_of_the_package_leaves_in_a_layers_outputs(way, base, step, part):
    """Both steps by SGD: on all of the layer's weight, and on its subnet alone."""
    masks = step.masks(base, 1 / 4, way, [part] * 2)
    whole = copy.deepcopy(base).double()
    weight = whole.get_submodule(NAME).weight
    model.training_loss(whole, part).backward()
    torch.optim.SGD([weight], lr=step.lr).step()
    net = copy.deepcopy(base).double()
    losia = losia_pro.attach(
        net, losia_pro.LosiaConfig(rank_factor=1 / 4, period=None, base_decay=0.0)
    )
    for name, (rows, columns) in bound.subnets(base, 1 / 4, way, [part] * 2).items():
        losia.modules[name].select(rows, columns)
    optimizer = torch.optim.SGD(losia.parameters(), lr=step.lr)
    losia.bind(optimizer)
    model.training_loss(net, part).backward()
    optimizer.step()
    assert model.training_loss(net, part).item() == pytest.approx(step.loss(masks), rel=1e-6)
    x = step.x[NAME]
    lost = F.linear(x, weight) - F.linear(x, losia.modules[NAME].weight)
    error = (lost.square().sum() / (8 * 64)).item()  # tokens
    assert step.errors(masks)[NAME] == pytest.approx(error, rel=1e-6)
    assert 0 < error <= step.bounds(masks)[NAME]


def test_each_way_trains_as_many_entries_and_the_greedier_keep_more_of_the_gradient(
    base, step, part
):
    masks = {way: step.masks(base, 1 / 4, way, [part]) for way in WAYS}
    counts = {way: [int(m.sum()) for m in by.values()] for way, by in masks.items()}
    assert counts[RANDOM] == counts[LOCALIZED] == counts[GREEDY] == counts[LARGEST]
    assert counts[RANDOM][0] == 16 * 16
    kept = {way: step.kept(by) for way, by in masks.items()}
    assert kept[RANDOM] < kept[LOCALIZED] < kept[GREEDY] < kept[LARGEST] < 1
    everything = {n: torch.ones_like(g) for n, g in step.grad.items()}
    assert step.kept(everything) == 1 and set(step.errors(everything).values()) == {0.0}
    assert step.loss(everything) == step.full < step.before


def test_the_rate_is_the_best_of_those_tried_and_the_model_is_left_as_it_was(base, step):
    everything = {n: torch.ones_like(g) for n, g in step.grad.items()}
    best = step.lr
    for factor in (0.1, 10):
        step.lr = best * factor
        assert step.loss(everything) > step.full
    step.lr = best
    for a, b in zip(step.net.parameters(), base.parameters(), strict=True):
        assert torch.equal(a, b.double())


def test_the_command_records_that_the_bound_holds_and_is_drawn(tmp_path, capsys, monkeypatch):
    output = tmp_path / "bound.json"
    command = "--study bound --size toy --device cpu --pretrain-steps 2 --targets cpp"
    assert main([*command.split(), "--base", str(tmp_path), "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert len(record["rows"]) == len(WAYS) * len(SIZES) and len(record["layers"]) == 14
    for row in record["rows"]:
        assert row["holds"] == 14 and 0 < row["gradient_kept"] < 1
        assert all(0 < e <= b for e, b in zip(row["error"], row["bound"], strict=True))
    assert "in 224 of 224 cases" in record["sentence"] and ": agrees." in record["sentence"]
    assert record["sentence"] in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["draw", str(output), "--output", str(tmp_path / "docs")])
    draw_quality_bound.main()
    assert [p.name for p in (tmp_path / "docs").iterdir()] == ["quality-error-bound.png"]
    record["rows"][3]["holds"] = 13
    assert "in 223 of 224 cases" in (said := bound.sentence(record["rows"]))
    assert ": does not agree." in said
