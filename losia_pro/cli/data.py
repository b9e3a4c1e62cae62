"""Reading training data, checked at the door: before any model is loaded.

Kinds of data, decided by the first record:

- ``pairs``: ``{"prompt": str, "response": str}``; the response is trained;
- ``chat``: ``{"messages": [{"role": str, "content": str}, ...]}``; the assistant's turns are trained;
- ``text``: ``{"text": str}``; all of it is trained;
- ``document``: a plain text file, cut into blocks; all of it is trained.

Records of any other fields become ``pairs`` by two templates, one for the prompt and one for the response.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import hub, named, templates
from .errors import CliError
from .values import file_path

KINDS = {"pairs": ("prompt", "response"), "chat": ("messages",), "text": ("text",)}
JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".csv", ".tsv", ".parquet", ".arrow")
HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 1000  # where the data names no held-out part
HELD_OUT_NAMES = ("test", "validation", "valid", "dev", "eval")
ONE_A_LINE = "the file must hold one JSON object a line"
SEED = 0  # of the held-out choice; not the run's, so that runs of different seeds are comparable


class Record(NamedTuple):
    """One example as it was read; ``where`` names its file and line for later errors."""

    where: str
    content: Any  # pairs: (prompt, response); chat: messages; text, document: str


@dataclass(frozen=True)
class Data:
    """``held_out`` is None for a document that is to be split by blocks, ``share`` of them held out."""

    kind: str
    train: list[Record]
    held_out: list[Record] | None
    share: float
    source: str


def load(
    source: str,
    eval_source: str | None = None,
    split: str = "train",
    eval_split: str | None = None,
    subset: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
) -> Data:
    """Read training and held-out data.

    Args:
        source: a JSONL file, a text file, a folder that holds ``train.jsonl`` (and ``test.jsonl``), a folder
            that ``datasets`` saved, or the name of a dataset.
        eval_source: the same for the held-out part.
        split: which split of a folder or dataset is trained on; files have none.
        eval_split: which split is held out, or a share such as ``0.1`` of the training data.
        subset: of a dataset that has several ("configurations"); files have none.
        prompt, response: Jinja templates over a record's fields; both or none.

    Raises:
        CliError: with file and line, for anything that cannot be read as one kind of data.
    """
    pair = templates.pair(prompt, response)
    sources = [name for name in (source, eval_source) if name is not None]
    if all(is_file(name) for name in sources):
        _refuse_parts(source, split=split if split != "train" else None, subset=subset)
    if subset is not None and not any(_may_have_subsets(name, split) for name in sources):
        raise CliError(f"--subset {subset}: {source} has none; datasets on the hub may")
    for name in (source, eval_source):
        if name is not None and hub.is_on_the_hub(name):
            named.datasets()  # else there is nothing to look with
            hub.announce("dataset", name)
    kind, train = _read(source, split, None, subset, pair)
    share = _share(eval_split)
    held_out = None
    if eval_source is not None:
        theirs = eval_split if share is None else None
        theirs = theirs or _held_out_split(eval_source, subset) or split
        held_out = _read(eval_source, theirs, kind, subset, pair)[1]
    elif share is None:
        name = eval_split or _held_out_split(source, subset)
        if eval_split and (is_file(source) or eval_split == split):
            raise CliError(
                f"--eval-split {eval_split}: {source} has no such split besides the one trained on; "
                "give a share such as 0.1, or --eval-data"
            )
        if name and name != split:
            held_out = _read(source, name, kind, subset, pair)[1]
    if held_out is None and kind != "document":
        train, held_out = _hold_out(train, share or HELD_OUT_SHARE, source)
    return Data(kind, train, held_out, share or HELD_OUT_SHARE, source)


def is_file(source: str) -> bool:
    """Whether a source is one file, which has neither splits nor subsets."""
    return file_path(source).is_file()


def _may_have_subsets(source: str, split: str) -> bool:
    path = file_path(source)
    return not (path.is_file() or _split_file(path, split) or named.is_saved(source))


def _refuse_parts(source: str, **parts: str | None) -> None:
    for flag, name in parts.items():
        if name is not None:
            raise CliError(
                f"--{flag} {name}: {source} is a file, which is read whole; {flag}s are of a dataset, by its name on "
                "the hub or as a folder"
            )


def _share(eval_split: str | None) -> float | None:
    try:
        share = float(eval_split or "")
    except ValueError:
        return None
    if not 0 < share < 1:
        raise CliError(f"--eval-split {eval_split}: a share must be between 0 and 1, e.g. 0.1")
    return share


def _hold_out(
    records: list[Record], share: float, source: str
) -> tuple[list[Record], list[Record]]:
    if len(records) < 2:
        raise CliError(f"{source}: one example only; two are needed, to hold one out for the test")
    n = min(max(1, round(len(records) * share)), HELD_OUT_MOST, len(records) - 1)
    chosen = set(random.Random(SEED).sample(range(len(records)), n))
    train = [r for i, r in enumerate(records) if i not in chosen]
    return train, [records[i] for i in sorted(chosen)]


# --- sources -------------------------------------------------------------------------------------------


def _read(
    source: str,
    split: str,
    kind: str | None,
    subset: str | None,
    pair: Callable[[Any, str], Any] | None,
) -> tuple[str, list[Record]]:
    path = file_path(source)
    if path.is_dir():
        file = _split_file(path, split)
        rows = _json_lines(file) if file else named.rows(source, split, subset)
    elif path.exists():
        if path.suffix.lower() in TABLES:
            raise CliError(
                f"{path}: a table, which is no text to train on; write its rows as JSONL, or put it into a "
                "folder of its own and give the folder, which the package datasets reads"
            )
        if path.suffix.lower() not in JSON_LINES:
            if path.suffix.lower() != ".txt" and _looks_like_json_lines(path):
                raise CliError(
                    f"{path}: its first line is a JSON object; name the file .jsonl to train on the fields, .txt to "
                    "train on the text as it is"
                )
            if pair:
                raise CliError(f"{path}: a text file has no fields for --prompt and --response")
            if kind not in (None, "document"):
                raise CliError(f"{path}: a text file, but the training data is {kind}")
            return "document", [Record(str(path), _text(path))]
        rows = _json_lines(path)
    elif hub.is_a_path(source):
        raise CliError(f"{source}: no such file or folder")
    else:
        rows = named.rows(source, split, subset)
    first = ""
    records, left_out = [], 0
    for where, row in rows:
        if pair:
            row = pair(row, where)
            if isinstance(row, dict) and not row["response"]:
                left_out += 1
                continue
        found = _kind(row, where)
        if kind is None:
            kind, first = found, where
        if found != kind:
            raise CliError(
                f"{where}: {_say(found)}, but {first or 'the training data'} has {_say(kind)}; "
                "all examples must be of one kind"
            )
        content = _content(row, kind, where)
        _check_text(content, where)
        records.append(Record(where, content))
    if left_out:
        print(
            f"{source}: {left_out:,} records left out: --response is empty there", file=sys.stderr
        )
    if not records:
        raise CliError(f"{source}: no examples in it")
    assert kind is not None
    return kind, records


def _split_file(folder: Path, split: str) -> Path | None:
    files = (folder / f"{split}{suffix}" for suffix in JSON_LINES)
    return next((file for file in files if file.is_file()), None)


def _held_out_split(source: str, subset: str | None) -> str | None:
    path = file_path(source)
    if path.is_dir() and _split_file(path, "train"):
        return next((name for name in HELD_OUT_NAMES if _split_file(path, name)), None)
    if path.is_file() or (hub.is_a_path(source) and not path.exists()):
        return None
    names = named.splits(source, subset)
    return next((name for name in HELD_OUT_NAMES if name in names), None)


def _text(path: Path) -> str:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CliError(f"{path}: cannot be read ({error.strerror})") from error
    if not text.strip():
        raise CliError(f"{path}: the file is empty")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise CliError(f"{path}:{line}: not UTF-8 text") from error


def _looks_like_json_lines(path: Path) -> bool:
    try:
        return isinstance(json.loads(_text(path).lstrip().partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise CliError(
                f"{where}: not a JSON object ({error.msg} at column {error.colno}); {ONE_A_LINE}"
            ) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets
            raise CliError(f"{where}: cannot be read ({error})") from error


# --- records -------------------------------------------------------------------------------------------


def _say(kind: str) -> str:
    return "/".join(KINDS.get(kind, (kind,)))


def _kind(row: Any, where: str) -> str:
    if not isinstance(row, dict):
        raise CliError(
            f"{where}: {type(row).__name__} where a JSON object is expected; {ONE_A_LINE}"
        )
    for kind, fields in KINDS.items():
        if all(field in row for field in fields):
            return kind
    raise CliError(
        f"{where}: the fields are {', '.join(map(str, row)) or 'none'}; expected prompt and response, "
        "messages, or text"
    )


def _check_text(content: Any, where: str) -> None:
    """Raise a CliError for half of a surrogate pair: JSON can hold one, and no tokenizer reads it."""
    try:
        json.dumps(content, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise CliError(
            f"{where}: {half} alone is no character, but half of a surrogate pair; leave it out"
        ) from error


def _content(row: dict[str, Any], kind: str, where: str) -> Any:
    if kind == "chat":
        return _messages(row["messages"], where)
    values = [row[field] for field in KINDS[kind]]
    for field, value in zip(KINDS[kind], values, strict=True):
        if not isinstance(value, str):
            raise CliError(f"{where}: {field} is {type(value).__name__}, expected a string")
        if not value and field != "prompt":
            raise CliError(f"{where}: {field} is empty")
    return values[0] if kind == "text" else tuple(values)


def _messages(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise CliError(f"{where}: messages must be a list with at least one message")
    for i, message in enumerate(messages):
        ok = isinstance(message, dict) and all(
            isinstance(message.get(field), str) for field in ("role", "content")
        )
        if not ok:
            raise CliError(f"{where}: message {i + 1} needs role and content, both strings")
    if not any(m["role"] == "assistant" for m in messages):
        raise CliError(f"{where}: no message has the role assistant, so there is nothing to train")
    return messages
