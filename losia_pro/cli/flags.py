"""The flags of ``losia-pro finetune``."""

from __future__ import annotations

import argparse
from typing import Any

from . import values
from .options import DEFAULTS, PRECISIONS, RATE_POWER, SCHEDULERS
from .values import METHODS

EXAMPLES = """\
examples:
  losia-pro finetune                                  the example: a small Llama, a small task, minutes
  losia-pro finetune --model DIR --data my.jsonl --lr 1e-4
  losia-pro finetune --model DIR --data my.jsonl --compare lora,full --lr losia-pro=2e-4,full=2e-5
  losia-pro finetune --recipe metamathqa --model DIR  data and settings of the paper
  losia-pro finetune --resume runs/my-losia-pro       after Ctrl-C
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags default to SUPPRESS: what is not given is absent, and ``resolve`` fills it in."""
    d, parser.argument_default = DEFAULTS, argparse.SUPPRESS
    parser.usage = "losia-pro finetune [--model PATH|ID --data PATH|NAME] [flag ...]"
    parser.description = (
        "Fine-tune a causal language model, beside other methods if asked to. Without --model and --data, "
        "run the example."
    )
    parser.epilog = EXAMPLES
    parser.formatter_class = _Help

    def group(title: str) -> Any:
        return parser.add_argument_group(title)

    g = group("model and data")
    g.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="data and settings from a file; flags given here come first (losia-pro recipes lists them)",
    )
    g.add_argument("--model", metavar="PATH|ID", help="folder or hub id of a causal language model")
    g.add_argument(
        "--data",
        metavar="PATH|NAME",
        help="JSONL (prompt/response, messages or text), a text file, a folder, or a dataset on the hub",
    )
    g.add_argument(
        "--subset", metavar="NAME", help="of a dataset that has several, e.g. ARC-Challenge"
    )
    g.add_argument(
        "--prompt",
        metavar="TEMPLATE",
        help="with --response, for records of other fields: Jinja, e.g. 'Q: {{ question }} A:'",
    )
    g.add_argument(
        "--response",
        metavar="TEMPLATE",
        help="what is trained, e.g. ' {{ answer }}'; a record for which it is empty is left out",
    )
    g.add_argument(
        "--split", metavar="NAME", help=f"of a folder or dataset (default: {d['split']})"
    )
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
        metavar="N",
        help=f"held-out examples at most (default: {d['eval_limit']})",
    )
    g.add_argument(
        "--max-length",
        type=values.count,
        metavar="TOKENS",
        help="of an example (default: 1024, or what the model reads if that is less)",
    )

    g = group("method")
    g.add_argument(
        "--method",
        choices=METHODS,
        help="losia-pro: subnets (default); losia: the same from full gradients, slower; lora; full: all "
        "weights",
    )
    g.add_argument(
        "--compare",
        type=values.methods,
        metavar="METHOD,...",
        help="also train these from the same start on the same batches, for the table; 'none' for none",
    )
    g.add_argument(
        "--rank-factor",
        type=values.share,
        metavar="SHARE",
        help="p: of the inputs and of the outputs in a subnet (default: see the two that follow)",
    )
    g.add_argument(
        "--in-factor",
        type=values.share,
        metavar="SHARE",
        help="of the inputs (default: p, or 3/32)",
    )
    g.add_argument(
        "--out-factor",
        type=values.share,
        metavar="SHARE",
        help="of the outputs (default: p, or all)",
    )
    g.add_argument(
        "--output-factor",
        type=values.share,
        metavar="SHARE",
        help="of the output head's outputs (default: 0, not trained)",
    )
    g.add_argument(
        "--neuron-group",
        type=values.count,
        metavar="N",
        help="choose neurons in aligned runs of N, which a GPU reads faster (default: 16 inputs in layers of 512 or "
        "more if none of --rank-factor, --in-factor, --out-factor is given, else 1)",
    )
    g.add_argument(
        "--share-inputs",
        action="store_true",
        help="one choice of inputs for linears that read the same (q, k, v; gate, up): less memory",
    )
    g.add_argument(
        "--subnet-dtype",
        choices=("bfloat16",),
        help="of subnets, their gradients and the optimizer's state, rounded stochastically: half the memory, of bf16 "
        "models (default: fp32)",
    )
    g.add_argument(
        "--period",
        type=values.count_or_none,
        metavar="STEPS",
        help="between re-selections; 'none' for fixed subnets (default: none)",
    )
    g.add_argument(
        "--base-decay",
        type=float,
        metavar="RATE",
        help=f"weight decay of the subnets towards the base model (default: {d['base_decay']})",
    )
    g.add_argument(
        "--target-modules",
        type=values.modules,
        metavar="NAME,...",
        help="linears to tune, as PEFT names them: names, a regular expression, or all-linear (default: all in the "
        "repeated blocks)",
    )
    g.add_argument(
        "--init",
        choices=("random", "calibrate"),
        help="first subnets: random (default), or by their importance in a few batches",
    )
    g.add_argument(
        "--calibration-batches",
        type=values.count,
        metavar="N",
        help=f"for --init calibrate (default: {d['calibration_batches']})",
    )
    g.add_argument(
        "--impl",
        choices=("torch", "triton", "cuda"),
        help="kernels (default: see losia-pro doctor)",
    )
    g.add_argument(
        "--lora-rank",
        type=values.count,
        metavar="N",
        help="(default: hidden size / 64, which is 64 where the hidden size is 4096)",
    )
    g.add_argument(
        "--lora-alpha", type=values.positive, metavar="X", help="(default: twice the rank)"
    )

    g = group("training")
    g.add_argument(
        "--epochs", type=values.positive, metavar="N", help=f"(default: {d['epochs']:g})"
    )
    g.add_argument(
        "--steps", type=values.count, metavar="N", help="optimizer steps, instead of --epochs"
    )
    g.add_argument(
        "--batch-size",
        type=values.count,
        metavar="N",
        help=f"of each process, if torchrun starts several (default: {d['batch_size']})",
    )
    g.add_argument(
        "--accumulation",
        type=values.count,
        metavar="N",
        help=f"batches an optimizer step (default: {d['accumulation']})",
    )
    g.add_argument(
        "--lr",
        type=values.learning_rates,
        metavar="LR|METHOD=LR,...",
        help="for all methods or by method, e.g. 1e-3 or lora=3e-3,full=1e-3 (default: "
        + ", ".join(f"{m}={lr:g}" for m, lr in d["lr"].items())
        + f", of subnets full's times the trained share to the power of {RATE_POWER}; starting points, not tuned for "
        "your model)",
    )
    g.add_argument("--scheduler", choices=tuple(SCHEDULERS), help=f"(default: {d['scheduler']})")
    g.add_argument(
        "--warmup",
        type=values.not_negative,
        metavar="STEPS|SHARE",
        help=f"a share if below 1 (default: {d['warmup']})",
    )
    g.add_argument(
        "--weight-decay",
        type=values.not_negative,
        metavar="X",
        help=f"(default: {d['weight_decay']:g})",
    )
    g.add_argument(
        "--clip",
        type=values.positive,
        metavar="NORM",
        help=f"of the gradient, at most (default: {d['clip']:g})",
    )
    g.add_argument("--seed", type=values.seed, metavar="N", help=f"(default: {d['seed']})")
    g.add_argument(
        "--eval-steps",
        type=values.count,
        metavar="STEPS",
        help="between held-out losses (default: a tenth of the run)",
    )

    g = group("speed and memory")
    g.add_argument("--device", choices=("auto", "cuda", "cpu"), help="(default: auto)")
    g.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="auto (default): bf16 on a GPU that has it, else fp32",
    )
    g.add_argument(
        "--checkpointing", action="store_true", help="recompute activations: less memory, slower"
    )
    g.add_argument("--compile", action="store_true", help="torch.compile each block")

    g = group("output")
    g.add_argument(
        "--output",
        metavar="DIR",
        help="(default: runs/DATA-METHOD, a new folder each time)",
    )
    g.add_argument(
        "--save-steps",
        type=values.count_or_none,
        metavar="STEPS",
        help=f"between checkpoints, or 'none' (default: {d['save_steps']}); Ctrl-C saves one too",
    )
    g.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    g.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="DIR",
        help="continue the interrupted run in DIR (or --output), with its arguments",
    )


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the examples, and fills the description."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text == EXAMPLES:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)
