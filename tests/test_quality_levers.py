"""benchmarks/quality/levers.py: each lever does what it says, and nothing of it is left after a run."""

from __future__ import annotations

import copy
import importlib
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.quality import levers, model, rates, record, settings, studies, training
from benchmarks.quality.arrange import arrange, spanning
from benchmarks.quality.corpora import Part, windows
from benchmarks.quality.methods import METHODS, losia, prepare
from benchmarks.quality.plan import Job, Plan

from losia_pro.config import IN_FACTOR, OUT_FACTOR
from losia_pro.profile import Profile

TOY = settings.SIZES["toy"]
RECORD = Path(__file__).parent.parent / "benchmarks" / "results" / "quality-26m.json"
MOVED = {"in_factor": 1 / 4, "out_factor": 1, "period": 2}


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return model.build(TOY, torch.device("cpu"))


@pytest.fixture(scope="module")
def part():
    source = Path(settings.__file__).read_text()
    return Part(*(t[:8] for t in windows([source], TOY.length, None)))


def start(method, base, lr=1e-2):
    prepared = prepare(method, copy.deepcopy(base), 0, list)
    return prepared, levers.optimizer_of(method.lever, prepared, lr, False)


def step(prepared, optimizer, part):
    optimizer.zero_grad()
    model.training_loss(prepared.model, part).backward()
    optimizer.step()


# --- keys ---------------------------------------------------------------------------------------------


def test_runs_on_record_are_still_those_of_the_methods_of_their_names():
    """Their keys are hashes of all that decides a run: another key, and every run is made again."""
    head, runs = record.read(RECORD)
    plan = Plan(**head["plan"])
    for r in runs:
        job = Job(0, r["method"], r["target"], r["exponent"], r["seed"])
        assert plan.key(job) == r["key"], job
    (digest,) = {context.split()[0] for context in plan.context.values()}
    assert settings.SIZES["26m"].digest() == digest


PAPERS = {
    *("relocalization", "selection", "rewarming", "score", "importance"),
    *("beta1", "beta2", "p", "p_o", "period"),
}


def test_a_lever_makes_another_run_and_none_makes_the_same():
    plain = losia(**levers.FIXED)
    assert plain.decides() == METHODS["losia-single-no-decay"].decides()
    assert losia(**levers.FIXED, lever={}).decides() == plain.decides()
    texts = {losia(**levers.FIXED, lever={"zero_decay": d}).decides() for d in (0.1, 0.5)}
    assert len(texts | {plain.decides()}) == 3


@pytest.mark.parametrize("together, others", [("levers", set(levers.STUDIES)), ("paper", PAPERS)])
def test_every_configuration_is_in_the_study_of_all_once(together, others):
    single = {m.decides() for s in others for m in studies.STUDIES[s].methods.values()}
    every = [METHODS[n].decides() for n in studies.names(together)]
    assert set(every) == single and len(every) == len(single)
    claims = [c for s in others for c in studies.STUDIES[s].claims]
    assert len(studies.STUDIES[together].claims) == len(claims)
    methods = studies.STUDIES[together].methods
    for claim in studies.STUDIES[together].claims:
        assert claim.better in methods and claim.worse in methods and claim.better != claim.worse


# --- what each does -----------------------------------------------------------------------------------


def test_muon_makes_updates_of_nearly_equal_singular_values(untrained, part):
    spread = {}
    for kind in ("muon", "adam"):
        method = losia(in_factor=1 / 4, out_factor=1, period=None, lever={"optimizer": kind})
        prepared, optimizer = start(method, untrained)
        m = next(iter(prepared.losia.modules.values()))
        before = m.subnet.detach().clone()
        step(prepared, optimizer, part)
        values = torch.linalg.svdvals(m.subnet.detach() - before)
        spread[kind] = float(values.max() / values.min())
    assert spread["muon"] < 2 < spread["adam"]


def test_without_muon_that_is_said(untrained, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(RuntimeError, match="has no torch.optim.Muon"):
        start(losia(**levers.FIXED, lever={"optimizer": "muon"}), untrained)


def test_carried_moments_are_the_old_ones_at_the_entries_that_stay(untrained, part):
    method = losia(**MOVED, lever={"carry": True})
    with levers.pulled(method.lever):
        prepared, optimizer = start(method, untrained)
        first = prepared.losia.group_modules(0)
        step(prepared, optimizer, part)
        old = {n: (m.out_idx.clone(), m.in_idx.clone()) for n, m in first.items()}
        moments = {}
        bound = importlib.import_module("losia_pro.reselect").relocate

        def watch(modules, config):
            for m in modules:
                moments[m] = {k: v.clone() for k, v in optimizer.state[m.subnet].items()}
            return bound(modules, config)

        importlib.import_module("losia_pro.reselect").relocate = watch
        step(prepared, optimizer, part)
    stayed = 0
    for name, m in first.items():
        stays = torch.isin(m.in_idx, old[name][1])
        at = torch.searchsorted(old[name][1], m.in_idx[stays])
        stayed += int(stays.sum())
        state, last = optimizer.state[m.subnet], moments[m]
        assert state["step"] == 2
        for k in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[k][:, stays], last[k][:, at])
        new = state["exp_avg_sq"][:, ~stays]
        assert not state["exp_avg"][:, ~stays].any()
        assert torch.equal(new, last["exp_avg_sq"].mean().expand_as(new))
    assert stayed


