"""The old domain and the targets as tensors: split by file, nothing of the held-out parts among the training text.

A part is three tensors: ``rows`` ``(N, L + 1)`` uint8, bytes; ``first`` and ``last`` ``(N,)`` int16: the tokens
``[first, last)`` of a row count in the loss. Byte 0 ends a document or an answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sources, tasks
from .settings import Setting

END = 0
VALID, TEST = 0.08, 0.16  # shares of the files: those below VALID, and below TEST
ALIKE = (
    0.5  # a held-out file with more than this share of its lines in the training text is left out
)
LONG_LINE = 20  # characters: shorter lines are everywhere


class Part(NamedTuple):
    rows: Tensor
    first: Tensor
    last: Tensor

    def to(self, device: torch.device) -> Part:
        return Part(*(t.to(device) for t in self))


Domain = dict[str, Part]  # "train", "valid", "test"


def build(
    setting: Setting, order: Sequence[str], most: int
) -> tuple[dict[str, Domain], dict[str, Any]]:
    """The old domain, the first ``most`` of ``order`` that this machine has enough text for, and what was found of
    each that was looked at."""
    domains: dict[str, Domain] = {}
    about: dict[str, Any] = {}
    texts = split(sources.TEXTS[sources.PYTHON], setting.python_bytes)
    _add(sources.PYTHON, texts, setting, domains, about)
    for name in order:
        if len(domains) > most:
            break
        if name not in tasks.TASKS:
            _add(name, split(sources.TEXTS[name], setting.target_bytes), setting, domains, about)
        elif sources.PYTHON in domains:
            domains[name], about[name] = _task(name, texts, setting)
    for name, domain in domains.items():
        about[name]["sha256"] = digest(domain)
        about[name]["rows"] = {part: len(p.rows) for part, p in domain.items()}
    return domains, about


def _add(
    name: str,
    texts: dict[str, list[str]],
    setting: Setting,
    domains: dict[str, Domain],
    about: dict[str, Any],
) -> None:
    bytes_ = {part: sum(len(t.encode()) for t in found) for part, found in texts.items()}
    about[name] = {"files": {p: len(t) for p, t in texts.items()}, "bytes": bytes_}
    if bytes_["train"] < setting.smallest or not bytes_["valid"] or not bytes_["test"]:
        about[name]["left_out"] = f"less than {setting.smallest} bytes, or nothing held out"
        return
    domains[name] = {
        part: windows(found, setting.length, None if part == "train" else setting.held_out)
        for part, found in texts.items()
    }


def split(source: sources.Source, most: int) -> dict[str, list[str]]:
    """Texts by part, until there are ``most`` bytes for training."""
    found: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for name, text in sources.texts(source):
        place = sources.share(name, "split")
        found["valid" if place < VALID else "test" if place < TEST else "train"].append(text)
        if place >= TEST:
            most -= len(text.encode())
        if most <= 0:
            break
    train = {line for text in found["train"] for line in long_lines(text)}
    for part in ("valid", "test"):
        found[part] = [t for t in found[part] if not _alike(t, train)]
    return found


def long_lines(text: str) -> set[int]:
    return {hash(s) for line in text.splitlines() if len(s := line.strip()) >= LONG_LINE}


def _alike(text: str, train: set[int]) -> bool:
    lines = long_lines(text)
    return bool(lines) and len(lines & train) > ALIKE * len(lines)


def windows(texts: Iterable[str], length: int, most: int | None) -> Part:
    """The texts one after another, cut into windows of ``length + 1`` tokens that overlap by one; a fixed random
    choice of ``most`` of them."""
    whole = torch.frombuffer(
        bytearray(b"".join(text.encode() + bytes([END]) for text in texts)), dtype=torch.uint8
    )
    rows = whole.unfold(0, length + 1, length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]
    rows = rows[order].contiguous()
    n = len(rows)
    return Part(
        rows, torch.zeros(n, dtype=torch.int16), torch.full((n,), length + 1, dtype=torch.int16)
    )


def _task(
    task: str, texts: dict[str, list[str]], setting: Setting
) -> tuple[Domain, dict[str, Any]]:
    """The held-out prompts come from held-out files, and are not among the training prompts."""
    longest, held_out = setting.task_length, 4 * setting.held_out
    train = tasks.examples(task, texts["train"], longest, setting.examples)
    valid = tasks.examples(task, texts["valid"], longest, held_out, train)
    test = tasks.examples(task, texts["test"], longest, held_out, [*train, *valid])
    parts = {"train": train, "valid": valid, "test": test}
    about = {"examples": {part: len(found) for part, found in parts.items()}}
    return {part: encode(found, longest) for part, found in parts.items()}, about


def encode(examples: dict[str, str], length: int) -> Part:
    """Prompt, answer and end, then zeros; the loss is on answer and end."""
    rows = torch.zeros(len(examples), length, dtype=torch.uint8)
    first, last = [], []
    for row, (prompt, answer) in zip(rows, examples.items(), strict=True):
        data = (prompt + answer).encode() + bytes([END])
        row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        first.append(len(prompt.encode()))
        last.append(len(data))
    return Part(rows, torch.tensor(first, dtype=torch.int16), torch.tensor(last, dtype=torch.int16))


def digest(domain: Domain) -> str:
    found = hashlib.sha256()
    for part in sorted(domain):
        for tensor in domain[part]:
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def base_digest(setting: Setting, about: dict[str, Any]) -> str:
    """Of everything that decides the base model."""
    fields = ("hidden", "intermediate", "layers", "heads", "length", "task_length")
    own = [f for f in dataclasses.asdict(setting) if f.startswith("pretrain")]
    values = {f: getattr(setting, f) for f in (*fields, *own)}
    return short_hash(json.dumps([values, about[sources.PYTHON]["sha256"]]))


def save(path: Path, domains: dict[str, Domain]) -> None:
    """Two files: the base model's training text has one of its own."""
    path.mkdir(parents=True, exist_ok=True)
    plain = {n: {part: tuple(p) for part, p in d.items()} for n, d in domains.items()}
    torch.save(plain[sources.PYTHON].pop("train"), path / "pretrain.pt")
    torch.save(plain, path / "domains.pt")


def load(path: Path, device: torch.device) -> dict[str, Domain]:
    """All but the base model's training text."""
    plain = torch.load(path / "domains.pt", weights_only=True)
    return {n: {part: Part(*p).to(device) for part, p in d.items()} for n, d in plain.items()}


def load_pretraining(path: Path, device: torch.device) -> Part:
    return Part(*torch.load(path / "pretrain.pt", weights_only=True)).to(device)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
