"""The output folder: one run each, and every file in it whole or not there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import CliError
from .values import file_path

RECORD = "run.json"
CHECKPOINTS = "checkpoints"
TORCHS_WORDS = "inline_container", "iostream"  # of torch.save, for a file that it cannot write


class RunFolder:
    """A run's folder and its record ``run.json``, which is rewritten whole as the run goes on."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, record

    @classmethod
    def choose(cls, output: str | None, name: str, overwrite: bool) -> RunFolder:
        """Choose the folder; without ``output``, ``runs/NAME`` or the next free ``runs/NAME-2``. Nothing is
        made yet.

        Raises:
            CliError: the folder holds another run, or something else.
        """
        path = file_path(output) if output is not None else free(name)
        _check_room(path, overwrite)
        return cls(path, {})

    def make(self) -> None:
        """Make it, empty: a run that was there is removed (``choose`` has asked for ``overwrite``)."""
        try:
            if (self.path / RECORD).exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CliError(f"--output {self.path}: cannot be written ({error.strerror})") from error

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An interrupted run.

        Raises:
            CliError: there is none in that folder, or it is complete.
        """
        try:
            record = json.loads((path / RECORD).read_text())
            status = record["status"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CliError(f"--resume {path}: there is no run in that folder") from error
        if status == "complete":
            raise CliError(f"--resume {path}: that run is complete; see {path / RECORD}")
        return cls(path, record)

    def save(self) -> None:
        """Write the record."""
        with self.writing(RECORD) as temporary:
            temporary.write_text(json.dumps(self.record, indent=2) + "\n")

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Gives a temporary path; what was written there becomes ``name`` when the block ends well.

        Raises:
            CliError: see ``written``.
        """
        final = self.path / name
        with written(final):
            room = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.path))
            try:
                temporary = room / name
                yield temporary
                if final.is_dir():
                    shutil.rmtree(final)
                open_up(temporary)
                os.replace(temporary, final)
            finally:
                shutil.rmtree(room, ignore_errors=True)

    def checkpoints(self, method: str) -> Path:
        """Where a method's checkpoints go."""
        return self.path / CHECKPOINTS / method

    def last_checkpoint(self, method: str) -> Path | None:
        """The latest one that was written to its end."""
        from losia_pro.integrations.transformers import last_checkpoint

        return last_checkpoint(self.checkpoints(method))

    def drop_checkpoints(self, method: str) -> None:
        """A method that is finished needs none."""
        shutil.rmtree(self.checkpoints(method), ignore_errors=True)
        with suppress(OSError):  # another method's are there, or none at all
            (self.path / CHECKPOINTS).rmdir()


def free(name: str, suffix: str = "") -> Path:
    """``runs/NAME``, or if there is one the next free ``runs/NAME-2``."""
    path, n = Path("runs") / f"{name}{suffix}", 1
    while path.exists():
        n += 1
        path = Path("runs") / f"{name}-{n}{suffix}"
    return path


@contextmanager
def written(what: object) -> Iterator[None]:
    """Raises a CliError that names ``what`` if what is written to it cannot be, on a full disk say."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCHS_WORDS):
            raise
        why = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise CliError(f"{what}: cannot be written ({why})") from error


def open_up(path: Path) -> None:
    """Give files the permissions that new files have; safetensors writes them for their owner alone."""
    os.umask(mask := os.umask(0))
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _check_room(path: Path, overwrite: bool) -> None:
    if path.is_file():
        raise CliError(f"--output {path}: a file of that name is there")
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise CliError(f"--output {path}: cannot be written, because {there} cannot")
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / RECORD).is_file():
        raise CliError(f"--output {path}: the folder holds other files; give an empty or a new one")
    if not overwrite:
        raise CliError(
            f"--output {path}: the folder holds another run; continue it with --resume "
            f"{shlex.quote(str(path))}, replace it with --overwrite, or give another folder"
        )
