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
        assert f"on all five (p < {p}" in TEXT


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
    loss = [f"{rows[k]['test_loss']:.3f}" for k in ("1/41/16,", "1/21/32,", "1/11/64,")]
    assert "1/4 x 1/16 {}, 1/2 x 1/32 {}, 1 x 1/64 {}".format(*loss) in TEXT
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
