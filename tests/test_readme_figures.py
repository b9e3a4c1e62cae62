"""README.md: the table of steps and the figures in its sentences are those of the records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from benchmarks.draw_quality_cost import costs
from benchmarks.quality.analysis import paired_p

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS = {"llama2-13b": "LLaMA-2 13B", "llama3-8b": "Llama-3 8B", "gemma-2b": "Gemma 2B"}
TEXT = " ".join((ROOT / "README.md").read_text().split())
MODES = ("eager", "compiled", "checkpointed")
ROWS = {
    "floor": "floor",
    "`LosiaConfig()`": "losia-pro-default",
    "... `neuron_group=1`": "losia-pro-default-g1",
    "`rank_factor=1/8, base_decay=0`": "losia-pro",
    "... while a layer is profiled": "losia-pro+profile",
    "... `neuron_group=16, share_inputs=True`": "losia-pro-g16-shared",
    '... `subnet_dtype="bfloat16", share_inputs=True`': "losia-pro-shared-bf16",
    "`in_factor=1/64, base_decay=0`": "losia-pro-rect",
    "... `neuron_group=16`": "losia-pro-rect-g16",
    "LoRA of rank 64, bf16, no dropout": "lora-r64",
    "LoRA of rank 64, as PEFT does it, dropout 0.05": "lora-peft-r64",
    "DoRA of rank 64, likewise": "dora-r64",
    "full fine-tuning": "full",
}


def record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def steps(model: str, mode: str) -> dict[str, Any]:
    """Rows by method: of the 7B model the newest of all its records, as the table has them."""
    if model != "llama2-7b":
        return {r["method"]: r for r in record(f"step-{model}-{mode}-nvidia-h200")["rows"]}
    paths = RESULTS.glob("step-llama2-7b-*-nvidia-h200.json")
    return costs([json.loads(path.read_text()) for path in paths], mode)


def cells(rows: dict[str, Any], method: str) -> list[str]:
    row = rows.get(method)
    if row is None:
        return ["", "", ""]
    over = "" if method == "floor" else f"{row['ratio'] - 1:.1%}"
    return [f"{row['median_ms']:.0f}", over, f"{row['peak_bytes'] / 1e9:.1f}"]


def test_the_table_of_steps_is_the_recorded_one():
    found = {mode: steps("llama2-7b", mode) for mode in MODES}
    lines = [
        "| " + " | ".join([label, *(c for m in MODES for c in cells(found[m], method))]) + " |"
        for label, method in ROWS.items()
    ]
    table = "\n".join(" ".join(line.split()) for line in lines)
    assert table in (ROOT / "README.md").read_text(), table


def test_the_default_against_lora_of_rank_64():
    less = []
    for mode in ("eager", "checkpointed"):
        rows = steps("llama2-7b", mode)
        ours, lora = rows["losia-pro-default"], rows["lora-r64"]
        less += [
            lora["median_ms"] - ours["median_ms"],
            (lora["peak_bytes"] - ours["peak_bytes"]) / 1e9,
        ]
    says = (
        f"takes {less[0]:.0f} ms and {less[1]:.0f} GB less than LoRA's of rank 64 (below; checkpointed, "
        f"{less[2]:.0f} ms less and {-less[3]:.1f} GB more)"
    )
    assert says in TEXT, says


def test_what_memory_is_left_to_subnets():
    rows = steps("llama2-7b", "checkpointed")
    more = [
        f"{(rows[m]['peak_bytes'] - rows[m]['floor_peak_bytes']) / 1e9:.1f} GB"
        for m in ("losia-pro-default", "lora-r64", "losia-pro")
    ]
    says = f"takes {more[0]} more than its floor with `LosiaConfig()`, {more[1]} more with LoRA of rank 64."
    assert says in TEXT and f"base_decay=0)` takes {more[2]}, and gains less" in TEXT, more
    gains = {
        m: f"{100 * statistics.fmean(r['recovered'] for r in record('quality-26m')['rows'] if r['method'] == m):.1f} %"
        for m in ("losia-1/8", "losia-default")
    }
    says = f"({gains['losia-1/8']} of full fine-tuning's gain where `LosiaConfig()` has {gains['losia-default']})"
    assert says in TEXT, says


def test_other_models_over_their_floors():
    """Every record of one is a row."""
    methods = ("losia-pro-default", "losia-pro", "losia-pro-g16-shared", "lora-r64")
    lines = []
    for model, label in MODELS.items():
        for mode in MODES:
            if not (RESULTS / f"step-{model}-{mode}-nvidia-h200.json").exists():
                continue
            rows = steps(model, mode)
            cells = [
                f"{r['ratio'] - 1:.1%}, {(r['peak_bytes'] - r['floor_peak_bytes']) / 1e9:.1f} GB"
                for r in (rows[m] for m in methods)
            ]
            lines.append(f"| {label}, {mode} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    assert len(lines) > 3 and table in (ROOT / "README.md").read_text(), table


def test_what_a_profiled_layer_adds():
    added = []
    for mode in MODES:
        rows = steps("llama2-7b", mode)
        more, less = (
            rows[m]["kernels_ms"] - rows[m]["floor_kernels_ms"]
            for m in ("losia-pro+profile", "losia-pro")
        )
        added.append(f"{100 * (more - less) / rows['losia-pro']['floor_kernels_ms']:.1f} %")
    says = f"told by the kernels' times: {added[0]}, compiled {added[1]}, checkpointed {added[2]}."
    assert says in TEXT, says


def test_shares_of_full_fine_tunings_gain():
    content = record("quality-26m")

    def percent(method: str, targets: Sequence[str] = content["plan"]["targets"]) -> str:
        rows = [r for r in content["rows"] if r["method"] == method and r["target"] in targets]
        return f"{100 * statistics.fmean(r['recovered'] for r in rows):.1f} %"

    texts = ("cpp", "docs", "config")
    for says in (
        f"It recovers {percent('losia-default')} of full fine-tuning's gain, LoRA {percent('lora-r8')}; on the three "
        f"texts alone, {percent('losia-default', texts)} and {percent('lora-r8', texts)}.",
        f"a decay of 0.5 gains {percent('losia-single-decay-0.5')}",
        f"a decay of 1 gains {percent('losia-single-decay-1')}",
        f"without decay the same block gains {percent('losia-single-no-decay')}",
        f"An eighth of the inputs gains {percent('losia-1/8x1-decay')}",
        f"({content['rate_rule']['searches']} searches, {content['rate_rule']['spread']:.2f} decades",
        f"on one GPU, {content['planned']} runs of some twenty seconds",
    ):
        assert says in TEXT, says


def test_the_default_against_lora_of_rank_8():
    """That it is better on all targets, and forgets no more on any; and no other on the easier ones."""

    def against(name: str) -> dict[str, Any]:
        mine = [r for r in record(name)["rows"] if r["method"] == "losia-default"]
        return {r["target"]: r["against"]["lora-r8"] for r in mine}

    def lower(rows: dict[str, Any], figure: str, p: float) -> set[str]:
        return {t for t, r in rows.items() if r[figure] < 0 and r[f"{figure}_p"] < p}

    rows, easier = against("quality-26m"), against("quality-easy-26m")
    assert lower(rows, "test_loss", 0.05) == rows.keys() and len(rows) == 5
    assert lower(rows, "old_loss", 0.01) == rows.keys() - {"docs"}
    assert f"on documentation (p = {rows['docs']['old_loss_p']:.2f})" in TEXT
    assert all(r["test_loss_p"] > 0.05 for r in easier.values())
    assert lower(easier, "old_loss", 0.01) == easier.keys()


def test_the_default_against_lora_of_rank_8_with_ten_seeds():
    content = record("quality-seeds-26m")
    rows = [r for r in content["rows"] if r["method"] == "losia-default"]
    found = [r["against"]["lora-r8"] for r in rows]
    assert len(rows) == 5 and all(r["n"] == 10 for r in found)
    for figure, p in (("test_loss", 0.003), ("old_loss", 0.006)):
        assert all(r[figure] < 0 and r[f"{figure}_p"] < p for r in found)
    assert "with all ten, p < 0.003 and p < 0.006" in TEXT


def test_the_default_against_lora_of_rank_8_with_the_seeds_that_did_not_choose_it():
    content = record("quality-seeds-26m")
    rate = {(r["method"], r["target"]): r["lr"] for r in content["rows"]}
    runs = {
        (r["method"], r["target"], r["seed"]): r
        for r in content["runs"]
        if r["lr"] == rate.get((r["method"], r["target"]))
    }
    for figure, p, says in (
        ("test_loss", 0.04, "by five others alone the loss is lower on all five (p < 0.04)"),
        ("old_loss", 0.02, "it forgets less on all five (p < 0.02)"),
    ):
        for target in content["plan"]["targets"]:
            less = [
                runs["losia-default", target, s][figure] - runs["lora-r8", target, s][figure]
                for s in range(5, 10)
            ]
            assert statistics.fmean(less) < 0 and (paired_p(less) or 1) < p, (target, figure)
        assert says in TEXT


def test_the_rule_for_other_batches():
    rules = [record(f"quality-batch-{n}-26m")["rate_rule"] for n in (4, 64)]
    power, spread = (" and ".join(f"{r[k]:.2f}" for r in rules) for k in ("power", "spread"))
    says = f"the power is {power} ({rules[0]['searches']} searches each, {spread} decades;"
    assert says in TEXT and rules[0]["searches"] == rules[1]["searches"], says


def test_shapes_of_equal_size():
    rows = {
        r["method"].split()[1] + r["method"].split()[3]: r
        for r in record("quality-shapes-26m")["rows"]
    }
    same = ["1/641/1,", "1/321/2,", "1/161/4,", "1/81/8,"]
    losses = [rows[k]["test_loss"] for k in same]
    assert f"({min(losses):.3f} to {max(losses):.3f}, p > 0.2)" in TEXT
    for k in same:
        against = {
            m.split()[1] + m.split()[3]: v["test_loss_p"] for m, v in rows[k]["against"].items()
        }
        assert all(p > 0.2 for m, p in against.items() if m in same)
    more = ["1/21/32,", "1/11/64,", "1/41/16,"]
    loss = [f"{rows[k]['test_loss']:.3f}" for k in more]
    says = "1/2 x 1/32 {} and 1 x 1/64 {} (p < 0.05 against each of those); 1/4 x 1/16, at {}, differs from one"
    assert says.format(*loss) in TEXT
    found = {
        k: [v for m, v in rows[k]["against"].items() if m.split()[1] + m.split()[3] in same]
        for k in more
    }
    clear = [sum(v["test_loss_p"] < 0.05 for v in found[k]) for k in more]
    assert clear == [4, 4, 1] and "all three forget less (p < 0.07;" in TEXT
    assert all(v["old_loss"] < 0 and v["old_loss_p"] < 0.07 for k in more for v in found[k])
    assert max(r["test_loss_se"] for r in rows.values() if r["n"] == 3) < 0.0035


def test_the_tasks():
    content = record("quality-26m")
    right = {(r["method"], r["target"]): r.get("test_exact") for r in content["rows"]}

    def both(method: str) -> str:
        return " and ".join(f"{100 * right[method, t]:.0f} %" for t in ("order", "parens"))

    says = (
        f"full fine-tuning is right on {both('full')} of the answers, `LosiaConfig()` on {both('losia-default')}, LoRA "
        f"with as many trained values on {both('lora-as-3/32x1')}, LoRA of rank 8 on {both('lora-r8')}."
    )
    assert says in TEXT, says


def test_the_papers_claims():
    """How many hold; and that a period's record has one amount of data, so that nothing grows with it."""
    content = record("quality-paper-26m")
    said = [s.split(" Here: ")[1] for s in content["sentences"]]
    hold = [s for s in said if s.endswith(": agrees.")]
    assert (len(hold), len(set(hold)), len(said)) == (7, 6, 15)
    assert sum("better on 0, worse on 0" in s for s in hold) == 1
    says = "With seven of the paper's fifteen claims they agree, two by one comparison and one by finding no difference"
    assert says in TEXT
    assert not any("data" in method for method in content["plan"]["methods"])
    assert "(that the best period grows with the data, as the paper says, was not tried)" in TEXT


