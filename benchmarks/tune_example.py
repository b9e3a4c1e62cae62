"""Tune the learning rates of the example that ``losia-pro finetune`` runs without arguments.

    python benchmarks/tune_example.py

Each method is trained at neighbouring rates of the series 1, 2, 5, 10 and by three seeds; while the best rate is at
the edge, the next one is tried too. Judged by the mean loss on a tenth of the training examples, held out
for this: the test set takes no part. Writes ``results/example-learning-rates.json`` after every run and
leaves out what is in it already. The rates in ``losia_pro/cli/options.py`` are the ones chosen here.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from losia_pro.cli import main as losia_pro

RESULT = Path(__file__).parent / "results" / "example-learning-rates.json"
SERIES = [float(f"{digit}e{power}") for power in range(-5, 0) for digit in (1, 2, 5)]
FIRST = {"losia-pro": (2e-3, 5e-3, 1e-2), "lora": (1e-3, 2e-3, 5e-3), "full": (2e-4, 5e-4, 1e-3)}
SEEDS = (0, 1, 2)
FLAGS = ["--eval-split", "0.1", "--compare", "none", "--eval-steps", "1000", "--save-steps", "none"]


def run(method: str, lr: float, seed: int) -> dict[str, Any]:
    """One run of the command line; returns its record, ``run.json``."""
    with tempfile.TemporaryDirectory() as folder:
        own = ["--method", method, "--lr", str(lr), "--seed", str(seed), "--output", folder]
        if losia_pro(["finetune", *FLAGS, *own]):
            raise SystemExit(f"{method} at {lr:g} failed")
        return dict(json.loads((Path(folder) / "run.json").read_text()))


class Results:
    """The file and what is in it."""

    def __init__(self) -> None:
        self.all: dict[str, Any] = {"benchmark": "example-learning-rates", "chosen": {}, "runs": []}
        if RESULT.exists():
            self.all = json.loads(RESULT.read_text())

    def mean(self, method: str, lr: float) -> float:
        """Mean held-out loss over the seeds; runs what is missing."""
        losses = []
        for seed in SEEDS:
            key = {"method": method, "lr": lr, "seed": seed}
            found = [r for r in self.all["runs"] if r.items() >= key.items()]
            losses.append((found[0] if found else self.add(key))["loss"])
        return statistics.mean(losses)

    def add(self, key: dict[str, Any]) -> dict[str, Any]:
        record = run(**key)
        figures = record["results"][key["method"]]
        row = {**key, **{name: figures[name] for name in ("loss", "exact", "trainable")}}
        settings = (
            "steps",
            "batch_size",
            "max_length",
            "scheduler",
            "warmup",
            "in_factor",
            "out_factor",
            "neuron_group",
            "period",
            "base_decay",
        )
        self.all |= {
            "judged_by": "mean held-out loss over the seeds, on a tenth of the training examples",
            "examples": record["examples"],
            "base": record["base"],
            "settings": {name: record["arguments"][name] for name in settings},
            "precision": record["precision"],
            "device": record["device"],
            "versions": record["versions"],
        }
        self.all["runs"].append(row)
        self.save()
        return row

    def save(self) -> None:
        """One line a run."""
        runs = ",\n".join("    " + json.dumps(r) for r in self.all["runs"])
        rest = json.dumps({k: v for k, v in self.all.items() if k != "runs"}, indent=2)
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(f'{rest[:-2]},\n  "runs": [\n{runs}\n  ]\n}}\n')


def tune(method: str, results: Results) -> float:
    """The rate of the least mean loss, with a worse one tried on both sides of it."""
    rates = list(FIRST[method])
    while True:
        best = min(rates, key=lambda lr: results.mean(method, lr))
        if min(rates) < best < max(rates):
            return best
        rates.append(SERIES[SERIES.index(best) + (1 if best == max(rates) else -1)])


def main() -> None:
    results = Results()
    for method in FIRST:
        results.all["chosen"][method] = tune(method, results)
        results.save()
    for method, lr in results.all["chosen"].items():
        print(f"{method}: {lr:g}, held-out loss {results.mean(method, lr):.4f}")


if __name__ == "__main__":
    main()
