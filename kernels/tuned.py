"""Launch shapes that were measured on a device, by `losia-pro tune`; where there are none, a kernel's rule decides.

A table is a JSON file: a header that says for what it was measured, and a row for each operation, dtype and sizes.
Two are read, once for each device: one that may lie beside this file for a family of devices, ``tiles-sm_90.json``,
and over it the user's own, in the cache directory, for a device's name and a version of Triton.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from .tiles import Tiles

FORMAT = 4  # raised where a kernel changes so that what was measured before says nothing
SHIPPED = Path(__file__).parent
SIZES = {  # what decides an operation's launch shape beside the dtype
    "gather_columns": ("chosen", "run"),
    "subnet_grad": ("n_out", "n_in", "run"),  # a run of n_out: all columns
    "importance_update_": ("out", "in"),
}

Key = tuple[Any, ...]  # operation, dtype, sizes
Row = dict[str, Any]


def path(device: torch.device) -> Path:
    """The user's table for a device, in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    words = header(device)
    name = f"{words['device']} {words['capability']} triton {words['triton']}".lower()
    return Path(cache, "losia-pro", f"tiles-{re.sub(r'[^a-z0-9.]+', '-', name)}.json")


def header(device: torch.device) -> Row:
    """What a table has to be measured for to be used on ``device``."""
    name, capability = "interpreter", (0, 0)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
    return {
        "format": FORMAT,
        "device": name,
        "capability": "{}.{}".format(*capability),
        "triton": triton.__version__,
    }


@functools.cache
def table(device: torch.device) -> dict[Key, tuple[int, ...]]:
    """The measured launch shapes for ``device``; a file that is not as it has to be is left out, with a warning."""
    wanted = header(device)
    family = {name: wanted[name] for name in ("format", "capability")}
    shipped = SHIPPED / f"tiles-sm_{wanted['capability'].replace('.', '')}.json"
    found: dict[Key, tuple[int, ...]] = {}
    for file, of in ((shipped, family), (path(device), wanted)):
        try:
            found |= {key(row): tiles(row) for row in read(file, of)}
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            warnings.warn(
                f"losia_pro: {file} is not used: {error}; `losia-pro tune` makes a new one",
                RuntimeWarning,
                stacklevel=2,
            )
    return found


def read(file: Path, of: Row) -> list[Row]:
    """A table's rows.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table, or was not measured for ``of``.
    """
    content = json.loads(file.read_text())
    try:
        for name, value in of.items():
            if content[name] != value:
                raise ValueError(f"{name} is {content[name]!r} where {value!r} is needed")
        rows: list[Row] = content["rows"]
        for row in rows:
            key(row), tiles(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return rows


def write(file: Path, of: Row, rows: list[Row]) -> None:
    """A table, whole or not at all, a row a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in of.items())
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(f'{{\n{head} "rows": [\n{lines}\n ]\n}}\n')
    partial.replace(file)


def key(row: Row) -> Key:
    """What a row is for."""
    dtype = getattr(torch, row["dtype"])
    return row["op"], dtype, *(row[name] for name in SIZES[row["op"]])


def tiles(row: Row) -> tuple[int, ...]:
    """A row's launch shape.

    Raises:
        ValueError: it is none.
    """
    numbers = row["tiles"]
    gather = row["op"] == "gather_columns"
    blocks = numbers[: 2 if gather else 3]
    good = len(numbers) == (3 if gather else 5) and all(type(n) is int for n in numbers)
    good = good and all(n & (n - 1) == 0 and n >= (1 if gather else 16) for n in blocks)
    good = good and blocks[-1] >= 16  # a gather's columns: a whole run
    if not (good and numbers[len(blocks)] in (1, 2, 4, 8, 16) and 1 <= numbers[-1] <= 16):
        raise ValueError(f"{numbers} is no launch shape of {row['op']}")
    return tuple(numbers) if gather else Tiles(*numbers)


_forced: dict[str, tuple[int, ...] | None] = {}
_asked: dict[str, set[Key]] = {}


@contextlib.contextmanager
def forced(op: str, tiles: tuple[int, ...] | None) -> Iterator[None]:
    """Within the ``with`` block, in all threads, an operation has this launch shape, or with None its rule's: to
    measure it."""
    _forced[op] = tiles
    try:
        yield
    finally:
        del _forced[op]


@contextlib.contextmanager
def asked(op: str) -> Iterator[set[Key]]:
    """By what an operation looks its launch shape up within the ``with`` block."""
    _asked[op] = set()
    try:
        yield _asked[op]
    finally:
        del _asked[op]


def lookup(
    device: torch.device, op: str, dtype: torch.dtype, *sizes: int
) -> tuple[int, ...] | None:
    """The measured launch shape of an operation; None where the rule decides."""
    key = op, dtype, *sizes
    if op in _asked:
        _asked[op].add(key)
    if op in _forced:
        return _forced[op]
    return table(device).get(key)
