"""``accelerate launch`` of a plain loop on one and on two processes, and of the example as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from accelerate_loop import BOUND, LR, STEPS
from test_trainer_ranks import delta_changes_the_linears

import losia_pro

SCRIPT = Path(__file__).parent / "accelerate_loop.py"
ROOT = SCRIPT.parent.parent


def launch(folder: Path, *argv: str) -> str:
    """What it prints; in ``folder``, with a port that is free."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    done = subprocess.run(
        [*command, "--main_process_port", "0", *argv], cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def train(folder: Path, processes: int) -> list[dict]:
    """``--cpu`` starts several processes through MPI alone; ``--multi_gpu`` does as torchrun, and the script's
    ``Accelerator(cpu=True)`` keeps them on the CPU."""
    kind = "--cpu" if processes == 1 else "--multi_gpu"
    launch(folder, kind, "--num_processes", str(processes), str(SCRIPT), str(folder))
    return [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)]


def test_one_and_two_processes_train_alike(tmp_path):
    ends = [train(tmp_path, 1), train(tmp_path, 2)]
    for end, again in ends[0] + ends[1]:
        toys.equal_bits(again, end)  # a run that went on from accelerate's saved state
    ((alone, _),), both = ends[0], [end for end, _ in ends[1]]
    assert alone["step"] == STEPS and len(alone["moves"]) == 4
    toys.equal_bits(both[0], both[1])
    assert both[0]["moves"] == alone["moves"] and both[0]["places"] == alone["places"]
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(both[0]["weights"][name], weight, rtol=0, atol=BOUND)
        assert not torch.equal(weight, toys.stack().get_submodule(name).weight)
    for n in (1, 2):
        model = losia_pro.load_delta(toys.stack(), tmp_path / f"{n}.safetensors")
        ends = (alone, both[0])[n - 1]["weights"]
        toys.equal_bits({name: model.get_submodule(name).weight.detach() for name in ends}, ends)


def test_the_example_runs_on_two_processes_as_printed(tmp_path):
    text = (ROOT / "examples" / "train_accelerate.py").read_text()
    *flags, script = re.search(r"``accelerate launch (.*)``", text)[1].split()
    out = launch(tmp_path, *flags, str(ROOT / script))
    found = re.findall(r"step (\d+) on (\d) processes: loss ([\d.]+)", out)
    steps, processes, losses = zip(*found, strict=True)  # and one of them prints
    assert steps == ("5", "10") and set(processes) == {"2"}
    assert float(losses[-1]) < float(losses[0]) - 0.5
    delta_changes_the_linears(tmp_path / "runs" / "accelerate" / "delta.safetensors")


def test_a_scheduler_is_not_taken_for_a_wrapper():
    losia = losia_pro.attach(toys.stack())
    optimizer = torch.optim.SGD(losia.parameters(), lr=LR)
    with pytest.raises(TypeError, match="got LambdaLR"):
        losia.bind(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))
