"""The flags of ``losia-pro finetune``, their defaults, and what they resolve to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import values
from .errors import CliError
from .values import METHODS

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SCHEDULERS = {  # our name: Trainer's name and arguments
    "cosine": (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.1},
    ),  # to a tenth of the peak, as in the paper
    "linear": ("linear", {}),
    "constant": ("constant_with_warmup", {}),
}

DEFAULTS: dict[str, Any] = {
    "model": None,
    "data": None,
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
    # Starting points from published recipes, not tuned by us: set --lr for your model and data.
    "lr": {"losia-pro": 2e-4, "losia": 2e-4, "lora": 2e-4, "full": 2e-5},
    "scheduler": "cosine",
    "warmup": 0.1,
    "weight_decay": 0.0,
    "clip": 1.0,
    "seed": 0,
    "eval_steps": None,
    "device": "auto",
    "precision": "auto",
    "checkpointing": False,
    "compile": False,
    "impl": None,
    "rank_factor": 1 / 8,
    "in_factor": None,
    "out_factor": None,
    "output_factor": 0.0,
    "period": 100,
    "target_modules": None,
    "init": "random",
    "calibration_batches": 4,
    "lora_rank": None,
    "lora_alpha": None,
    "output": None,
    "save_steps": 500,
    "overwrite": False,
}

# The embedded job (no --model, no --data).
JOB: dict[str, Any] = {
    "compare": ["lora", "full"],
    "epochs": None,
    "steps": 200,
    "batch_size": 16,
    "max_length": 512,
    "lr": {"losia-pro": 1e-2, "losia": 1e-2, "lora": 3e-3, "full": 1e-3},
    "period": 20,
}
JOB_MODEL, JOB_DATA = "tiny-llama", "rst-to-markdown"  # under examples/ of a checkout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags default to SUPPRESS: what is not given is absent, and ``resolve`` fills it in."""
    d, parser.argument_default = DEFAULTS, argparse.SUPPRESS

    def group(title: str) -> Any:
        return parser.add_argument_group(title)

    g = group("model and data (without both: the embedded job)")
    g.add_argument("--model", metavar="PATH|ID", help="a causal language model: folder or hub id")
    g.add_argument(
        "--data",
        metavar="PATH|NAME",
        help="JSONL (prompt/response, messages or text), a text file, a folder or a dataset's name",
    )
    g.add_argument("--split", help=f"of a folder or dataset (default: {d['split']})")
    g.add_argument("--eval-data", metavar="PATH|NAME", help="held-out data of its own")
    g.add_argument(
        "--eval-split",
        metavar="NAME|SHARE",
        help="held-out split, or share of the data such as 0.1 (default: a test or validation split "
        "if there is one, else 0.05)",
    )
    g.add_argument(
        "--eval-limit",
        type=values.count,
        help=f"held-out examples at most (default: {d['eval_limit']})",
    )
    g.add_argument(
        "--max-length",
        type=values.count,
        help="tokens of an example (default: 1024, or what the model reads if that is less)",
    )

    g = group("method")
    g.add_argument("--method", choices=METHODS, help=f"(default: {d['method']})")
    g.add_argument(
        "--compare",
        type=values.methods,
        metavar="METHOD,...",
        help="also train these from the same start on the same batches, for the table; 'none' for none",
    )
    g.add_argument(
        "--rank-factor", type=float, help="p: share of neurons in a subnet (default: 1/8)"
    )
    g.add_argument("--in-factor", type=float, help="share of the inputs, instead of p")
    g.add_argument("--out-factor", type=float, help="share of the outputs, instead of p")
    g.add_argument(
        "--output-factor", type=float, help="share of the output head that is trained (default: 0)"
    )
    g.add_argument(
        "--period",
        type=values.count_or_none,
        metavar="STEPS",
        help=f"steps between re-selections; 'none' for fixed subnets (default: {d['period']})",
    )
    g.add_argument(
        "--target-modules",
        type=values.names,
        metavar="NAME,...",
        help="linears to tune, as PEFT names them (default: all in the repeated blocks)",
    )
    g.add_argument(
        "--init", choices=("random", "calibrate"), help="first subnets (default: random)"
    )
    g.add_argument(
        "--calibration-batches",
        type=values.count,
        help=f"for --init calibrate (default: {d['calibration_batches']})",
    )
    g.add_argument(
        "--impl", choices=("torch", "triton", "cuda"), help="kernels (default: the best)"
    )
    g.add_argument(
        "--lora-rank",
        type=values.count,
        help="(default: hidden size / 64, which is 64 where the hidden size is 4096)",
    )
    g.add_argument("--lora-alpha", type=values.positive, help="(default: twice the rank)")

    g = group("training")
    g.add_argument("--epochs", type=values.positive, help=f"(default: {d['epochs']:g})")
    g.add_argument("--steps", type=values.count, help="optimizer steps, instead of --epochs")
    g.add_argument("--batch-size", type=values.count, help=f"(default: {d['batch_size']})")
    g.add_argument(
        "--accumulation",
        type=values.count,
        help=f"batches an optimizer step (default: {d['accumulation']})",
    )
    g.add_argument(
        "--lr",
        type=values.learning_rates,
        metavar="LR|METHOD=LR,...",
        help="for all methods or by method, e.g. 1e-3 or lora=3e-3,full=1e-3 (default: "
        + ", ".join(f"{m}={lr:g}" for m, lr in d["lr"].items())
        + ")",
    )
    g.add_argument("--scheduler", choices=tuple(SCHEDULERS), help=f"(default: {d['scheduler']})")
    g.add_argument(
        "--warmup",
        type=values.not_negative,
        help=f"steps, or a share below 1 (default: {d['warmup']})",
    )
    g.add_argument(
        "--weight-decay", type=values.not_negative, help=f"(default: {d['weight_decay']:g})"
    )
    g.add_argument(
        "--clip", type=values.positive, help=f"gradient norm at most (default: {d['clip']:g})"
    )
    g.add_argument("--seed", type=int, help=f"(default: {d['seed']})")
    g.add_argument(
        "--eval-steps", type=values.count, help="steps between held-out losses (default: a tenth)"
    )

    g = group("speed and memory")
    g.add_argument("--device", choices=("auto", "cuda", "cpu"), help="(default: auto)")
    g.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="auto: bf16 on a GPU that has it, else fp32 (default: auto)",
    )
    g.add_argument(
        "--checkpointing", action="store_true", help="recompute activations: less memory, slower"
    )
    g.add_argument("--compile", action="store_true", help="torch.compile each block")

    g = group("output")
    g.add_argument("--output", metavar="DIR", help="(default: runs/NAME, a new folder each time)")
    g.add_argument(
        "--save-steps",
        type=values.count_or_none,
        metavar="STEPS",
        help=f"steps between checkpoints, or 'none' (default: {d['save_steps']}); Ctrl-C saves one too",
    )
    g.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    g.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="DIR",
        help="continue the interrupted run in DIR (or --output), with its arguments",
    )


