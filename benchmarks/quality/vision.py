"""Beyond language: a small vision transformer learns to read digits that are turned and inverted.

    python -m benchmarks.quality.vision

The images are scikit-learn's ``load_digits`` (1797 of 8 x 8 pixels). For each seed a transformer is pretrained on some
of the first 1347 as they are, then tuned to others of them, turned by 90 degrees and inverted, by each method; the
rest of them judge learning rates. The last 450 are the test, in both forms: *new* are the turned
ones, *old* the upright ones, whose loss tells what was forgotten. Each method's learning rate is the best of a series
on its own seeds, with worse ones on both sides. Writes every run as a line of JSON, and prints the table.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losia_pro
from losia_pro.cli.bench import device
from losia_pro.discover import find_targets

RESULT = Path(__file__).parent.parent / "results" / "vision-digits.json"
SERIES = [float(f"{digit}e{power}") for power in range(-5, 0) for digit in (1, 2, 5)]
FIRST = {
    "full": (1e-3, 2e-3, 5e-3),
    "lora": (2e-3, 5e-3, 1e-2),
    "losia-pro": (1e-2, 2e-2, 5e-2),
    "losia-pro, fixed": (1e-2, 2e-2, 5e-2),
}
BATCH, CLIP, PRETRAIN_LR = 32, 1.0, 2e-3
N_PRETRAIN, N_TUNE, N_TEST = 700, 400, 450  # the rest, 247, judge learning rates
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 2, "num_channels": 1, "num_labels": 10, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LORA_RANK, RANK_FACTOR, PERIOD = 2, 1 / 4, 10
NOT_SHOWN = [
    "one small model, one small task: nothing about large vision transformers",
    "the head stays frozen but in full fine-tuning",
    "one size of LoRA and one of the subnets, about equal; one period",
]

Data = tuple[Tensor, Tensor]


@functools.cache
def load() -> Data:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(found.target)


def digits(seed: int) -> dict[str, Data]:
    """``(images, labels)`` of each part; images are ``(N, 1, 8, 8)`` in [-1, 1]."""
    images, labels = load()
    new = -torch.rot90(images, 1, (2, 3))
    n = len(labels) - N_TEST
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    pretrain, tune, judge = order.tensor_split((N_PRETRAIN, N_PRETRAIN + N_TUNE))
    return {
        "pretrain": (images[pretrain], labels[pretrain]),
        "tune": (new[tune], labels[tune]),
        "judge": (new[judge], labels[judge]),
        "new": (new[n:], labels[n:]),
        "old": (images[n:], labels[n:]),
    }


def transformer() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SIZES))


def train(
    model: Any,
    parameters: list[nn.Parameter],
    data: Data,
    steps: int,
    lr: float,
    seed: int,
    bind: Callable[[torch.optim.Optimizer], None] | None = None,
) -> None:
    """AdamW, gradients clipped, a tenth of warm-up, then linearly to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    if bind is not None:
        bind(optimizer)
    warmup = max(1, steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, (steps - t) / (steps - warmup + 1))
    )
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(pixel_values=images[batch]).logits, labels[batch])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def score(model: Any, data: Data) -> dict[str, float]:
    images, labels = data
    logits = model(pixel_values=images).logits
    right = (logits.argmax(1) == labels).float().mean()
    return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(right)}


