"""After a re-selection: the optimizer's state starts afresh, and the learning rate is rewarmed."""

from __future__ import annotations

import pytest
import torch
import toys

import losia_pro
from losia_pro import LosiaConfig

LR = 1e-2


EVERY = {
    name: getattr(torch.optim, name)
    for name in (
        "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam",
        "RMSprop", "Rprop", "SGD",
    )
}  # fmt: skip


MOMENTUM = {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5}


@pytest.mark.parametrize(
    ("kind", "more"),
    [(kind, {}) for kind in EVERY.values()] + [(torch.optim.SGD, more) for more in MOMENTUM],
    ids=[*EVERY, "SGD-nesterov", "SGD-dampening"],
)
def test_after_a_move_every_optimizer_steps_as_if_it_were_new(kind, more):
    """The step after a re-selection equals the first step of a fresh optimizer on the moved subnets."""
    data = toys.batches(9, dtype=torch.float64)
    model = toys.stack(torch.float64)
    config = LosiaConfig(rank_factor=1 / 4, period=8, rewarm=False, base_decay=0.0)
    losia = losia_pro.attach(model, config)
    optimizer = kind(losia.parameters(), lr=LR, **more)
    losia.bind(optimizer)
    for _ in toys.train(model, optimizer, data[:8]):
        pass
    assert [r.name for r in losia.history] == ["layers.0.up", "layers.0.down"]
    fresh = {n: m.subnet.detach().clone().requires_grad_() for n, m in losia.modules.items()}
    optimizer.zero_grad()
    toys.loss_of(model, data[8]).backward()
    for n, m in losia.modules.items():
        fresh[n].grad = m.subnet.grad.clone()
    optimizer.step()
    kind(list(fresh.values()), lr=LR, **more).step()
    for n, m in losia.modules.items():
        moved = n.startswith("layers.0.")
        stateless = kind is torch.optim.SGD and not more  # without momentum
        assert torch.equal(m.subnet, fresh[n]) == (moved or stateless), n


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.NAdam], ids=lambda m: m.__name__)
def test_state_of_moved_subnets_is_gone_and_of_the_others_intact(make):
    """Gone, or zero throughout where that is how it begins."""
    data = toys.batches(6)
    model = toys.stack()
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=6))
    optimizer = make(losia.parameters(), lr=LR)
    losia.bind(optimizer)
    for _ in toys.train(model, optimizer, data):
        pass
    assert losia.history
    for n, m in losia.modules.items():
        if n.startswith("layers.0."):
            assert (m.subnet in optimizer.state) == (make is torch.optim.AdamW)
            assert not any(v.any() for v in optimizer.state.get(m.subnet, {}).values())
        else:
            assert optimizer.state[m.subnet]["step"] == 6
            assert float(optimizer.state[m.subnet]["exp_avg"].abs().sum()) > 0


def test_first_steps_after_a_move_are_no_larger_than_adams():
    """Adam's first steps are bounded by lr; with the moments cleared but not the count they are 3 to 7 times that."""
    data = toys.batches(14)
    model = toys.stack()
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=7, rewarm=False))
    optimizer = torch.optim.Adam(losia.parameters(), lr=LR)
    losia.bind(optimizer)
    loop = toys.train(model, optimizer, data)
    for _ in range(7):
        next(loop)
    before = toys.weights(losia)
    next(loop)
    after = toys.weights(losia)
    for n in losia.groups[0]:
        largest = float((after[n] - before[n]).abs().max())
        assert 0.5 * LR < largest <= LR * (1 + 1e-5)


def test_rewarming_scales_the_learning_rate_from_the_first_reselection_on():
    """SGD's step is lr times the gradient, so the factor can be read off each step."""
    period, data = 4, toys.batches(20, dtype=torch.float64)
    model = toys.stack(torch.float64)
    config = LosiaConfig(rank_factor=1 / 4, period=period, base_decay=0.0)
    losia = losia_pro.attach(model, config)
    optimizer = torch.optim.SGD(losia.parameters(), lr=LR)
    losia.bind(optimizer)
    factors: dict[str, list[float]] = {n: [] for n in losia.modules}
    for batch in data:
        optimizer.zero_grad()
        toys.loss_of(model, batch).backward()
        grads = {n: m.subnet.grad.clone() for n, m in losia.modules.items()}
        at = toys.places(losia)
        before = toys.weights(losia)
        optimizer.step()
        for n, m in losia.modules.items():
            change = (m.weight.detach() - before[n])[at[n][0]][:, at[n][1]]
            factors[n].append(float(-(change * grads[n]).sum() / grads[n].square().sum() / LR))
    ramp, one = [0.25, 0.5, 0.75, 1.0], [1.0] * 4
    expected = {
        0: [one, ramp, one, one, ramp],
        1: [one, one, ramp, one, one],
        2: [one] * 3 + [ramp, one],
    }
    for group, names in enumerate(losia.groups):
        for n in names:
            assert factors[n] == pytest.approx(sum(expected[group], []), rel=1e-9), n
