"""The command line: ``losia-pro``, also as ``python -m losia_pro``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .errors import CliError, let_the_first_speak

COMMANDS = {  # module of this package: what it does. Imported only when it is called.
    "finetune": "fine-tune a causal language model",
    "recipes": "list data and settings that finetune --recipe takes, or show one",
    "evaluate": "score a model on tasks of lm-evaluation-harness",
    "merge": "make the tuned model of its base and a delta",
    "inspect": "show what a delta holds",
    "bench": "measure the kernels, a training step, and its memory",
    "tune": "measure the kernels' launch shapes on this GPU, and keep the fastest",
    "doctor": "show versions, devices, and which implementation each operation uses",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0, 2 for an error of the user's, 130 after Ctrl-C, 1 where nobody
    reads what is printed (``| head``)."""
    try:
        try:
            return _main(argv)
        except KeyboardInterrupt:
            return 130
        finally:
            print(end="", flush=True)  # what a closed pipe raises, it raises here
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # what Python flushes at exit
        return 1


def _main(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(prog="losia-pro", description="Fine-tune subnets of a model's linear layers.")
    from losia_pro import __version__

    parser.add_argument("--version", action="version", version=f"losia-pro {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary)
        if name in argv:
            module = importlib.import_module(f"{__name__}.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except CliError as error:
        let_the_first_speak()
        red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        print(f"\033[31merror: {error}\033[0m" if red else f"error: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        let_the_first_speak()
        super().error(message)
