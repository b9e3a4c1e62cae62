"""benchmarks/draw_quality_cost.py: the cost that a method is given is its own configuration's; what is drawn."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from benchmarks.draw_quality_cost import STEPS, costs, main, pair
from benchmarks.quality import methods, model, settings

from losia_pro import LosiaConfig
from losia_pro.cli.bench.methods import parse

SIZE = settings.SIZES["26m"]
SIZES = {"rank_factor", "in_factor", "out_factor"}  # compared as what they make of 4096 neurons
COSTS_NOTHING = {"init", "seed", "period"}  # of a step; that a layer is profiled is in the name


def costly(config, names):
    """Whether it decays; by how much costs nothing."""
    return {
        k: bool(v) if k == "base_decay" else v for k, v in config.to_dict().items() if k in names
    }


@pytest.fixture(scope="module")
def net():
    return model.build(SIZE, torch.device("cpu"))


@pytest.mark.parametrize("name", [n for n in STEPS if n.startswith("losia")])
def test_the_step_of_a_subnet_method_is_of_its_configuration(name, net):
    mine = LosiaConfig(**methods.METHODS[name].settings)
    step = parse(STEPS[name])(copy.deepcopy(net)).losia.config
    assert (mine.n_in(4096), mine.n_out(4096)) == (step.n_in(4096), step.n_out(4096))
    same = step.to_dict().keys() - COSTS_NOTHING - SIZES
    assert costly(mine, same) == costly(step, same)
    assert bool(mine.period) == STEPS[name].endswith("+profile")


@pytest.mark.parametrize("name", [n for n in STEPS if not n.startswith("losia")])
def test_the_step_of_another_method_has_the_same_share_of_the_hidden_size(name):
    method = methods.METHODS[name]
    kind, _, rank = STEPS[name].partition("-r")
    if name == "full":
        assert (kind, rank) == ("full", "")
        return
    assert kind == ("dora" if method.settings.get("use_dora") else "lora")
    ours = method.settings.get("r") or methods._rank_of_area(
        model.build(SIZE, torch.device("meta")), method.area
    )
    assert int(rank) / 4096 == ours / SIZE.hidden


def step_record(ms: dict[str, float], batch: int = 4, date: str = "2026-01-01") -> dict:
    rows = [
        {"method": m, "mode": "eager", "status": "ok", "median_ms": t, "ratio": t / 500, "peak_bytes": 10**9 * t}
        | {"floor_peak_bytes": 500 * 10**9}
        for m, t in ms.items()
    ]  # fmt: skip
    rows.append({**rows[0], "mode": "compiled", "median_ms": 1.0})
    rows.append({"method": "dora-r64", "mode": "eager", "status": "skipped"})
    arguments = {"model": "llama2-7b", "batch": batch, "length": 2048, "lr": 1e-3}
    return {"benchmark": "step", "date": date, "arguments": arguments, "rows": rows}


def quality_record() -> dict:
    """The base has losses of 2 and 4, full fine-tuning of 1 and 2."""
    losses = {"full": (1.0, 2.0), "lora-r8": (1.5, 2.5), "losia-1/8": (1.75, 3.0)}
    losses["losia-1/4"] = (1.2, 2.2)
    targets = {"cpp": (2.0, 1.0, 0.03), "docs": (4.0, 2.0, 0.08)}
    rows = [
        {"method": m, "target": t, "test_loss": v, "test_loss_se": se}
        | {"recovered": (base - v) / (base - full), "trainable": 7}
        for m, both in losses.items()
        for v, (t, (base, full, se)) in zip(both, targets.items(), strict=True)
    ]
    runs = [{"method": "base", "target": t, "test_loss": v} for t, (v, _, _) in targets.items()]
    plan = {"methods": list(losses), "targets": list(targets)}
    return {"plan": plan, "rows": rows, "runs": runs}


def test_of_two_measurements_the_newer_counts_and_other_shapes_do_not():
    newer = step_record({"full": 750}, date="2026-01-02")
    records = [newer, step_record({"floor": 500, "full": 700})]
    records.append(step_record({"full": 60}, batch=1))
    found = costs(records, "eager")
    assert {m: r["median_ms"] for m, r in found.items()} == {"floor": 500, "full": 750}
    assert costs(records, "compiled")["full"]["median_ms"] == 1.0


def test_a_method_has_its_share_its_error_and_its_cost_and_those_without_a_step_are_named():
    times = {"floor": 500, "full": 750, "losia-pro": 520, "lora-r64": 600}
    steps = costs([step_record(times)], "eager")
    points, left_out = pair(quality_record(), steps)
    assert left_out == ["losia-1/4"]
    full, lora, ours = points
    assert (full["method"], lora["method"], ours["method"]) == ("full", "lora-r8", "losia-1/8")
    assert full["recovered"] == 1 and lora["recovered"] == pytest.approx((0.5 + 0.75) / 2)
    assert ours["recovered"] == pytest.approx((0.25 + 0.5) / 2)
    assert ours["recovered_se"] == pytest.approx((0.03**2 + 0.04**2) ** 0.5 / 2)
    assert (ours["ratio"], ours["peak_bytes"], lora["median_ms"]) == (1.04, 520e9, 600)
    assert (ours["more_time"], ours["more_bytes"]) == (pytest.approx(0.04), 20e9)


def test_the_figure_is_drawn_and_its_values_are_printed(tmp_path, monkeypatch, capsys):
    paths = [tmp_path / "quality.json", tmp_path / "step.json"]
    steps = step_record({"floor": 500, "full": 750, "losia-pro": 520})
    for path, content in zip(paths, (quality_record(), steps), strict=True):
        path.write_text(json.dumps(content))
    argv = ["draw", *map(str, paths), "--output", str(tmp_path / "docs")]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    assert [p.name for p in (tmp_path / "docs").iterdir()] == ["quality-cost.png"]
    said = capsys.readouterr().out
    assert "losia-1/8  losia-pro           37.5%  2.5%  520" in said
    assert "left out, their step is not measured: lora-r8, losia-1/4" in said
    monkeypatch.setattr(sys, "argv", [*argv, "--mode", "checkpointed"])
    with pytest.raises(SystemExit, match="nothing to draw: no step of full, lora-r8"):
        main()