def test_gathering():
    def default(row: dict[str, Any]) -> float:
        return row["candidates"]["default"]["median_us"]

    def gathers(name: str, chosen: str) -> list[dict[str, Any]]:
        rows = [r for r in record(name)["rows"] if r["op"] == "gather_columns"]
        return [r for r in rows if r["selection"] == chosen and r["tokens"] == 8192]

    times, less = [], []
    for chosen in ("single", "groups of 16"):
        found = [default(r) / r["least_us"] for r in gathers("kernels-nvidia-h200", chosen)]
        times.append(f"{min(found):.1f} to {max(found):.1f} times")
        tried = [gathers(f"tried/kernels-l2-fetch-{n}-nvidia-h200", chosen) for n in (32, 64)]
        found = [100 * (1 - default(a) / default(b)) for a, b in zip(*tried, strict=True)]
        less.append(f"{min(found):.0f} to {max(found):.0f} %")
    says = f"gathering single neurons takes {times[0]} the least, and runs of 16 take {times[1]}"
    assert says in TEXT, says
    says = f"Told to fetch 32, it takes {less[0]} and {less[1]} less at the 7B model's shapes, but the steps"
    assert says in TEXT, says
    steps = record("tried/step-llama2-7b-l2-fetch-32-nvidia-h200")["rows"][1:]
    assert {r["method"] for r in steps} == {"losia-pro", "losia-pro-rect"}  # both of single neurons


def test_studies():
    levers, bound, continual = (
        record(f"quality-{n}-26m") for n in ("levers", "bound", "continual")
    )
    assert levers["complete"] and f"{levers['planned']} runs" in TEXT
    rows = {r["method"]: r for r in continual["rows"]}
    loss = {m: f"{-r['AP']:.2f}" for m, r in rows.items()}
    against = {m: rows[m]["against"]["losia-default"]["AP_p"] for m in rows if m != "losia-default"}
    says = (
        f"ends at a mean loss of {loss['losia-default']} over them, full fine-tuning at {loss['full']} (p = "
        f"{against['full']:.2f}), the paper's configuration with a period of 10 at {loss['losia-paper-T10']} and LoRA "
        f"of rank 8 at {loss['lora-r8']} (five seeds, p < 0.002;"
    )
    assert continual["complete"] and says in TEXT, says
    assert max(against["losia-paper-T10"], against["lora-r8"]) < 0.002
    cases = bound["sentence"].split(" cases")[0].split()[-1]
    times = float(bound["sentence"].split("bound is ")[1].split()[0])
    says = f"holds in all {cases} cases tried, of layers, sizes, targets and ways to choose `P`, "
    says += f"and is {times:.0f} times"
    assert says in TEXT, says
