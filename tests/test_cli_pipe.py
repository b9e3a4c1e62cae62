"""A reader that leaves before all is printed, as ``| head`` does, ends the command line quietly."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import toys
from cli_tools import make_data, make_model

import losia_pro
from losia_pro.cli import COMMANDS, main


@pytest.fixture(scope="module")
def delta(tmp_path_factory):
    path = tmp_path_factory.mktemp("delta") / "d"
    losia_pro.attach(toys.stack()).save_delta(path)
    return str(path)


def ended(argv, monkeypatch, capsys) -> int:
    """The exit code where nobody reads; what is left is flushed then, as Python does at its end."""
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        try:
            code = main(argv)
        except SystemExit as leaving:  # rich's own end
            code = leaving.code
    assert "Error" not in capsys.readouterr().err
    return code


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["recipes"],
        ["doctor"],
        ["doctor", "--json"],
        *([name, "--help"] for name in COMMANDS),
    ],
    ids=" ".join,
)
def test_what_is_printed_to_nobody_ends_the_command(argv, monkeypatch, capsys):
    assert ended(argv, monkeypatch, capsys) == 1


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
def test_so_does_a_deltas_table(delta, flags, monkeypatch, capsys):
    assert ended(["inspect", delta, *flags], monkeypatch, capsys) == 1


def test_and_a_training_run(tmp_path, monkeypatch, capsys):
    model, data = make_model(tmp_path / "model", torch.float32), make_data(tmp_path / "data")
    flags = ["--model", model, "--data", data, "--output", tmp_path / "run", "--steps", 2]
    assert ended(["finetune", *map(str, flags)], monkeypatch, capsys) == 1


def test_nothing_is_said_when_python_ends(delta):
    """An output shorter than the buffer, which is flushed only then, and to a pipe as it comes."""
    for flags in ([], ["-u"]):
        ours, theirs = os.pipe()
        os.close(ours)
        done = subprocess.run(
            [sys.executable, *flags, "-m", "losia_pro", "inspect", delta],
            stdout=theirs, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(theirs)
        assert (done.returncode, done.stderr) == (1, "")


def test_a_closed_standard_output_is_no_error(delta, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect", delta]) == 0
