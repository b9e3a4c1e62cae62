"""Flags' values: text to Python, or a sentence that says what would do."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

METHODS = ("losia-pro", "losia", "lora", "full")


def file_path(text: str) -> Path:
    """``~`` is the home folder; of a user that there is not, it stays what it is: ``Path.expanduser`` would raise."""
    return Path(os.path.expanduser(text))


def count(text: str) -> int:
    """A whole number of 1 or more."""
    value = _whole(text, "1 or more")
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def count_or_none(text: str) -> int | None:
    """The same, or the word ``none``."""
    return None if text == "none" else count(text)


def seed(text: str) -> int:
    """A whole number that Python's, NumPy's and PyTorch's generators all take."""
    value = _whole(text, "0 or more")
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**32), got {value}")
    return value


def _whole(text: str, range_: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of {range_}, got {text!r}"
        ) from None


def positive(text: str) -> float:
    """A number above 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def share(text: str) -> float:
    """A number, or a fraction such as ``1/8``; the configuration says whether it is in range."""
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"must be a share such as 1/8 or 0.125, got {text!r}"
        ) from None


def not_negative(text: str) -> float:
    """A number of 0 or more."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more and finite, got {text}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def names(text: str) -> list[str]:
    """What stands between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def modules(text: str) -> list[str] | str:
    """Names between commas; else, and for ``all-linear``, the one string that ``LosiaConfig`` takes."""
    found = names(text)
    plain = text != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in found)
    return found if plain else text


def methods(text: str) -> list[str]:
    """Methods, or the word ``none`` for an empty list."""
    chosen = [] if text == "none" else names(text)
    return list(dict.fromkeys(_method(name) for name in chosen))


def learning_rates(text: str) -> dict[str, float]:
    """``1e-3`` for every method, ``lora=3e-3,full=1e-3`` by method, or both: ``1e-3,full=1e-4``."""
    rates: dict[str, float] = {}
    for part in names(text):
        name, equals, value = part.rpartition("=")
        try:
            float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r} is neither a rate nor METHOD=RATE"
            ) from None
        rate = positive(value)
        rates.update(dict.fromkeys((_method(name),) if equals else METHODS, rate))
    if not rates:
        raise argparse.ArgumentTypeError(f"needs a rate, e.g. 1e-3, got {text!r}")
    return rates


def _method(name: str) -> str:
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METHODS)}")
    return name