def resolve(given: dict[str, Any]) -> argparse.Namespace:
    """Fill in what was not given.

    Raises:
        CliError: flags that contradict each other; no checkout that holds the embedded job.
    """
    options = dict(DEFAULTS)
    if ("model" in given) != ("data" in given):
        one, other = ("data", "model") if "data" in given else ("model", "data")
        raise CliError(f"--{one} needs --{other} too; without both, the embedded job runs")
    if "model" not in given:
        options.update(JOB, **_embedded())
    if "steps" in given and "epochs" in given:
        raise CliError("give --steps or --epochs, not both")
    lr = {**options["lr"], **given.get("lr", {})}
    if "epochs" in given:
        options["steps"] = None
    options.update(given, lr=lr)
    options["compare"] = [m for m in options["compare"] if m != options["method"]]
    for name in ("model", "data", "eval_data", "output"):
        if options[name] and Path(options[name]).expanduser().exists():
            options[name] = str(Path(options[name]).expanduser().resolve())
    return argparse.Namespace(**options)


def _embedded() -> dict[str, str]:
    import losia_pro

    for root in (Path(losia_pro.__file__).resolve().parents[1], Path.cwd()):
        model, data = root / "examples" / JOB_MODEL, root / "examples" / JOB_DATA
        if model.is_dir() and data.is_dir():
            return {"model": str(model), "data": str(data)}
    raise CliError(
        f"the embedded job needs examples/{JOB_MODEL} and examples/{JOB_DATA}, which are in the "
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
            same = same or str(Path(value).expanduser().resolve()) == before
        if not same:
            found.append(f"--{name.replace('_', '-')} was {before}, now {value}")
    return found
