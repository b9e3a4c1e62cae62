"""README.md: the table of steps is that of the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks.draw_quality_cost import costs

ROOT = Path(__file__).parent.parent
MODES = ("eager", "compiled", "checkpointed")
ROWS = {
    "floor": "floor",
    "`LosiaConfig()`": "losia-pro-default",
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


def cells(rows: dict[str, Any], method: str) -> list[str]:
    row = rows.get(method)
    if row is None:
        return ["", "", ""]
    over = "" if method == "floor" else f"{row['ratio'] - 1:.1%}"
    return [f"{row['median_ms']:.0f}", over, f"{row['peak_bytes'] / 1e9:.1f}"]


def test_the_table_of_steps_is_the_recorded_one():
    paths = (ROOT / "benchmarks" / "results").glob("step-llama2-7b-*-nvidia-h200.json")
    records = [json.loads(path.read_text()) for path in paths]
    found = {mode: costs(records, mode) for mode in MODES}
    lines = [
        "| " + " | ".join([label, *(c for m in MODES for c in cells(found[m], method))]) + " |"
        for label, method in ROWS.items()
    ]
    table = "\n".join(" ".join(line.split()) for line in lines)
    assert table in (ROOT / "README.md").read_text(), table
