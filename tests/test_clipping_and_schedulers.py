"""Clipping and schedulers see ordinary parameters, and importance sees neither."""

from __future__ import annotations

import pytest
import torch
import toys
from bound import LR, attached, backward, profiles
from torch import nn

import losia_pro
from losia_pro import LosiaConfig


def test_clipping_clips_the_compact_norm_and_leaves_importance():
    batch = toys.batches(1, dtype=torch.float64)[0]

    def step(limit):
        config = LosiaConfig(rank_factor=1 / 4, period=4, base_decay=0)
        model, losia, optimizer = attached(config, optimizer=lambda p: torch.optim.SGD(p, lr=LR))
        optimizer.zero_grad()
        backward(model, batch)
        before = {n: m.subnet.detach().clone() for n, m in losia.modules.items()}
        norm = None
        if limit is not None:
            norm = nn.utils.clip_grad_norm_(losia.parameters(), limit)
        optimizer.step()
        moved = [m.subnet.detach() - before[n] for n, m in losia.modules.items()]
        return losia, norm, float(torch.cat([d.flatten() for d in moved]).norm())

    plain_model = toys.stack(torch.float64)
    backward(plain_model, batch)
    free, _, _ = step(None)
    slices = [
        plain_model.get_submodule(n).weight.grad[m.out_idx][:, m.in_idx].flatten()
        for n, m in free.modules.items()
    ]
    compact_norm = float(torch.cat(slices).norm())
    clipped, norm, moved = step(compact_norm / 10)
    assert float(norm) == pytest.approx(compact_norm, rel=1e-12)
    # clip_grad_norm_ divides by norm + 1e-6
    assert moved == pytest.approx(LR * compact_norm / 10, rel=2e-6 / compact_norm)
    toys.equal_bits(profiles(clipped), profiles(free))


SCHEDULES = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20, eta_min=1e-3),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=30, cycle_momentum=False
    ),
    "warm-up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, (t + 1) / 7)),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedulers_rates_are_those_any_parameter_gets(make):
    """Through moves and rewarming, for two groups of different rates; and the steps really use them."""
    model = toys.stack(torch.float64)
    losia = losia_pro.attach(
        model, LosiaConfig(rank_factor=1 / 4, period=3, rewarm=False, base_decay=0)
    )
    ps = losia.parameters()
    groups = [{"params": ps[:2], "lr": LR}, {"params": ps[2:], "lr": 3 * LR}]
    optimizer = torch.optim.SGD(groups, lr=LR)
    losia.bind(optimizer)
    ordinary = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    other = torch.optim.SGD(
        [{"params": [ordinary[0]], "lr": LR}, {"params": [ordinary[1]], "lr": 3 * LR}], lr=LR
    )
    schedule, expected = make(optimizer), make(other)
    for batch in toys.batches(24, dtype=torch.float64):
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]
        optimizer.zero_grad()
        backward(model, batch)
        rates = [other.param_groups[0]["lr"]] * 2 + [other.param_groups[1]["lr"]] * (len(ps) - 2)
        aims = [p.detach() - lr * p.grad for p, lr in zip(ps, rates, strict=True)]
        moved = losia.schedule.reselected(losia.step)
        optimizer.step()
        for i, (p, aim) in enumerate(zip(ps, aims, strict=True)):
            if not moved or list(losia.modules)[i] not in losia.groups[moved[0]]:
                torch.testing.assert_close(p.detach(), aim, rtol=1e-14, atol=1e-15)
        other.step()
        schedule.step()
        expected.step()
    assert losia.history
