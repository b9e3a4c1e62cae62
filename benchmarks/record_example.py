"""Record the example for the README: ``python benchmarks/record_example.py``.

Runs ``losia-pro finetune`` without a model and data by three seeds, each with every method, and writes the held-out
scores, the curves and the re-selections to ``results/example.json``. Times are left out: they say nothing where
other work shares the machine. A seed sets the order of the batches, the first subnets and LoRA's start.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from losia_pro.cli import main as losia_pro

RESULT = Path(__file__).parent / "results" / "example.json"
SEEDS = (0, 1, 2)
SHARED = ("versions", "device", "precision", "steps", "examples", "base", "groups", "subnet_share")
SETTINGS = (
    "batch_size",
    "max_length",
    "scheduler",
    "warmup",
    "lr",
    "in_factor",
    "out_factor",
    "neuron_group",
    "period",
    "base_decay",
)


def run(seed: int) -> dict[str, Any]:
    """One run of the command line; returns its record, ``run.json``."""
    with tempfile.TemporaryDirectory() as folder:
        if losia_pro(["finetune", "--seed", str(seed), "--output", folder]):
            raise SystemExit(f"seed {seed} failed")
        return dict(json.loads((Path(folder) / "run.json").read_text()))


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    keep = ("trainable", "lr", "loss", "exact", "held_out")
    results = {m: {k: r[k] for k in keep} for m, r in record["results"].items()}
    moved = [
        {k: r[k] for k in ("step", "group", "score_kept", "overlap")}
        for r in record["reselections"]
    ]
    return {"seed": record["arguments"]["seed"], "results": results, "reselections": moved}


def main() -> None:
    records = [run(seed) for seed in SEEDS]
    first = records[0]
    result = {
        "benchmark": "example",
        **{name: first[name] for name in SHARED},
        "settings": {name: first["arguments"][name] for name in SETTINGS},
        "runs": [figures(record) for record in records],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
