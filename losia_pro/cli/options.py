"""What the flags of ``losia-pro finetune`` are without being given, and what they resolve to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from losia_pro import LosiaConfig

from .errors import CliError
from .values import file_path

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SCHEDULERS = {  # our name: Trainer's name and arguments
    "cosine": (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.1},
    ),  # to a tenth of the peak, as in the paper
    "linear": ("linear", {}),
    "constant": ("constant_with_warmup", {}),
}

SUBNETS = (  # flags that are LosiaConfig's fields
    "impl", "rank_factor", "in_factor", "out_factor", "output_factor", "neuron_group", "share_inputs", "subnet_dtype",
    "period", "base_decay", "target_modules", "init", "seed",
)  # fmt: skip
RATE_POWER = -0.84  # of the share trained, by the searches of benchmarks/results/quality-26m.json
DEFAULTS: dict[str, Any] = {
    "recipe": None,
    "tasks": [],  # that the recipe names, for losia-pro evaluate
    "model": None,
    "data": None,
    "subset": None,
    "prompt": None,
    "response": None,
    "eval_data": None,
    "split": "train",
    "eval_split": None,
    "eval_limit": 500,
    "max_length": None,
    "method": "losia-pro",
    "compare": [],
    "epochs": 3.0,
    "steps": None,
    "batch_size": 8,
    "accumulation": 1,
    # Starting points from published recipes, not tuned by us: set --lr for your model and data. Of subnets: _rate.
    "lr": {"lora": 2e-4, "full": 2e-5},
    "scheduler": "cosine",
    "warmup": 0.1,
    "weight_decay": 0.0,
    "clip": 1.0,
    "eval_steps": None,
    "device": "auto",
    "precision": "auto",
    "checkpointing": False,
    "compile": False,
    **{name: getattr(LosiaConfig(), name) for name in SUBNETS},
    "calibration_batches": 4,
    "lora_rank": None,
    "lora_alpha": None,
    "output": None,
    "save_steps": 500,
    "overwrite": False,
}

# The example (no --model, no --data).
JOB: dict[str, Any] = {
    "compare": ["lora", "full"],
    "epochs": None,
    "steps": 200,
    "batch_size": 16,
    "max_length": 512,
    # Tuned by benchmarks/tune_example.py: see its results/example-learning-rates.json. losia computes
    # the same updates as losia-pro.
    "lr": {"losia-pro": 5e-3, "losia": 5e-3, "lora": 5e-3, "full": 2e-4},
}
JOB_MODEL, JOB_DATA = "tiny-llama", "rst-to-markdown"  # under examples/ of a checkout
JOB_SAYS = "A small Llama that knows reStructuredText learns to turn it into Markdown."


def resolve(given: dict[str, Any]) -> argparse.Namespace:
    """Fill in what was not given.

    Raises:
        CliError: flags that contradict each other; no checkout that holds the example.
    """
    options = dict(DEFAULTS)
    if ("model" in given) != ("data" in given):
        one, other = ("data", "model") if "data" in given else ("model", "data")
        if "recipe" in given:
            what = "a folder or a hub id" if other == "model" else "the recipe names none"
            raise CliError(f"--recipe {given['recipe']} needs --{other} too: {what}")
        raise CliError(f"--{one} needs --{other} too; without both, the example runs")
    if "model" not in given:
        options.update(JOB, **_embedded())
    if "steps" in given and "epochs" in given:
        raise CliError("give --steps or --epochs, not both")
    lr = {**options["lr"], **given.get("lr", {})}
    if "epochs" in given:
        options["steps"] = None
    options.update(given, lr=lr)
    try:
        config = LosiaConfig(**{name: options[name] for name in SUBNETS})
        rate = _rate(lr["full"], config)
    except ValueError as error:
        raise CliError(str(error)) from error
    options["lr"] = {"losia-pro": rate, "losia": rate, **lr}
    options["compare"] = [m for m in options["compare"] if m != options["method"]]
    for name in ("model", "data", "eval_data", "output"):
        if options[name] and file_path(options[name]).exists():
            options[name] = str(file_path(options[name]).resolve())
    return argparse.Namespace(**options)


def share(config: LosiaConfig) -> float:
    """Of a wide linear's weights, those in its subnet."""
    wide = 4096  # what is lost by rounding to whole neurons does not count there
    return config.n_in(wide) * config.n_out(wide) / wide**2


def _rate(full: float, config: LosiaConfig) -> float:
    """Where to begin with subnets: full fine-tuning's rate times their share to a power, in two digits."""
    return float(f"{full * share(config) ** RATE_POWER:.1e}")


def _embedded() -> dict[str, str]:
    import losia_pro

    for root in (Path(losia_pro.__file__).resolve().parents[1], Path.cwd()):
        model, data = root / "examples" / JOB_MODEL, root / "examples" / JOB_DATA
        if model.is_dir() and data.is_dir():
            return {"model": str(model), "data": str(data)}
    raise CliError(
        f"the example needs examples/{JOB_MODEL} and examples/{JOB_DATA}, which are in the "
        "repository and not in the installed package: run inside a checkout, or give --model and --data"
    )


def differing(given: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """Given flags that contradict those of a recorded run, each as a sentence's part."""
    found = []
    for name, value in given.items():
        before = recorded.get(name)
        same = json.loads(json.dumps(value)) == before
        if name == "lr":
            same = all((before or {}).get(m) == rate for m, rate in value.items())
        elif name in ("model", "data", "eval_data") and value and before:
            same = same or str(file_path(value).resolve()) == before
        if not same:
            found.append(f"--{name.replace('_', '-')} was {before}, now {value}")
    return found