def moved(base, part, lever, steps=1, **changes):
    """The controller after the first group's first move."""
    method = losia(**{**MOVED, "period": steps, **changes}, lever=lever)
    with levers.pulled(lever):
        prepared, optimizer = start(method, base)
        for _ in range(steps):
            step(prepared, optimizer, part)
    return prepared.losia


def test_hysteresis_keeps_more(untrained, part):
    none, *kept = (
        sum(h.overlap for h in moved(untrained, part, lever, 2).history)
        for lever in ({}, {"hysteresis": 0.0}, {"hysteresis": 0.5}, {"hysteresis": 1e6})
    )
    assert none == kept[0] < kept[1] < kept[2] == 7.0


@pytest.mark.parametrize(("score", "power"), [("|g|", 1), ("g^2", 2)])
def test_a_gradient_score_is_of_the_gradient_alone(score, power, untrained, part):
    plain = copy.deepcopy(untrained)
    model.training_loss(plain, part).backward()
    for name, m in moved(untrained, part, {"score": score}, score="i").group_modules(0).items():
        sums = plain.get_submodule(name).weight.grad.abs().pow(power).sum(0)
        assert set(m.in_idx.tolist()) == set(sums.topk(len(m.in_idx)).indices.tolist())


def test_a_random_score_moves_elsewhere_each_time(untrained, part):
    places = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losia_ = moved(untrained, part, {"score": "random"})
        places.append([m.in_idx.tolist() for m in losia_.group_modules(0).values()])
    assert places[0] == places[1] != places[2]


def test_size_of_weights_alone_chooses_the_largest(untrained, part):
    lever = {"score": "|w|"}
    method = losia(**{**MOVED, "period": 1}, lever=lever)
    with levers.pulled(lever):
        prepared, optimizer = start(method, untrained, lr=0.0)
        for p in prepared.parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
    name, m = next(iter(prepared.losia.group_modules(0).items()))
    sums = untrained.get_submodule(name).weight.abs().double().sum(0)
    assert set(m.in_idx.tolist()) == set(sums.topk(len(m.in_idx)).indices.tolist())


def test_slots_take_several_groups_and_begin_where_they_are_told():
    two = levers.Slots(5, 10, at_once=2)
    assert [two.profiled(s) for s in (0, 10, 20, 30)] == [(0, 1), (2, 3), (4,), (0, 1)]
    assert two.reselected(19) == (2, 3) and two.rewarm(20, 3) == 0.1 and two.rewarm(20, 1) == 1
    last = levers.Slots(5, 10, last_first=True)
    assert [last.profiled(s) for s in (0, 10, 49, 50)] == [(4,), (3,), (0,), (4,)]
    assert levers.Slots(5, None, at_once=2).profiled(3) == ()


def test_the_slots_reach_the_controller(untrained, part):
    for lever, groups in (({"at_once": 2}, {0, 1}), ({"last_first": True}, {1})):
        assert {h.group for h in moved(untrained, part, lever).history} == groups


def test_budgets_move_inputs_between_projections_at_equal_size():
    base = model.build(settings.SIZES["26m"], torch.device("cpu"))
    equal = prepare(METHODS["budgets: equal"], copy.deepcopy(base), 0, list)
    for name in ("mlp twice", "v, o, down twice"):
        method = METHODS[f"budgets: {name}"]
        with levers.pulled(method.lever):
            prepared = prepare(method, copy.deepcopy(base), 0, list)
        assert abs(prepared.trainable / equal.trainable - 1) < 0.02
        inputs = {
            n.rpartition(".")[2]: len(m.in_idx) / m.weight.shape[1]
            for n, m in prepared.losia.group_modules(0).items()
        }
        for projection, share in inputs.items():
            wanted = method.lever["inputs"].get(projection, 1)
            assert abs(share / inputs["q_proj"] - wanted) < 0.06


def test_bf16_is_the_dtype_of_weights_and_only_of_the_subnets_meant(untrained):
    for name, dtype in (("fp32 subnets", torch.float32), ("bf16 subnets", torch.bfloat16)):
        prepared, _ = start(METHODS[f"bf16: {name}"], untrained)
        m = next(iter(prepared.losia.modules.values()))
        assert (m.weight.dtype, m.subnet.dtype) == (torch.bfloat16, dtype)


