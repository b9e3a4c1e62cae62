"""``torch.distributed.checkpoint``: saved on some ranks, resumed on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import toys
from ranks import Run, Sharded, data, launch
from test_distributed import assert_equal
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from losia_pro import LosiaConfig
from losia_pro.sharded import local

STOPS = (5, 6)  # within a slot, and right after a re-selection


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-2)


def parts(run: Run) -> dict[str, Any]:
    """What a script saves, or has ready to load into."""
    model, optimizer = get_state_dict(run.model, run.optimizer)
    return {"model": model, "optimizer": optimizer, "losia": run.losia}


def load(run: Run, folder: str) -> None:
    state = parts(run)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def save(folder: str) -> None:
    for stop in STOPS:
        run = Sharded(make=adamw).bind().go(data()[:stop])
        dcp.save(parts(run), checkpoint_id=f"{folder}/{stop}")


def resume(folder: str) -> list[dict[str, Any]]:
    """Bound before the state is there, and after."""
    ends = []
    for stop in STOPS:
        for binds_first in (True, False):
            run = Sharded(make=adamw)
            if binds_first:
                run.bind()
            load(run, f"{folder}/{stop}")
            if not binds_first:
                run.bind()
            end = run.go(data()[stop:]).end()
            with run.losia.base():
                end["base"] = run.end_of_model()
            ends.append(end)
    return ends


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    launch(save, 3, folder / "ranks", str(folder))
    return str(folder)


@pytest.mark.parametrize("n", [2, 1])
def test_saved_on_three_ranks_a_run_goes_on_on_fewer(saved, n, tmp_path):
    alone = Run(make=adamw).bind().go(data()).end()
    for ends in launch(resume, n, tmp_path, saved):
        assert len(ends) == 4
        for end in ends:
            assert_equal(end, alone)
            toys.equal_bits(end["base"], dict(toys.stack(torch.float64).state_dict()))


def test_one_process_without_sharding_takes_it_too(saved):
    alone = Run(make=adamw).bind().go(data()).end()
    run = Run(make=adamw)
    load(run, f"{saved}/6")
    assert_equal(run.bind().go(data()[6:]).end(), alone)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_taking_the_optimizers_state_is_not_a_step(momentum):
    """The optimizer makes its state by a step, if it has none."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, 0.1, momentum)

    run, other = Run(make=sgd).bind(), Run(make=sgd).bind()
    for k, batch in enumerate(data()):
        other.optimizer.zero_grad()
        get_state_dict(other.model, other.optimizer)
        assert other.losia.step == k
        toys.equal_bits(other.go([batch]).end(), run.go([batch]).end())


def first_steps_of_a_warm_up() -> tuple[int, int]:
    """Two steps at a learning rate of 0 with subnets of one row, and how many entries of them are here."""
    config = LosiaConfig(in_factor=1 / 4, out_factor=1 / 24, period=3, target_modules=["up"])
    run = Sharded(config, lambda parameters: torch.optim.SGD(parameters, 0.0)).bind()
    run.go(data()[:2])
    return run.losia.step, sum(local(p).numel() for p in run.losia.parameters())


def test_a_step_at_a_learning_rate_of_zero_is_one_also_where_a_rank_has_no_gradient(tmp_path):
    """It looks like the optimizer's making of its state there."""
    assert launch(first_steps_of_a_warm_up, 2, tmp_path) == [(2, 3 * 4), (2, 0)]
