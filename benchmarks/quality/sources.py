"""Real text that a machine with Python has: where it is looked for, and how it is read. Nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LONGEST_FILE = 50_000  # bytes of one file that are used
SHORTEST_FILE = 200
LONGEST_LINE = 200  # mean characters: above it is data, or minified


@dataclass(frozen=True)
class Source:
    """Files with one of the ``endings`` under one of the ``roots``, which are keys of ``roots()``."""

    endings: tuple[str, ...]
    roots: tuple[str, ...]


PYTHON = "python"  # what the base model has read
TEXTS = {
    PYTHON: Source((".py",), ("stdlib", "packages")),
    "cpp": Source(
        (".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu"),
        ("packages", "include", "cuda", "system-include"),
    ),
    "docs": Source((".md", ".rst", ".txt", "METADATA"), ("stdlib", "packages", "doc")),
    "stubs": Source((".pyi",), ("packages", "stdlib")),
    "config": Source(
        (".json", ".yaml", ".yml", ".toml", ".cmake", ".xml", ".cfg", ".ini"),
        ("stdlib", "packages", "cmake", "cuda"),
    ),
    "man": Source((".1.gz", ".2.gz", ".3.gz", ".5.gz", ".7.gz", ".8.gz"), ("man",)),
    "perl": Source((".pm", ".pl", ".pod"), ("perl", "perl-lib")),
}


def roots() -> dict[str, list[Path]]:
    """Folders of this machine by kind; those that it lacks are left out."""
    paths = sysconfig.get_paths()
    found = {
        "stdlib": [paths["stdlib"]],
        "packages": [paths["purelib"], paths["platlib"]],
        "include": [paths["include"]],
        "cuda": [os.environ.get("CUDA_HOME", "/usr/local/cuda")],
        "system-include": ["/usr/include"],
        "doc": ["/usr/share/doc"],
        "man": ["/usr/share/man"],
        "perl": ["/usr/share/perl", "/usr/share/perl5"],
        "perl-lib": [str(p) for p in sorted(Path("/usr/lib").glob("*-linux-gnu/perl*"))],
        "cmake": [str(p) for p in sorted(Path("/usr/share").glob("cmake*"))],
    }
    unique = {
        kind: dict.fromkeys(Path(f).resolve() for f in names) for kind, names in found.items()
    }
    return {kind: [f for f in folders if f.is_dir()] for kind, folders in unique.items()}


def files(source: Source) -> list[tuple[str, Path]]:
    """(name, path) of a source's files, in the order of a hash of the name: any beginning is a fair sample."""
    found: dict[str, Path] = {}
    for kind in source.roots:
        for root in roots().get(kind, []):
            for folder, folders, names in os.walk(root):
                folders[:] = [
                    f
                    for f in folders
                    if f != "__pycache__" and not (kind == "stdlib" and f.endswith("-packages"))
                ]
                for name in names:
                    if name.endswith(source.endings):
                        path = Path(folder, name)
                        found.setdefault(f"{kind}/{path.relative_to(root).as_posix()}", path)
    return sorted(found.items(), key=lambda item: share(item[0], "order"))


def share(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int(hashlib.sha256(f"{purpose}:{name}".encode()).hexdigest()[:12], 16) / 16**12


def read(path: Path) -> str | None:
    """A file's text, or None if it is none: not UTF-8, binary, very short, or data in long lines."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                raw = stream.read(LONGEST_FILE)
        else:
            with path.open("rb") as stream:
                raw = stream.read(LONGEST_FILE)
    except (OSError, EOFError):
        return None
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        if error.end < len(raw):  # not just a character that the limit cut
            return None
        text = raw[: error.start].decode()
    if path.name == "METADATA":
        text = text.partition("\n\n")[2]
    short = len(text) < SHORTEST_FILE or "\0" in text
    return None if short or len(text) / (text.count("\n") + 1) > LONGEST_LINE else text


def texts(source: Source) -> Iterator[tuple[str, str]]:
    """(name, text) of a source, no text twice."""
    seen: set[bytes] = set()
    for name, path in files(source):
        text = read(path)
        if text is None:
            continue
        digest = hashlib.sha256("".join(text.split()).encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield name, text
