"""``losia-pro merge``: a base model and a delta make the tuned model."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from losia_pro import delta

from .errors import CliError
from .values import file_path

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="folder or hub id of the model that was tuned")
    parser.add_argument("delta", metavar="DELTA", help="a file that losia.save_delta wrote")
    parser.add_argument("out", metavar="OUT", help="the folder to make, for from_pretrained")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the weights (default: as BASE is stored)",
    )


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("transformers") is None:
        raise CliError("missing packages; pip install transformers")
    out = file_path(args.out)
    _check_free(out)
    try:
        delta.read(args.delta)  # before the model, which takes longer
    except (OSError, ValueError) as error:
        raise CliError(str(error)) from error
    model = load_model(args.base, args.dtype)
    put(args.delta, model, f"BASE is {args.base}")
    tokenizer = load_tokenizer(args.base)
    with _whole(out) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    print(f"{out}: {args.base} with {args.delta}")
    return 0


def load_model(name: str, dtype: str, what: str = "BASE") -> Any:
    """The model, of the class that its config names."""
    import transformers

    from . import hub
    from .job import check_model, reading

    check_model(name, what)
    auto: Any = transformers
    auto.utils.logging.disable_progress_bar()
    with reading(f"{what} {name}"), hub.quiet():
        config = auto.AutoConfig.from_pretrained(name)
        named = getattr(config, "architectures", None) or [""]
        kind = getattr(auto, named[0], auto.AutoModelForCausalLM)
        return kind.from_pretrained(name, dtype=dtype)


def put(path: str, model: Any, which: str) -> None:
    """Apply a delta to the model; ``which`` says of a refused one where it is from."""
    try:
        delta.load_delta(model, path)
    except (OSError, ValueError) as error:
        raise CliError(f"{error} ({which}; --dtype says in what it is loaded)") from error


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer; None if it has none."""
    from transformers import AutoTokenizer

    from . import hub

    try:
        with hub.quiet():
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError):
        print(f"BASE {name} has no tokenizer; the model is saved alone", file=sys.stderr)
        return None


def _check_free(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CliError(f"OUT {out}: a file of that name is there")
    if out.is_dir() and any(out.iterdir()):
        raise CliError(f"OUT {out}: the folder holds files; give an empty or a new one")
    parent = out.absolute().parent
    if not parent.exists():
        raise CliError(f"OUT {out}: cannot be written, because there is no folder {parent}")
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CliError(f"OUT {out}: cannot be written, because {parent} cannot")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` when the block ends well; never over files that are there."""
    from .rundir import open_up, written

    with written(f"OUT {out}"):
        room = Path(tempfile.mkdtemp(prefix=".writing-", dir=out.absolute().parent))
        try:
            folder = room / out.name
            folder.mkdir()
            yield folder
            open_up(folder)
            for file in (*folder.rglob("*"), folder):
                delta.to_disk(str(file))
            os.rename(folder, out)
            delta.to_disk(str(out.absolute().parent))
        finally:
            shutil.rmtree(room, ignore_errors=True)
