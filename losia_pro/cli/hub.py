"""The Hugging Face Hub, where a model or dataset is looked for that is not on this machine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES_OF_FILES = (
    ".json",
    ".jsonl",
    ".ndjson",
    ".txt",
    ".md",
    ".rst",
    ".csv",
    ".tsv",
    ".parquet",
    ".gz",
)


def is_a_path(name: str) -> bool:
    """Whether ``name`` can only mean a file or folder: a hub id is ``name`` or ``owner/name``, where the name may
    have a dot (``OpenHermes-2.5``)."""
    path = Path(name)
    return (
        path.is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
        or path.suffix.lower() in NAMES_OF_FILES
    )


def is_on_the_hub(name: str) -> bool:
    """Whether ``name`` has to be looked for on the hub."""
    return not is_a_path(name) and not Path(name).exists()


def announce(what: str, name: str) -> None:
    """Say that the hub is asked, which can take a while."""
    print(
        f"no file or folder {name} here: looking for a {what} of that name on the hub",
        file=sys.stderr,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the client's lines about each of its retries: its last error says the same."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