def pretrain(seed: int, steps: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A base model's weights, and what it can do."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, data = transformer(), digits(seed)
    train(model, list(model.parameters()), data["pretrain"], steps, PRETRAIN_LR, seed)
    return model.state_dict(), {part: score(model, data[part]) for part in ("new", "old")}


def tune(job: dict[str, Any], base: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """One run: ``job``'s method, learning rate and seed; its figures are added to it."""
    torch.set_num_threads(1)
    method, lr, seed = job["method"], job["lr"], job["seed"]
    model, data = transformer(), digits(seed)
    model.load_state_dict(base)
    torch.manual_seed(seed)
    bind = None
    if method == "full":
        parameters = list(model.parameters())
    elif method == "lora":
        model = with_lora(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
    else:
        config = losia_pro.LosiaConfig(
            rank_factor=RANK_FACTOR,
            period=None if "fixed" in method else PERIOD,
            base_decay=0,
            seed=seed,
        )
        losia = losia_pro.attach(model, config)
        parameters, bind = losia.parameters(), losia.bind
    train(model, parameters, data["tune"], steps, lr, seed, bind)
    scores = {part: score(model, data[part]) for part in ("judge", "new", "old")}
    return {**job, "trainable": sum(p.numel() for p in parameters), **scores}


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = find_targets(model, losia_pro.LosiaConfig())
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(targets.linears))
    with warnings.catch_warnings():  # PEFT asks transformers for a name that has since changed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, config)


def best_rate(first: Iterable[float], loss_at: Callable[[float], float]) -> tuple[float, bool]:
    """The rate of least loss in the series, and whether worse ones were tried on both sides of it."""
    rates = sorted(first)
    while True:
        best = min(rates, key=loss_at)
        at = SERIES.index(best)
        if min(rates) < best < max(rates):
            return best, True
        neighbour = at + (1 if best == max(rates) else -1)
        if not 0 <= neighbour < len(SERIES):
            return best, False
        rates.append(SERIES[neighbour])


def summary(runs: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """Mean and standard error over the seeds, and LoRA's excess of the new loss, seed by seed."""
    mine = {r["seed"]: r for r in runs if r["method"] == method}
    lora = {r["seed"]: r for r in runs if r["method"] == "lora"}
    row: dict[str, Any] = {"trainable": next(iter(mine.values()))["trainable"]}
    for part in ("new", "old"):
        for figure in ("loss", "accuracy"):
            row[f"{part} {figure}"] = mean_and_error([r[part][figure] for r in mine.values()])
    gains = [lora[s]["new"]["loss"] - r["new"]["loss"] for s, r in mine.items()]
    row["lora's new loss minus this"] = mean_and_error(gains)
    return row


def mean_and_error(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.mean(values), "standard_error": error}


class Study:
    """The runs so far, and the file."""

    def __init__(self, args: argparse.Namespace, pool: ProcessPoolExecutor | None) -> None:
        self.args, self.map = args, map if pool is None else pool.map
        self.tuning = list(range(args.seeds, args.seeds + args.tuning_seeds))
        seeds = [*range(args.seeds), *self.tuning]
        bases = list(self.map(pretrain, seeds, [args.pretrain_steps] * len(seeds)))
        self.bases = dict(zip(seeds, (weights for weights, _ in bases), strict=True))
        self.content: dict[str, Any] = {
            "benchmark": "vision-digits",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "arguments": {k: v for k, v in vars(args).items() if k not in ("output", "jobs")},
            "settings": {"model": SIZES, "batch": BATCH, "clip": CLIP, "lora_rank": LORA_RANK,
                         "rank_factor": RANK_FACTOR, "period": PERIOD, "pretrain_lr": PRETRAIN_LR},
            "device": device.describe(torch.device("cpu")),
            "versions": {p: version(p) for p in ("torch", "transformers", "peft", "scikit-learn")},
            "not_shown": NOT_SHOWN,
            "base": {part: {figure: mean_and_error([s[part][figure] for _, s in bases[: args.seeds]])
                            for figure in ("loss", "accuracy")} for part in ("new", "old")},
            "chosen": {}, "methods": {}, "runs": [],
        }  # fmt: skip

    def run(self, method: str, lr: float, seeds: list[int]) -> list[dict[str, Any]]:
        """One run a seed, unless it was made before."""
        made = [r for r in self.content["runs"] if (r["method"], r["lr"]) == (method, lr)]
        missing = [s for s in seeds if s not in {r["seed"] for r in made}]
        jobs = [{"method": method, "lr": lr, "seed": s} for s in missing]
        steps = [self.args.steps] * len(jobs)
        new = list(self.map(tune, jobs, [self.bases[s] for s in missing], steps))
        self.content["runs"] += new
        return [r for r in made + new if r["seed"] in seeds]

    def judged(self, method: str, lr: float) -> float:
        return statistics.mean(r["judge"]["loss"] for r in self.run(method, lr, self.tuning))

    def all(self) -> dict[str, Any]:
        final: list[dict[str, Any]] = []
        for method, first in FIRST.items():
            lr, interior = best_rate(first, lambda lr, method=method: self.judged(method, lr))
            self.content["chosen"][method] = {"lr": lr, "interior": interior}
            final += self.run(method, lr, list(range(self.args.seeds)))
        self.content["methods"] = {method: summary(final, method) for method in FIRST}
        return self.content

    def save(self, path: Path) -> None:
        """One line a run."""
        runs = ",\n".join("    " + json.dumps(r) for r in self.content["runs"])
        rest = json.dumps({k: v for k, v in self.content.items() if k != "runs"}, indent=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{rest[:-2]},\n  "runs": [\n{runs}\n  ]\n}}\n')


def table(content: dict[str, Any]) -> str:
    def say(value: dict[str, float]) -> str:
        return f"{value['mean']:.3f} ± {value['standard_error']:.3f}"

    keys = ("new loss", "new accuracy", "old loss", "old accuracy")
    lines = [["", "trainable", "lr", *keys, "lora's new loss minus this"]]
    base = {f"{part} {figure}": v for part, of in content["base"].items() for figure, v in of.items()}  # fmt: skip
    lines.append(["base", "", "", *[say(base[k]) for k in keys], ""])
    for method, row in content["methods"].items():
        lr = content["chosen"][method]["lr"]
        figures = [say(row[k]) for k in (*keys, "lora's new loss minus this")]
        lines.append([method, f"{row['trainable']:,}", f"{lr:g}", *figures])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in lines)


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser("python -m benchmarks.quality.vision", description=__doc__)
    p.add_argument("--seeds", type=int, default=6, help="of the table; default 6")
    p.add_argument("--tuning-seeds", type=int, default=3, help="of the learning rates; default 3")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--pretrain-steps", type=int, default=500)
    p.add_argument("--jobs", type=int, default=2, help="processes, one thread each; default 2")
    p.add_argument("--output", type=Path, default=RESULT)
    args = p.parse_args(arguments)
    if args.jobs > 1:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            study = Study(args, pool)
            study.all()
    else:
        study = Study(args, None)
        study.all()
    study.save(args.output)
    print(table(study.content))


if __name__ == "__main__":
    main()
