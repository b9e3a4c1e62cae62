"""Low precision: small updates arrive in a bf16 model, and autocast changes nothing but rounding."""

from __future__ import annotations

import pytest
import torch
import toys
from torch import nn

import losia_pro
from losia_pro import LosiaConfig

LR = 1e-2


def ones() -> nn.Sequential:
    """One linear whose weights are all 1 and whose gradients, on ``torch.eye``, are all 1."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False, dtype=torch.bfloat16))
    nn.init.ones_(model[0].weight)
    return model


def descend(model, optimizer):
    for _ in range(200):
        optimizer.zero_grad()
        model(torch.eye(8, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()


def test_small_updates_vanish_in_plain_bf16_training():
    model = ones()
    descend(model, torch.optim.SGD(model.parameters(), lr=1e-4))
    assert torch.equal(model[0].weight, ones()[0].weight)


@pytest.mark.parametrize(
    "config",
    [
        LosiaConfig(rank_factor=1 / 2, base_decay=0),
        LosiaConfig(
            rank_factor=1.0, period=50, rewarm=False, base_decay=0
        ),  # four moves in which every entry stays
    ],
    ids=["fixed", "moves"],
)
def test_small_updates_arrive_in_a_bf16_model(config):
    """200 updates of 1e-4 to a weight of 1.0."""
    model = ones()
    losia = losia_pro.attach(model, config)
    optimizer = torch.optim.SGD(losia.parameters(), lr=1e-4)
    losia.bind(optimizer)
    descend(model, optimizer)
    module = losia.modules["0"]
    assert module.subnet.dtype == torch.float32
    # 200 roundings of at most half an fp32 step below 1, and one to bf16, of half a bf16 step
    assert float((module.subnet.detach().double() - 0.98).abs().max()) <= 200 * 2**-25
    block = model[0].weight[module.out_idx][:, module.in_idx]
    assert float((block.double() - 0.98).abs().max()) <= 2**-9 + 200 * 2**-25


def test_subnet_keeps_what_bf16_rounds_away_across_a_move():
    """Entries that stay selected keep their exact value, so that small steps go on adding up."""
    model = toys.stack(torch.bfloat16)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 2, period=3, schedule="sync"))
    optimizer = torch.optim.SGD(losia.parameters(), lr=1e-3)
    losia.bind(optimizer)
    exact = {}
    for i, batch in enumerate(toys.batches(3)):
        optimizer.zero_grad()
        toys.loss_of(model, (batch[0].bfloat16(), batch[1])).backward()
        if i == 2:  # step by hand on a copy: the values before the move
            for n, m in losia.modules.items():
                full = torch.full(m.weight.shape, float("nan"))
                full[m.out_idx[:, None], m.in_idx] = m.subnet.detach() - 1e-3 * m.subnet.grad
                exact[n] = full
        optimizer.step()
    assert [r.step for r in losia.history] == [3] * 6
    kept = 0
    for n, m in losia.modules.items():
        was = exact[n][m.out_idx[:, None], m.in_idx]
        stay = ~was.isnan()
        torch.testing.assert_close(m.subnet[stay], was[stay], rtol=0, atol=1e-7)
        rounded = m.subnet[stay].bfloat16().float()
        kept += int((m.subnet[stay] != rounded).sum())
        assert torch.equal(m.weight, m.weight.clone().index_put_(
            (m.out_idx[:, None], m.in_idx), m.subnet.detach().bfloat16()))  # fmt: skip
    assert kept > 100


def test_model_under_autocast_trains_as_it_does_without_a_controller():
    """bf16 autocast around an fp32 model: compact gradients are the slices of the plain model's."""
    model, plain = toys.stack(), toys.stack()
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=2))
    optimizer = torch.optim.SGD(losia.parameters(), lr=LR)
    losia.bind(optimizer)
    batch = toys.batches(1)[0]
    for m in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = toys.loss_of(m, batch)
        loss.backward()
    for n, m in losia.modules.items():
        dense = plain.get_submodule(n).weight.grad[m.out_idx][:, m.in_idx]
        # the plain gradient is rounded to bf16 once, the compact one not: half a bf16 step apart
        # (and the sums of 8 products in another order)
        torch.testing.assert_close(m.subnet.grad, dense, rtol=2**-8, atol=2**-20)
