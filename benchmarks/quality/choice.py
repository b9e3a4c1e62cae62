"""Which targets a command tunes to: those it names, or the first of ``ORDER`` that this machine has enough text for."""

from __future__ import annotations

import argparse
from collections.abc import Container, Sequence

from losia_pro.cli.errors import CliError
from losia_pro.cli.values import names

from .settings import TARGETS

ORDER = ("cpp", "order", "docs", "parens", "config", "signature", "imports", "man", "perl", "stubs")


def wanted(args: argparse.Namespace) -> tuple[Sequence[str], int]:
    """Targets to look for, and how many of them are enough.

    Raises:
        CliError: a name that means nothing.
    """
    asked = args.targets or str(TARGETS[args.size])
    if asked == "all" or asked.isdigit():
        return ORDER, len(ORDER) if asked == "all" else int(asked)
    for name in names(asked):
        if name not in ORDER:
            raise CliError(f"--targets {name}: is none of {', '.join(ORDER)}")
    return names(asked), len(names(asked))


def targets(args: argparse.Namespace, domains: Container[str]) -> list[str]:
    """Of those that ``domains`` has.

    Raises:
        CliError: it lacks one that was named.
    """
    order, most = wanted(args)
    if order is not ORDER:
        for name in order:
            if name not in domains:
                raise CliError(f"--targets {name}: this machine has too little text for it")
    return [t for t in order if t in domains][:most]