@pytest.mark.parametrize("name", [n for n in studies.names("levers") if METHODS[n].lever])
def test_every_lever_trains_and_leaves_the_package_as_it_was(name, untrained, part):
    domain = {"train": part, "valid": part, "test": part}
    rooms = [importlib.import_module(f"losia_pro.{n}") for n in ("reselect", "controller")]
    before = [dict(vars(owner)) for owner in (Profile, *rooms)]
    job = {"method": name, "target": "cpp", "lr": 1e-2, "seed": 0}
    setting = settings.dataclasses.replace(TOY, steps=12)
    row = training.tune(setting, untrained, {"cpp": domain, "python": domain}, job, False)
    assert row["test_loss"] < model.evaluate(untrained, part, 8)[0]
    assert [dict(vars(owner)) for owner in (Profile, *rooms)] == before


# --- the rule for the learning rate -------------------------------------------------------------------


def search(method, target, losses, seed=1000):
    return [
        {"status": "ok", "method": method, "target": target, "seed": seed, "exponent": e, "valid_loss": v}
        for e, v in losses.items()
    ]  # fmt: skip


def test_the_best_rate_is_the_lowest_point_of_a_parabola_with_a_worse_rate_on_both_sides():
    rows = search("losia-1/8", "cpp", {-5: 1.5, -4: 1.0, -3: 1.0 + 1 / 6})  # least at -3.75
    rows += search("losia-1/8", "docs", {-5: 1.0, -4: 2.0})  # goes on
    rows += search("losia-1/8", "config", {-5: 2.0, -4: 1.0, -3: None})  # diverged
    rows += search("losia-1/8", "cpp", {-6: 0.0}, seed=0)  # no search
    assert rates.best_log_rates(rows) == {("losia-1/8", "cpp"): pytest.approx(-3.75 / 2)}


def test_the_rule_is_a_line_through_the_logarithms_of_subnets_that_stay_and_of_all_weights():
    def best_at(method, exponent):
        return search(method, "cpp", {e: (e - exponent) ** 2 for e in range(-8, 1)})

    rows = [*best_at("full", -6), *best_at("losia-1/8", -3), *best_at("losia-1/4", -4)]
    rows += [
        *best_at("losia-paper-T10", -5),
        *best_at("lora-r8", -5),
        *best_at("optimizer: Muon", -5),
    ]
    rule = rates.fit(rows)
    # 10^-3, 10^-2 and 10^-1.5 for 1, 1/16 and 1/64 of the weights
    assert rule["rate_of_full"] == pytest.approx(1e-3, rel=1e-3)
    assert rule["power"] == pytest.approx(-1 / math.log10(16), abs=1e-3)
    assert (rule["spread"], rule["searches"]) == (pytest.approx(0, abs=1e-3), 3)
    assert rule["methods"] == ["full", "losia-1/4", "losia-1/8"]
    assert rates.fit(best_at("full", -6)) is None


def test_the_readme_has_the_recorded_rule():
    head, _ = record.read(RECORD)
    rule = head["rate_rule"]
    text = " ".join((RECORD.parents[2] / "README.md").read_text().split())
    power = round(rule["power"], 2)
    times = [round(share**power) for share in (IN_FACTOR * OUT_FACTOR, 1 / 64)]
    says = f"the rate of full fine-tuning times the trained share to the power of {power}"
    assert says in text
    assert f"{times[0]} times for `LosiaConfig()`, {times[1]} times for `rank_factor=1/8`" in text


def test_spanning_inputs_leave_out_what_others_explain():
    torch.manual_seed(0)
    x = torch.randn(1000, 6, dtype=torch.float64)
    x[:, 3] = 2 * x[:, 0] + 3 * x[:, 1]  # the largest; with one of those two it explains the other
    x[:, 5] *= 0.1
    assert spanning(x.T @ x, 4).tolist() in ([0, 2, 3, 4], [1, 2, 3, 4])


def test_spanning_inputs_are_chosen_and_norms_trained_before_the_first_step(untrained, part):
    method = losia(**levers.FIXED, lever={"spanning": True, "norms": True})
    prepared, optimizer = start(method, untrained)
    before = {n: m.in_idx.clone() for n, m in prepared.losia.modules.items()}
    arrange(method.lever, prepared, lambda: [part])
    moved = [not torch.equal(m.in_idx, before[n]) for n, m in prepared.losia.modules.items()]
    assert all(moved)
    norms = [p for n, p in prepared.model.named_parameters() if "norm" in n]
    assert norms and {id(p) for p in norms} <= {id(p) for p in prepared.parameters}
    model.training_loss(prepared.model, part).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in norms)
