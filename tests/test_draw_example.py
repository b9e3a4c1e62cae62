"""benchmarks/draw_example.py: the README's first picture, of a record of subnets that moved or stayed."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
RECORD = json.loads((ROOT / "benchmarks" / "results" / "example.json").read_text())


@pytest.mark.parametrize("moves", [[], [{"step": 20, "group": 0}, {"step": 40, "group": 1}]])
def test_a_schedule_is_drawn_where_subnets_moved(moves, tmp_path):
    record = copy.deepcopy(RECORD)
    record["settings"]["period"] = 20 if moves else None
    for run in record["runs"]:
        run["reselections"] = moves
    (tmp_path / "example.json").write_text(json.dumps(record))
    main = runpy.run_path(str(ROOT / "benchmarks" / "draw_example.py"))["main"]
    titles = []
    main.__globals__["RECORD"] = tmp_path / "example.json"
    main.__globals__["PICTURE"] = tmp_path / "example.png"
    kind = main.__globals__["Figure"]

    class Seen(kind):
        def savefig(self, *args, **kwargs):
            titles.extend(axes.get_title() for axes in self.axes)
            super().savefig(*args, **kwargs)

    main.__globals__["Figure"] = Seen
    main()
    assert ("The example: blocks move in turn" in titles) == bool(moves)
    assert len(titles) == 2 + bool(moves)
    assert (tmp_path / "example.png").read_bytes().startswith(b"\x89PNG")
