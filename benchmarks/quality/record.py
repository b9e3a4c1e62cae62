"""The files of a run: a line for each finished run at once, and the whole as JSON at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from .plan import Plan, Row

NOT_SHOWN = [
    "One small byte-level model, pretrained for minutes; other sizes, tokenizers and tasks may rank the methods "
    "differently.",
    "Seconds are those of one of several processes that share the device, with compiling: they compare methods "
    "of this record only roughly. `losia-pro bench step` times steps.",
    "Learning rates are on a half-decade grid; between two of its points may be a better one.",
    "No weight decay but where a method's name has it, no dropout, one batch size, one schedule, one number of steps.",
]


class Lines:
    """The JSONL file: every finished run, appended and flushed when it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self.rows.append(json.loads(line))
                except json.JSONDecodeError:
                    continue  # cut off by a kill: that run is made again
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        path.write_text(text)
        self._file: TextIO = path.open("a")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def write(path: Path, head: dict[str, Any], plan: Plan, rows: list[Row]) -> None:
    """The JSON file, whole or not at all, with a line for each row of the table and for each run."""
    done, wanted = plan.size()
    head = {
        **head,
        "not_shown": NOT_SHOWN,
        "complete": done == wanted,
        "done": done,
        "planned": wanted,
    }
    tables = {"rows": rows, "runs": plan.done()}
    parts = [json.dumps(head, indent=1)[:-2]]
    for name, table in tables.items():
        lines = ",\n".join("  " + json.dumps(row) for row in table)
        parts.append(f' "{name}": [\n{lines}\n ]')
    partial = path.with_name(path.name + ".partial")
    partial.write_text(",\n".join(parts) + "\n}\n")
    partial.replace(path)


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What ``write`` was given, and the runs."""
    head = json.loads(path.read_text())
    for derived in ("rows", "complete", "done", "planned", "not_shown"):
        del head[derived]
    return head, head.pop("runs")
