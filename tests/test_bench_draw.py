"""benchmarks/draw.py: figures from recorded JSON alone."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "draw.py"
METHODS = {"floor": 10.0, "losia-pro": 10.4, "losia-pro-g8": 10.2, "lora-r16": 11.8, "full": 14.0}


def step_record(modes: list[str], device: str = "GPU") -> dict:
    rows = [
        {
            "model": "llama2-7b", "mode": mode, "method": method, "status": "ok",
            "median_ms": ms, "p20_ms": ms - 0.1, "p80_ms": ms + 0.2, "peak_bytes": ms * 5e9,
        }
        for mode in modes
        for method, ms in METHODS.items()
    ]  # fmt: skip
    rows.append({"model": "llama2-7b", "mode": modes[0], "method": "dora-r64", "status": "failed"})
    arguments = {"batch": 4, "length": 2048}
    return {
        "benchmark": "step",
        "date": "2026-01-01",
        "device": {"name": device},
        "arguments": arguments,
    } | {"rows": rows}


def kernel_record() -> dict:
    def row(op: str, selection: str, into: int, tokens: int, us: float) -> dict:
        candidates = {"default": {"median_us": us}, "library": {"median_us": 2 * us}}
        key = {"op": op, "selection": selection, "in": into, "out": 8, "tokens": tokens}
        return {**key, "least_us": 1.0, "candidates": candidates}

    rows = [row("subnet_grad", "single", i, t, 2.0 * i) for i in (1, 4) for t in (512, 8192)]
    rows += [row("importance_update_", "whole", 1, 512, 1.5)]
    rows += [{"op": "host", "selection": "eager", "candidates": {}}]
    broken = row("subnet_grad", "single", 9, 512, 1.0)
    broken["candidates"]["default"] = {"refused": "error 1"}
    return {"benchmark": "kernels", "date": "2026-01-01", "device": {"name": "GPU"}} | {
        "rows": [*rows, broken]
    }


def draw(folder: Path, *records: dict, flags: tuple[str, ...] = ()) -> list[str]:
    files = []
    for k, content in enumerate(records):
        files.append(folder / f"{k}.json")
        files[-1].write_text(json.dumps(content))
    out = folder / "docs"
    old = sys.argv
    sys.argv = [str(SCRIPT), *map(str, files), "--output", str(out), *flags]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = old
    for path in out.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    return sorted(path.name for path in out.iterdir())


def test_records_of_one_model_share_a_figure(tmp_path):
    names = draw(tmp_path, step_record(["eager"]), step_record(["compiled"]), kernel_record())
    assert names == ["kernels.png", "step-llama2-7b.png"]


def test_devices_do_not_share_one(tmp_path):
    names = draw(tmp_path, step_record(["eager"]), step_record(["eager"], "Other GPU"))
    assert names == ["step-llama2-7b-gpu-4-x-2048.png", "step-llama2-7b-other-gpu-4-x-2048.png"]


def test_methods_are_picked(tmp_path):
    with pytest.raises(SystemExit, match="nothing to draw"):
        draw(tmp_path, step_record(["eager"]), flags=("--methods", "lora-r3"))
    name = next(iter(METHODS))
    assert draw(tmp_path, step_record(["eager"]), flags=("--methods", name))


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(SystemExit, match="nothing to draw"):
        draw(tmp_path, {"benchmark": "memory", "date": "2026-01-01", "rows": []})


def test_a_step_figure_shows_every_measurement_at_its_place():
    module = runpy.run_path(str(SCRIPT))
    record = step_record(["eager", "compiled"])
    rows = [row for row in record["rows"] if row["status"] == "ok"]
    figure = module["step_figure"](rows, "title")
    panels = [axes for axes in figure.axes if axes.get_title() in ("eager", "compiled")]
    assert len(panels) == 2
    for axes in panels:
        shown = {
            (line.get_xdata()[0], line.get_ydata()[0])
            for line in axes.lines
            if len(line.get_xdata()) == 1
        }
        assert {(ms * 5, ms) for ms in METHODS.values()} <= shown
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == list(METHODS)


def test_methods_of_a_family_share_a_colour_and_differ_in_their_marker():
    styles = runpy.run_path(str(SCRIPT))["styles"]
    names = ["lora-r16", "lora-r64", "lora-peft-r16", "losia-pro", "floor"]
    found = dict(zip(names, styles(names), strict=True))
    assert found["lora-r16"][0] == found["lora-r64"][0] != found["lora-peft-r16"][0]
    assert found["lora-r16"][1] != found["lora-r64"][1]


def test_kernels_are_averaged_geometrically_and_wrong_results_left_out():
    module = runpy.run_path(str(SCRIPT))
    rows = kernel_record()["rows"]
    grads = [row for row in rows if row["op"] == "subnet_grad"]
    assert module["over_least"](grads, "default") == [
        (512, pytest.approx(4)),
        (8192, pytest.approx(4)),
    ]
    importance = [row for row in rows if row["op"] == "importance_update_"]
    assert module["over_least"](importance, "library") == []
