"""``losia-pro finetune`` in two processes, as torchrun starts them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from cli_tools import finetune, record
from safetensors.torch import load_file
from test_cli_errors import bad_flag, refused
from test_trainer_ranks import launched, torchrun

from losia_pro.cli import errors, processes
from losia_pro.cli.errors import CliError

FLAGS = ("--steps", 12, "--batch-size", 4, "--period", 3, "--rank-factor", 0.25, "--eval-steps", 4)
FLAGS = (*FLAGS, "--lr", "1e-2")
TWO = ("--nproc_per_node", "2", "-m", "losia_pro", "finetune")
INTERRUPTED = Path(__file__).parent / "finetune_interrupted.py"


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """A run's folder, and what was printed."""
    folder = tmp_path_factory.mktemp("two")
    flags = (*base, *FLAGS, "--compare", "lora,full", "--output", folder / "run")
    return folder / "run", torchrun(folder, *TWO, *map(str, flags))


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(run / "merged" / "model.safetensors") for run in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_train_as_one_on_batches_of_both(base, two, tmp_path):
    flags = (*base, *FLAGS, "--accumulation", 2, "--compare", "lora,full")
    assert finetune(*flags, "--output", tmp_path / "one") == 0
    one, both = record(tmp_path / "one"), record(two[0])
    assert (one["processes"], both["processes"]) == (1, 2)
    assert one["reselections"] and both["steps"] == one["steps"] == 12
    moves = [[(r["step"], r["name"]) for r in run["reselections"]] for run in (one, both)]
    assert moves[0] == moves[1]
    for part, alone in ((both["base"], one["base"]), *zip(
        both["results"].values(), one["results"].values(), strict=True
    )):  # fmt: skip
        assert part["exact"] == alone["exact"]
        # A batch's loss is a sum in fp32 of fewer than 100 tokens; batches are made up differently.
        assert part["loss"] == pytest.approx(alone["loss"], rel=100 * 2**-24)


def test_the_first_process_alone_prints_and_writes(two):
    run, out = two
    assert {p.name for p in run.iterdir()} == {
        "run.json", "loss.png", "subnets.png", "delta.safetensors", "merged"
    }  # fmt: skip
    for said in ("2 processes", "12 steps of 8 examples", "Results on", "In "):
        assert out.count(said) == 1, said
    assert "of the process that took most" in out.replace("\n", " ")


def test_one_process_stops_all_and_they_go_on_exactly(base, two, tmp_path):
    flags = [str(f) for f in (*base, *FLAGS, "--output", tmp_path / "run")]
    with pytest.raises(AssertionError):  # torchrun says that processes ended with 130
        torchrun(tmp_path, "--nproc_per_node", "2", str(INTERRUPTED), "finetune", *flags)
    assert record(tmp_path / "run")["status"] == "running"
    assert list((tmp_path / "run" / "checkpoints").glob("losia-pro/checkpoint-5"))
    torchrun(tmp_path, *TWO, "--resume", str(tmp_path / "run"))
    assert same_weights(tmp_path / "run", two[0])
    results = [record(run)["results"]["losia-pro"] for run in (tmp_path / "run", two[0])]
    for key in ("loss", "exact", "train", "held_out"):
        assert results[0][key] == results[1][key], key


def test_a_run_is_resumed_by_as_many_processes(base, tmp_path, capsys, monkeypatch):
    from losia_pro.cli import finetune as command
    from losia_pro.cli.rundir import RunFolder

    original = RunFolder.save

    def stop(folder):
        folder.record["processes"] = 2
        original(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save", stop)
    assert finetune(*base, *FLAGS, "--output", tmp_path / "run") == 130
    again = command._resume(tmp_path / "run", 2)
    assert again.startswith("torchrun --nproc_per_node 2 -m losia_pro finetune --resume ")
    assert again in capsys.readouterr().out
    assert again in refused(capsys, "--resume", tmp_path / "run")


def test_all_processes_end_alike_where_the_first_cannot_use_the_folder(tmp_path):
    """The others would wait for it, and show a traceback when it is gone."""
    from losia_pro.cli import finetune as command

    (tmp_path / "run.json").write_text("{}")
    said = []

    class Together(processes.Processes):
        def all(self, mine):
            said.append(mine)
            return said[:1] * self.size

    options = argparse.Namespace(
        recipe=None, data="data", method="losia-pro", output=tmp_path, overwrite=False
    )
    for rank in range(2):
        with pytest.raises(CliError, match="the folder holds another run"):
            command._folder(options, None, Together(rank, 2))
    assert said[1] is None


def test_a_run_that_does_not_say_was_of_one_process(tmp_path):
    from losia_pro.cli.finetune import _folder
    from losia_pro.cli.rundir import RunFolder

    class Two(processes.Processes):
        def all(self, mine):
            return [mine, mine]

    older = RunFolder(tmp_path, {"status": "running"})
    assert _folder(None, older, processes.Processes()) is older
    with pytest.raises(
        CliError, match="planned for 1 process, and there are 2; .*losia-pro finetune"
    ):
        _folder(None, older, Two(0, 2))


def test_processes_that_cannot_meet_are_refused(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    said = refused(capsys, *base, "--output", tmp_path / "run")
    assert "no LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in said
    assert "torchrun --nproc_per_node 2 -m losia_pro finetune" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", "0"), "argument --steps: must be 1 or more, got 0"),
        (("--model", "m", "--data", "gone.jsonl", "--device", "cpu"), "gone.jsonl: no such file"),
    ],
    ids=["flag", "data"],
)
def test_what_all_processes_find_is_said_once(tmp_path, flags, message):
    done = launched(tmp_path, *TWO, *flags)
    assert done.returncode and done.stderr.count(message) == 1


def test_what_one_process_finds_alone_is_said_when_the_others_have_had_time_to(capsys, monkeypatch):
    waits = []
    monkeypatch.setattr(errors.time, "sleep", waits.append)
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        assert "give --resume DIR" in refused(capsys, "--resume")
        assert not waits  # no torchrun, which would end it meanwhile
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        assert "give --resume DIR" in refused(capsys, "--resume")
        assert "got 0" in bad_flag(capsys, "--steps", 0)
        assert waits == [errors.PATIENCE] * 2 * int(rank)


@pytest.mark.parametrize("flags", [("--resume",), ("--steps", 0)], ids=["later", "flag"])
def test_a_process_that_waits_to_speak_ends_quietly_at_ctrl_c(flags, capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(errors.time, "sleep", interrupted)
    assert finetune(*flags) == 130
    assert capsys.readouterr().err == ""


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(CliError, match="4 processes, but 2 GPUs.*--nproc_per_node 2"):
        processes.join(torch.device("cuda", 1))
