"""Files that cannot be written to their end: a sentence, and nothing half-written under its name."""

from __future__ import annotations

import resource
from contextlib import contextmanager

import pytest
from cli_tools import finetune

from losia_pro.cli import main


@contextmanager
def full_beyond(size):
    """No file can grow larger, which fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sentence(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("size", "flags", "file"),
    [
        (1_000, ("--save-steps", "none"), "run.json"),
        (10_000, ("--save-steps", "none"), "delta.safetensors"),
        (100_000, ("--save-steps", "none"), "merged"),
        (100_000, ("--save-steps", 1), "a checkpoint in"),
    ],
)
def test_a_run_that_cannot_be_written_says_so(base, tmp_path, capsys, size, flags, file):
    run = tmp_path / "run"
    with full_beyond(size):
        assert finetune(*base, "--steps", 2, "--output", run, *flags) == 2
    message = sentence(capsys)
    assert file in message and "cannot be written" in message and "too large" in message
    assert not list(run.glob(".writing-*")) and not (run / file).exists()


def test_a_checkpoint_whose_optimizer_cannot_be_written_says_so(base, tmp_path, capsys):
    flags = ("--method", "full", "--steps", 2, "--save-steps", 1, "--output", tmp_path / "run")
    with full_beyond(600_000):  # the model fits, and both of Adam's moments do not
        assert finetune(*base, *flags) == 2
    assert "a checkpoint in" in sentence(capsys)


def test_a_merged_model_that_cannot_be_written_says_so(base, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    flags = ("--precision", "bf16", "--steps", 1, "--save-steps", "none", "--output", run)
    assert finetune(*base, *flags) == 0
    with full_beyond(100_000):
        assert main(["merge", str(base[1]), str(run / "delta.safetensors"), str(out)]) == 2
    assert f"OUT {out}: cannot be written" in sentence(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert main(["merge", str(base[1]), str(run / "delta.safetensors"), "no/folder/out"]) == 2
    assert "there is no folder" in sentence(capsys)
