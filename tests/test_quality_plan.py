"""benchmarks/quality: which runs are made, what is concluded from them, and the command on a toy."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.quality import analysis, record, studies
from benchmarks.quality.__main__ import main
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import BASE, TUNING_SEED, Job, Plan, choose

FULL, LORA = METHODS["full"].start, METHODS["lora-r8"].start


def small_plan(methods=("full", "lora-r8"), targets=("cpp",), seeds=4, **more) -> Plan:
    return Plan(methods, targets, {t: "context" for t in targets}, seeds, **more)


def loss(job: Job, best: int = -6) -> float:
    """Lowest at the exponent ``best``; seeds differ a little."""
    return 1 + abs(job.exponent - best) + 0.01 * (job.seed % 7)


def finish(plan: Plan, job: Job, value: float | None, status: str = "ok", **more) -> None:
    row = {"key": plan.key(job), "status": status, "method": job.method, "target": job.target}
    row |= {"seed": job.seed, "exponent": job.exponent, "test_loss": value, "valid_loss": value}
    plan.add({**row, "old_loss": 0.5, "seconds": 1.0, "trainable": 7, "peak_bytes": None, **more})


def run_all(plan: Plan, best: int = -6) -> list[Job]:
    done: list[Job] = []
    while pending := plan.pending():
        job = choose(pending, None, [])
        finish(plan, job, loss(job, best) if job.method != BASE else 9.0)
        done.append(job)
    return done


# --- which runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [FULL - 3, FULL - 1, FULL, FULL + 2])
def test_the_best_rate_is_never_at_the_edge_of_those_tried(best):
    plan = small_plan(methods=["full"])
    run_all(plan, best)
    assert plan.best("full", "cpp") == best
    tried = plan.losses("full", "cpp")
    assert min(tried) < best < max(tried)
    (row,) = analysis.summary(plan)
    assert row["interior"] and row["lr"] == float(f"{10 ** (best / 2):.3g}")


def test_final_seeds_are_not_tuning_seeds_and_run_at_the_best_rate_alone():
    done = run_all(small_plan(tuning_seeds=2))
    finals = [j for j in done if j.method != BASE and j.seed < TUNING_SEED]
    assert {(j.method, j.seed) for j in finals} == {
        (m, s) for m in ("full", "lora-r8") for s in range(4)
    }
    assert {j.exponent for j in finals} == {-6} and len(finals) == 8
    tuning = [j for j in done if j.seed >= TUNING_SEED]
    assert {j.seed for j in tuning} == {TUNING_SEED, TUNING_SEED + 1}


def test_the_order_is_by_tier_and_then_further_seeds():
    later = next(m for m, method in METHODS.items() if method.tier == 2)
    done = run_all(small_plan(methods=[later, "full"], seeds=5))
    names = [(j.method, j.seed) for j in done]
    first = [n for n in names if n[1] < 3 or n[1] >= TUNING_SEED]
    assert names[: len(first)] == first  # seeds 3 and 4 come last
    assert max(k for k, n in enumerate(first) if n[0] == "full") < min(
        k for k, n in enumerate(first) if n[0] == later
    )
    assert [j.stage for j in done] == sorted(j.stage for j in done)


def test_a_run_that_diverged_is_worse_than_any():
    plan = small_plan(methods=["full"])
    while pending := plan.pending():
        job = pending[0]
        finish(plan, job, None if job.exponent > FULL else loss(job, FULL))
    assert plan.best("full", "cpp") == FULL
    assert plan.losses("full", "cpp")[FULL + 1] == math.inf


def test_a_method_that_always_diverges_has_no_final_runs():
    plan = small_plan(methods=["full"])
    for _ in range(3):
        for job in plan.pending():
            finish(plan, job, None if job.method != BASE else 3.0)
    assert plan.best("full", "cpp") is None
    assert not plan.pending() and len(plan.rows) == 4 and analysis.summary(plan) == []


def test_a_failed_run_is_tried_once_more_and_then_left():
    plan = small_plan(methods=["full"])
    for _ in range(2):
        for job in plan.pending():
            if job.method != BASE:
                finish(plan, job, None, status="failed")
    assert all(job.method == BASE for job in plan.pending())


def test_runs_of_another_context_are_other_runs():
    a, b = small_plan(), Plan(["full", "lora-r8"], ["cpp"], {"cpp": "other"}, 4)
    run_all(a)
    for row in a.rows.values():
        b.add(row)
    assert not a.pending() and len(b.pending()) == 7  # the base, and three rates of each
    c = small_plan()
    for row in a.rows.values():
        c.add(row)
    assert not c.pending() and c.size() == a.size() == (len(a.rows), len(a.rows))


def test_a_record_has_the_runs_of_its_plan_alone():
    plan, other = small_plan(), small_plan(["dora-r8"])
    run_all(plan), run_all(other)
    mine = set(plan.rows)
    for row in other.rows.values():
        plan.add(row)
    assert set(plan.rows) > mine == {row["key"] for row in plan.done()}


def test_a_worker_keeps_its_method_and_new_ones_spread():
    jobs = small_plan().pending()[1:]
    assert choose(jobs, "lora-r8", ["lora-r8"]).method == "lora-r8"
    assert choose(jobs, None, []).method == "full"
    assert choose(jobs, None, ["full"]).method == "lora-r8"
    assert choose([jobs[0], Job(99, "dora-r8", "cpp", 0, 0)], "dora-r8", []) == jobs[0]


# --- what is concluded ----------------------------------------------------------------------------------


def test_the_table_is_the_mean_over_the_final_seeds_and_pairs_them():
    scipy = pytest.importorskip("scipy.stats")
    plan = small_plan()
    values = {"full": [1.0, 1.1, 1.2, 1.5], "lora-r8": [1.5, 1.7, 1.6, 2.0]}
    for _ in range(20):
        for job in plan.pending():
            final = job.method != BASE and job.seed < TUNING_SEED
            finish(
                plan,
                job,
                values[job.method][job.seed] if final else loss(job) if job.method != BASE else 3.0,
            )
    full, lora = analysis.summary(plan)
    assert (full["method"], full["n"]) == ("full", 4)
    assert full["test_loss"] == pytest.approx(1.2)
    assert full["test_loss_se"] == pytest.approx(scipy.sem(values["full"]))
    assert lora["recovered"] == pytest.approx((3.0 - 1.7) / (3.0 - 1.2)) and full["recovered"] == 1
    against = full["against"]["lora-r8"]
    assert against["n"] == 4 and against["test_loss"] == pytest.approx(-0.5)
    assert against["test_loss_p"] == pytest.approx(
        scipy.ttest_rel(values["full"], values["lora-r8"]).pvalue
    )
    assert "full" not in lora["against"]
    assert "recovered" in analysis.text(plan, [full, lora])


def test_a_line_that_was_cut_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "runs.jsonl"
    lines = record.Lines(path)
    lines.add({"a": 1})
    with path.open("a") as stream:
        stream.write('{"a": 2, "b')
    again = record.Lines(path)
    again.add({"a": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"a": 3}]


# --- the whole ------------------------------------------------------------------------------------------


def test_the_command_makes_a_record_and_goes_on_where_it_stopped(tmp_path, capsys):
    output = tmp_path / "quality.json"
    command = (
        "--size toy --device cpu --workers 1 --steps 2 --pretrain-steps 2 --seeds 1 --targets cpp,imports "
        f"--methods losia-1/16x1 --base {tmp_path / 'base'} --output {output} --budget"
    ).split()
    assert main([*command, "16"]) == 0  # a second for runs: it stops early
    early = json.loads(output.read_text())
    assert early["stopped"] == "the budget of 16 s" and not early["complete"]
    assert main([*command, "300"]) == 0
    content = json.loads(output.read_text())
    assert content["complete"] and content["stopped"] is None
    assert content["base"]["digest"] == early["base"]["digest"]
    assert content["base"]["pretraining_seconds"] is None  # it was kept
    lines = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    keys = [line["key"] for line in lines]
    assert len(set(keys)) == len(keys) == content["done"] == content["planned"]
    assert {row["target"] for row in content["rows"]} == {"cpp", "imports"}
    for row in content["rows"]:
        assert (
            row["n"] == 1
            and row["interior"]
            and ("test_exact" in row) == (row["target"] == "imports")
        )
    assert "complete; recorded in" in capsys.readouterr().out
    text = output.read_text()
    assert main(["--summarize", str(output)]) == 0
    assert output.read_text() == text
    draw(output, tmp_path / "docs")


def draw(path: Path, out: Path) -> None:
    pytest.importorskip("matplotlib")
    script = Path(__file__).parent.parent / "benchmarks" / "draw_quality.py"
    old = sys.argv
    sys.argv = [str(script), str(path), "--output", str(out)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = old
    assert sorted(p.name for p in out.iterdir()) == [
        "quality-forgetting.png", "quality-seconds.png", "quality-size.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--methods nonsense", "is none of full, lora-r8"),
        ("--targets fortran", "is none of cpp, order"),
    ],
)
def test_a_name_that_means_nothing_is_refused(flags, message, capsys, tmp_path):
    command = f"--size toy --device cpu --dry-run --output {tmp_path / 'x.json'} {flags}"
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err


# --- studies --------------------------------------------------------------------------------------------


def study_of(losses: dict[str, float]) -> list[str]:
    """Sentences of the study "rewarming" for final losses by method; every seed differs alike, nearly."""
    pytest.importorskip("scipy.stats")
    plan = small_plan(studies.names("rewarming"))
    for _ in range(20):
        for job in plan.pending():
            final = job.method != BASE and job.seed < TUNING_SEED
            name = job.method.partition(": ")[2]
            noise = 0.1 * job.seed + 0.001 * (job.seed * len(name) % 3)
            finish(
                plan,
                job,
                losses[name] + noise if final else 3.0 if job.method == BASE else loss(job, -4),
            )
    return studies.sentences("rewarming", analysis.summary(plan))


def test_a_study_says_whether_it_agrees():
    (sentence,) = study_of({"rewarm=True": 1.0, "rewarm=False": 1.2})
    assert "better on 1, worse on 0 of 1 targets" in sentence and sentence.endswith(": agrees.")
    (sentence,) = study_of({"rewarm=True": 1.2, "rewarm=False": 1.0})
    assert "better on 0, worse on 1 of 1 targets" in sentence and sentence.endswith(
        ": does not agree."
    )
    (sentence,) = study_of({"rewarm=True": 1.0, "rewarm=False": 1.0})
    assert "better on 0, worse on 0 of 1 targets" in sentence and sentence.endswith(
        "does not agree."
    )
    assert studies.sentences("rewarming", [])[0].endswith("not yet known.")


@pytest.mark.parametrize("study", studies.STUDIES)
def test_claims_are_on_methods_of_the_study(study):
    names = studies.STUDIES[study].methods
    assert all(c.better in names and c.worse in names for c in studies.STUDIES[study].claims)
    assert len({METHODS[n].decides() for n in studies.names(study)}) == len(names)


def test_the_same_configuration_under_two_names_is_one_run():
    names = [
        "rewarming: rewarm=True",
        "score: score=iu",
        "score: score=i",
        "selection: fixed, random",
    ]
    plan = small_plan([*names, "relocalization: fixed"])
    same, also, other, fixed, too = (plan.key(Job(0, m, "cpp", -4, 0)) for m in plan.methods)
    assert same == also and fixed == too and len({same, other, fixed}) == 3


def test_average_performance_and_transfer():
    matrix = [
        [1.0, 2.5, 3.0],
        [1.5, 2.0, 2.9],
        [1.7, 2.2, 2.0],
    ]  # rows: after the first, second, third tuning
    ap, fwt, bwt = analysis.transfer([3.0, 3.0, 3.0], matrix)
    assert ap == pytest.approx(-(1.7 + 2.2 + 2.0) / 3)
    assert fwt == pytest.approx((2.0 + 1.0 + 1.0) / 3)
    assert bwt == pytest.approx(-(0.7 + 0.2) / 2)


def test_a_sequence_is_one_run_at_the_rates_found_for_each_target():
    plan = small_plan(targets=["cpp", "docs", "man"], seeds=2, sequence=True)
    done = run_all(plan)
    finals = [j for j in done if j.method != BASE and j.seed < TUNING_SEED]
    assert len(finals) == 4
    for job in finals:
        assert (job.target, job.exponent) == ("man", -6)
        assert job.before == (("cpp", -6), ("docs", -6))
    assert plan.size() == (len(done), len(done))
