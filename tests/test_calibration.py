"""First subnets chosen by the importance of a few batches."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from bound import LR, attached, backward, profiles

import losia_pro
from losia_pro import LosiaConfig, reference


def test_calibrated_start_takes_the_importance_of_the_batches():
    """The oracle accumulates dense gradients at the untouched weights and chooses by the same equations."""
    config = LosiaConfig(rank_factor=1 / 4, period=3, init="calibrate", output_factor=1 / 2)
    data = toys.batches(4, dtype=torch.float64)
    plain, model = toys.stack(torch.float64), toys.stack(torch.float64)
    losia = losia_pro.attach(model, config)
    losia.calibrate(data, toys.loss_of)
    toys.equal_bits(model.state_dict(), plain.state_dict())
    for n, m in losia.modules.items():
        w = plain.get_submodule(n).weight
        smooth = uncertain = torch.zeros_like(w)
        for batch in data:
            plain.zero_grad()
            backward(plain, batch)
            now = reference.importance(w.grad, w.detach())
            smooth = reference.smooth(smooth, now)
            uncertain = reference.uncertainty(uncertain, now, smooth)
        score = reference.score(smooth, uncertain)
        rows, columns = reference.select_best(score, *m.subnet.shape)
        assert toys.indices(losia)[n] == (rows.tolist(), columns.tolist()), n
        assert torch.equal(m.subnet, m.weight[rows][:, columns])
    assert [(r.step, r.name) for r in losia.history] == [(0, n) for n in losia.modules]
    assert not profiles(losia) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("at_once", [1, 2])
def test_calibrating_some_groups_at_a_time_gives_the_same_start(at_once):
    def start(given=list, **how):
        losia = losia_pro.attach(
            toys.stack(torch.float64), LosiaConfig(rank_factor=1 / 4, init="calibrate")
        )
        losia.calibrate(given(toys.batches(3, dtype=torch.float64)), toys.loss_of, **how)
        return toys.indices(losia)

    assert start(groups_at_once=at_once) == start() == start(iter, groups_at_once=at_once)


def test_calibration_comes_before_binding_and_training():
    model = toys.stack()
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, init="calibrate"))
    optimizer = torch.optim.SGD(losia.parameters(), lr=LR)
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match="calibrate"):
        losia.bind(optimizer)
    for none in ([], iter([])):
        with pytest.raises(ValueError, match="at least one batch"):
            losia.calibrate(none)
    for at_once in (0, -1):
        with pytest.raises(
            ValueError, match=f"groups_at_once must be .* at least 1, got {at_once}"
        ):
            losia.calibrate(toys.batches(1), toys.loss_of, groups_at_once=at_once)
    assert not optimizer._optimizer_step_post_hooks
    toys.assert_same(before, toys.snapshot(model))
    losia.calibrate(toys.batches(1), toys.loss_of)
    losia.bind(optimizer)
    list(toys.train(model, optimizer, toys.batches(1)))
    with pytest.raises(RuntimeError, match="before training"):
        losia.calibrate(toys.batches(1), toys.loss_of)


def test_calibrating_a_bound_random_start_leaves_the_first_slots_importance_clean():
    """Importance of the first slot counts from the first step, not from calibration."""
    model, losia, _ = attached()
    losia.calibrate(toys.batches(2, dtype=torch.float64), toys.loss_of)
    assert sorted(profiles(losia)) == sorted(losia.groups[0])
    for importance, uncertainty in profiles(losia).values():
        assert not importance.any() and not uncertainty.any()


def test_a_failing_calibration_leaves_no_importance_behind():
    model = toys.stack()
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4))
    start = toys.indices(losia)
    good = toys.batches(1)[0]
    with pytest.raises(ValueError, match="x must be"):
        losia.calibrate([good, (good[0][:, :-1], good[1])], toys.loss_of)
    assert toys.indices(losia) == start and not losia.history
    assert not profiles(losia) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bias_alone", [False, True])
def test_what_a_delta_brought_to_the_first_place_is_not_taken_for_the_base(bias_alone, tmp_path):
    """As with the same seed, subnets that stay put the delta where the second run's are at first."""
    base = toys.stack()
    config = LosiaConfig(rank_factor=1 / 4, period=None, train_bias=True)
    first = losia_pro.attach(copy.deepcopy(base), config)
    with torch.no_grad():
        for p in first.parameters():
            if p.dim() == 1 or not bias_alone:
                p.add_(1)
    first.save_delta(tmp_path / "delta")
    config = LosiaConfig(**{**config.to_dict(), "init": "calibrate"})
    losia = losia_pro.attach(copy.deepcopy(base), config)
    assert toys.indices(losia) == toys.indices(first)
    losia_pro.load_delta(losia.model, tmp_path / "delta")
    losia.calibrate(toys.batches(2), toys.loss_of)
    assert toys.indices(losia) != toys.indices(first)
    toys.equal_bits(losia.model.state_dict(), first.model.state_dict())
    with losia.base():
        toys.equal_bits(losia.model.state_dict(), base.state_dict())
