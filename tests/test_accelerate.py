"""``accelerate launch`` of a plain loop on one and on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from accelerate_loop import BOUND, LR, STEPS

import losia_pro

SCRIPT = Path(__file__).parent / "accelerate_loop.py"


def launch(folder: Path, processes: int) -> list[dict]:
    """``--cpu`` starts several processes through MPI alone; ``--multi_gpu`` does as torchrun, and the script's
    ``Accelerator(cpu=True)`` keeps them on the CPU."""
    kind = "--cpu" if processes == 1 else "--multi_gpu"
    flags = [
        kind,
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *flags, str(SCRIPT), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)]


def test_one_and_two_processes_train_alike(tmp_path):
    ends = [launch(tmp_path, 1), launch(tmp_path, 2)]
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


def test_a_scheduler_is_not_taken_for_a_wrapper():
    losia = losia_pro.attach(toys.stack())
    optimizer = torch.optim.SGD(losia.parameters(), lr=LR)
    with pytest.raises(TypeError, match="got LambdaLR"):
        losia.bind(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))
