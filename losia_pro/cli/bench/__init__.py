"""``losia-pro bench``: how fast the kernels and a training step are, and where the memory goes.

    losia-pro bench kernels                              each operation against plain PyTorch and least traffic
    losia-pro bench step --model llama2-7b               a training step of each method over the frozen floor
    losia-pro bench memory --model llama2-7b             peak memory by component

Each checks the answer before it times it, measures the peers in the same run, prints a table with ratios and
what it does not show, and rewrites a JSON file as it goes, so that a run that is stopped keeps what it had.
With ``--device cpu`` all three run at toy size in seconds.
"""

from __future__ import annotations

import argparse
import importlib

COMMANDS = {
    "kernels": "each operation against plain PyTorch and the device's least-traffic time",
    "step": "a training step of each method over the floor: the frozen network's forward and backward",
    "memory": "peak memory of a training step by component",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"{__name__}.{name}")
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(benchmark_run=module.run)


def run(args: argparse.Namespace) -> int:
    return int(args.benchmark_run(args))
