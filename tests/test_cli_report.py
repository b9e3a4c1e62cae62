"""What a person sees: the opening, progress, notes, files and pictures of a run."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from losia_pro.cli import report
from losia_pro.cli.encode import Encoded
from losia_pro.cli.processes import Processes
from losia_pro.cli.progress import training_progress

STEP = (4, 1.2345, 1e-3, 5600.0, 812e6)  # step, loss, lr, tokens/s, memory
FIGURES = ("lora", "loss 1.23", "held-out 2.500", "lr 1.0e-3", "5.6k tok/s", "812 MB")


def shown(width: int, terminal: bool, steps: int = 10) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    with training_progress(console, "lora", steps) as progress:
        progress.step(*STEP)
        progress.evaluated(5, 2.5)
    return out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_rate_and_memory(terminal):
    text = shown(160, terminal)
    assert all(figure in text for figure in (*FIGURES, "5/10"))
    assert ("\x1b" in text) == terminal


def test_a_narrow_terminal_has_every_figure_and_no_bar():
    text = shown(80, True, steps=1000)
    assert all(figure in text for figure in (*FIGURES, "5/1000"))
    assert "━" not in text and "━" in shown(100, True)


def test_a_slow_rate_is_not_rounded_to_nothing():
    out = io.StringIO()
    with training_progress(Console(file=out), "full", 10) as progress:
        progress.step(1, 0.5, 3e-11, 42.4, 2e9)
        progress.evaluated(1, 0.5)
    assert "42 tok/s" in out.getvalue() and "lr 3.0e-11" in out.getvalue()


def job(**changes):
    options = dict(
        model="m", data="d", method="lora", compare=["full"], batch_size=4, accumulation=2
    )
    data = Encoded([None] * 1200, [None] * 30, changes.pop("cut", 0), changes.pop("dropped", 0))
    fields = dict(
        options=SimpleNamespace(**options, max_length=64), data=data, kind="pairs", steps=9, parameters=1234,
        precision="bf16", device=SimpleNamespace(type="cuda"), tokenizer=SimpleNamespace(eos_token_id=0),
        together=Processes(),
    )  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def test_the_opening_says_what_is_about_to_run(tmp_path, monkeypatch):
    assert report.opening(job()) == [
        "model  m: 1,234 parameters, bf16 on cuda",
        "data   d: 1,200 examples to train, 30 held out",
        "run    lora, then full: 9 steps of 8 examples",
    ]
    assert "9 steps of 8 blocks" in report.opening(job(kind="document"))[2]
    below = job()
    monkeypatch.chdir(tmp_path)
    below.options.model, below.options.data = str(tmp_path / "a" / "b"), "/elsewhere/c"
    assert report.opening(below)[0].startswith("model  a/b:")
    assert report.opening(below)[1].startswith("data   /elsewhere/c:")


def test_the_opening_warns_of_what_the_training_will_not_see():
    endless = SimpleNamespace(eos_token_id=None)
    cut, dropped, end = report.opening(job(cut=7, dropped=3, tokenizer=endless))[3:]
    assert cut.startswith("7 examples are longer than --max-length 64")
    assert dropped.startswith("3 examples left out")
    assert "no end-of-sequence token" in end
    assert len(report.opening(job(kind="document", tokenizer=endless))) == 3


def test_the_files_that_are_there_are_explained(tmp_path):
    for name in ("run.json", "loss.png"):
        (tmp_path / name).touch()
    (tmp_path / "merged").mkdir()
    head, *lines = report.files(tmp_path)
    assert head == f"In {tmp_path}:"
    assert [line.split()[0] for line in lines] == ["merged/", "loss.png", "run.json"]
    assert all(len(line) <= 80 for line in lines)
