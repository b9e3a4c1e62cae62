"""``losia-pro finetune`` on two GPUs, as torchrun starts it."""

from __future__ import annotations

import pytest
import torch
from cli_tools import finetune, make_data, make_model, record
from test_trainer_ranks import torchrun

FLAGS = ("--steps", 12, "--batch-size", 4, "--period", 3, "--rank-factor", 0.25, "--eval-steps", 4)
FLAGS = (*FLAGS, "--lr", "1e-2", "--precision", "fp32")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_two_gpus_train_as_one_on_batches_of_both(tmp_path):
    base = "--model", make_model(tmp_path / "model"), "--data", make_data(tmp_path / "data")
    flags = [str(f) for f in (*base, *FLAGS, "--output", tmp_path / "both")]
    torchrun(tmp_path, "--nproc_per_node", "2", "-m", "losia_pro", "finetune", *flags)
    assert finetune(*base, *FLAGS, "--accumulation", 2, "--output", tmp_path / "one") == 0
    assert finetune(*base, *FLAGS, "--output", tmp_path / "half") == 0
    both, one, half = (record(tmp_path / name) for name in ("both", "one", "half"))
    moves = [[(r["step"], r["name"]) for r in run["reselections"]] for run in (both, one)]
    assert both["processes"] == 2 and moves[0] == moves[1]
    losses = [run["results"]["losia-pro"]["loss"] for run in (both, one, half)]
    # Far closer to one GPU on both batches than that is to one GPU on half of them.
    assert abs(losses[0] - losses[1]) < abs(losses[2] - losses[1]) / 10
