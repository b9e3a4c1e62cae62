"""Trainer on two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from test_trainer import STEPS
from trainer_ranks import LR, on_the_whole_batch

SCRIPT = Path(__file__).parent / "trainer_ranks.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


# fp32: a gradient passes fewer than 3000 rounded operations (3 blocks of 7 products, forward and backward, of up to 64
# terms; the head and the softmax), whose errors add up as their root, of terms below 1.
BOUND = STEPS * LR * 3000**0.5 * 2**-24


def test_two_processes_train_as_one_on_the_whole_batch(ranks, tmp_path):
    alone = on_the_whole_batch(tmp_path / "whole", 1)
    for end in (r["whole batch"] for r in ranks):
        assert end["step"] == STEPS and end["moves"] == alone["moves"]
        assert end["places"] == alone["places"]
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(end["weights"][name], weight, rtol=0, atol=BOUND)
    half = on_the_whole_batch(tmp_path / "half", 2)
    assert half["places"] != alone["places"]
    assert (
        max((half["weights"][n] - w).abs().max() for n, w in alone["weights"].items()) > 100 * BOUND
    )


def test_a_resumed_run_is_bitwise_the_one_that_was_not_stopped(ranks):
    for ends in ranks:
        assert ends["resumed"]["step"] == STEPS
        toys.equal_bits(ends["resumed"], ends["not stopped"])
        toys.equal_bits(ends["resumed"], ranks[0]["resumed"])
