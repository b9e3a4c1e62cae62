"""Trainer and the examples' loops on two processes, as torchrun starts them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from test_trainer import STEPS
from trainer_ranks import LR, end, on_the_whole_batch
from transformers import AutoModelForCausalLM

import losia_pro

SCRIPT = Path(__file__).parent / "trainer_ranks.py"
EXAMPLES = SCRIPT.parent.parent / "examples"


def launched(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """``torchrun`` in ``folder``, with a port that is free."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *flags], cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        text=True, capture_output=True, timeout=300,
    )  # fmt: skip


def torchrun(folder: Path, *flags: str) -> str:
    """What it prints."""
    done = launched(folder, *flags)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(folder, "--nproc_per_node", "2", str(SCRIPT), str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


# fp32: a gradient passes fewer than 3000 rounded operations (3 blocks of 7 products, forward and backward, of up to 64
# terms; the head and the softmax), whose errors add up as their root, of terms below 1.
BOUND = STEPS * LR * 3000**0.5 * 2**-24


def test_two_processes_train_as_one_on_the_whole_batch(ranks, tmp_path):
    alone = end(*on_the_whole_batch(tmp_path / "whole", 1))
    for both in (r["whole batch"] for r in ranks):
        assert both["step"] == STEPS and both["moves"] == alone["moves"]
        assert both["places"] == alone["places"]
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(both["weights"][name], weight, rtol=0, atol=BOUND)
    half = end(*on_the_whole_batch(tmp_path / "half", 2))
    assert half["places"] != alone["places"]
    assert (
        max((half["weights"][n] - w).abs().max() for n, w in alone["weights"].items()) > 100 * BOUND
    )


def test_a_resumed_run_is_bitwise_the_one_that_was_not_stopped(ranks):
    for ends in ranks:
        assert ends["resumed"]["step"] == STEPS
        toys.equal_bits(ends["resumed"], ends["not stopped"])
        toys.equal_bits(ends["resumed"], ranks[0]["resumed"])


def test_a_peft_model_is_trained_alike(ranks):
    for ends in ranks:
        toys.equal_bits(ends["peft"], ends["not stopped"])


def delta_changes_the_linears(path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny-llama", dtype=torch.float32)
    before = {n: w.detach().clone() for n, w in model.named_parameters()}
    losia_pro.load_delta(model, path)
    changed = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
    assert changed == {n for n in before if "proj" in n}


def printed_command(example: str) -> list[str]:
    printed = re.search(r"``torchrun (.*) examples/(.*)``", (EXAMPLES / example).read_text())
    assert printed[2] == example
    return [*printed[1].split(), str(EXAMPLES / example)]


def test_the_example_runs_as_printed(tmp_path):
    out = torchrun(tmp_path, *printed_command("train_ddp.py"))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    delta_changes_the_linears(tmp_path / "runs" / "ddp.safetensors")


def test_the_sharded_example_runs_as_printed_and_goes_on_from_its_checkpoint(tmp_path):
    command = printed_command("train_fsdp.py")
    out = torchrun(tmp_path, *command)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    delta_changes_the_linears(tmp_path / "runs" / "fsdp.safetensors")
    out = torchrun(tmp_path, "--nproc_per_node", "1", command[-1])
    assert re.findall(r"step (\d+): .* (\d+) linears", out) == [("15", "21"), ("20", "28")]
    delta_changes_the_linears(tmp_path / "runs" / "fsdp.safetensors")
