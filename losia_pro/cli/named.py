"""Datasets that the package datasets reads: by their name on the hub, or as a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from . import hub
from .errors import CliError


def datasets() -> Any:
    """The package, without its progress bars.

    Raises:
        CliError: it is not installed.
    """
    try:
        import datasets as package
    except ImportError as error:
        raise CliError(
            "reading a dataset by name needs the package datasets: pip install datasets"
        ) from error
    package.disable_progress_bars()
    return package


def is_saved(source: str) -> bool:
    """Whether it is a folder that the package's ``save_to_disk`` has written."""
    name = os.path.expanduser(source)
    return any(os.path.isfile(os.path.join(name, f)) for f in ("state.json", "dataset_dict.json"))


def rows(source: str, split: str, subset: str | None) -> Iterable[tuple[str, Any]]:
    """The rows of a split, each with the name of its place.

    Raises:
        CliError: a dataset, subset or split that cannot be read.
    """
    package = datasets()
    name = os.path.expanduser(source)
    here = os.path.isdir(name)
    try:
        if is_saved(source):
            loaded = package.load_from_disk(name)
            if hasattr(loaded, "keys"):
                if split not in loaded:
                    raise CliError(f"{source}: no split {split!r}; it has {', '.join(loaded)}")
                loaded = loaded[split]
        else:
            with hub.quiet():
                loaded = package.load_dataset(name, subset, split=split)
    except CliError:
        raise
    except Exception as error:  # whatever a builder, a server or the file system may raise
        why = str(error).strip().split("\n")[0]
        if here:
            raise CliError(f"{source}: split {split!r} cannot be read ({why})") from error
        raise CliError(
            f"{source}: no file or folder here, and not a readable dataset on the hub ({why})"
        ) from error
    return ((f"{source}[{split}] row {i}", row) for i, row in enumerate(loaded))


def splits(source: str, subset: str | None) -> list[str]:
    """The names of the splits; none if it cannot be read."""
    package = datasets()
    name = os.path.expanduser(source)
    try:
        if is_saved(source):
            loaded = package.load_from_disk(name)
            return list(loaded) if hasattr(loaded, "keys") else []
        return list(package.get_dataset_split_names(name, subset))
    except Exception:  # noqa: BLE001 - unreadable: reading it is about to say why
        return []
