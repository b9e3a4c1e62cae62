"""Decay towards the base: the equation, over moves and rewarming, for any optimizer, and where nothing may decay."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import toys
from bound import attached
from runs import STEPS, Run
from torch import nn

import losia_pro
from losia_pro import LosiaConfig, optim
from losia_pro.base import Touched

DECAY = 0.5
CONFIG = LosiaConfig(rank_factor=1 / 4, period=3, output_factor=1 / 2, base_decay=DECAY)


def train(config, lr, steps=STEPS, head_lr=None):
    """A run in fp64 under SGD, and its base; ``see(losia)`` before each step."""
    model = toys.stack(torch.float64)
    base = copy.deepcopy(model.state_dict())
    losia = losia_pro.attach(model, config)
    head = [losia.modules[n].subnet for n in losia.groups[-1]]
    others = [p for p in losia.parameters() if not any(p is h for h in head)]
    groups = [{"params": others}, {"params": head, "lr": head_lr or lr}]
    optimizer = torch.optim.SGD(groups, lr=lr)
    losia.bind(optimizer)
    for batch in toys.batches(steps, dtype=torch.float64):
        optimizer.zero_grad()
        toys.loss_of(model, batch).backward()
        yield losia, base
        optimizer.step()
    yield losia, base


@pytest.mark.parametrize("rewarm", [True, False])
def test_each_step_is_the_plain_one_and_then_the_pull_at_the_groups_own_rate(rewarm):
    """Over three moves of each kind; rewarmed, the whole of it is scaled."""
    config = LosiaConfig(**{**CONFIG.to_dict(), "rewarm": rewarm})
    expected: dict[str, torch.Tensor] = {}
    moved = 0
    for losia, base in train(config, lr=0.1, steps=22, head_lr=0.03):
        for group, names in enumerate(losia.groups):
            lr = 0.03 if group == len(losia.groups) - 1 else 0.1
            factor = losia.schedule.rewarm(losia.step, group) if rewarm else 1.0
            for name in names:
                m = losia.modules[name]
                at = (m.out_idx[:, None], m.in_idx)
                if name in expected:
                    dense = expected[name]
                    torch.testing.assert_close(m.weight.detach(), dense, rtol=1e-12, atol=1e-15)
                moved += (losia.step, name) in {(r.step, r.name) for r in losia.history}
                old = m.weight.detach().clone()
                stepped = old[at] - lr * m.subnet.grad
                pulled = stepped - lr * DECAY * (stepped - base[f"{name}.weight"][at])
                old[at] += factor * (pulled - old[at])
                expected[name] = old
    assert moved > len(losia.modules)


def test_without_gradient_signal_subnets_come_back_to_the_base():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1, period=None, base_decay=DECAY))
    m = losia.modules["0"]
    base = m.weight.detach().clone()
    optimizer = torch.optim.AdamW(losia.parameters(), lr=0.1, weight_decay=0)
    losia.bind(optimizer)
    with torch.no_grad():
        m.subnet.add_(1)
    for k in range(1, 4):
        m.subnet.grad = torch.zeros_like(m.subnet)
        optimizer.step()
        away = m.weight.detach() - base
        torch.testing.assert_close(away, torch.full_like(away, 0.95**k), rtol=1e-5, atol=1e-6)


def test_entries_that_are_the_bases_stay_so_bit_for_bit():
    losia, base = next(train(CONFIG, lr=0.1))
    for p in losia.parameters():
        p.grad.zero_()
    losia._optimizer.step()
    for name, m in losia.modules.items():
        assert torch.equal(m.weight, base[f"{name}.weight"])


def test_a_subnet_without_a_gradient_does_not_decay():
    """As in PyTorch's own optimizers."""
    losia, _ = next(train(CONFIG, lr=0.1))
    first, *_, last = losia.modules.values()
    for m in (first, last):
        with torch.no_grad():
            m.subnet.add_(1)
    before = last.subnet.detach().clone()
    first.subnet.grad.zero_()
    stays = first.subnet.detach().clone()
    last.subnet.grad = None
    losia._optimizer.step()
    assert torch.equal(last.subnet, before)
    assert not torch.equal(first.subnet, stays)


def test_a_step_that_an_overflow_undoes_does_not_decay():
    model = toys.stack(torch.float32)
    losia = losia_pro.attach(model, CONFIG)
    optimizer = torch.optim.AdamW(losia.parameters(), lr=0.1, fused=True)
    losia.bind(optimizer)
    with torch.no_grad():
        for m in losia.modules.values():
            m.subnet.add_(1)
    losia.write_back()
    before = {n: m.subnet.detach().clone() for n, m in losia.modules.items()}
    toys.loss_of(model, toys.batches(1)[0]).backward()
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    optimizer.step()
    for n, m in losia.modules.items():
        assert torch.equal(m.subnet, before[n])


def test_bf16_subnets_decay_on_the_mean():
    """By less than half their spacing a step, which rounding to nearest would lose."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
    nn.init.ones_(model[0].weight)
    config = LosiaConfig(rank_factor=1, period=None, base_decay=DECAY, subnet_dtype="bfloat16")
    losia = losia_pro.attach(model, config)
    optimizer = optim.AdamW(losia.parameters(), lr=2**-10, weight_decay=0)
    losia.bind(optimizer)
    subnet = losia.modules["0"].subnet
    with torch.no_grad():
        subnet.fill_(2)
    subnet.grad = torch.zeros_like(subnet)
    steps = 64
    for _ in range(steps):
        optimizer.step()
    mean = 1 + (1 - DECAY * 2**-10) ** steps
    spread = (
        2**-8 * (steps / subnet.numel()) ** 0.5
    )  # a rounding's error is below the spacing of 1..2
    assert abs(float(subnet.detach().double().mean()) - mean) < 5 * spread < (2 - mean) / 2


SHORT = LosiaConfig(**{**CONFIG.to_dict(), "subnet_dtype": "bfloat16", "rewarm": False})


def test_resume_is_bitwise_equal_and_another_decay_is_refused():
    """The base's values come with the state: the weights that are loaded are tuned ones."""
    whole = Run(CONFIG).bind().go(0, STEPS)
    plain = Run(LosiaConfig(**{**CONFIG.to_dict(), "base_decay": 0.0}))
    for stop in (2, 5, 10):
        saved = Run(CONFIG).bind().go(0, stop).save()
        toys.equal_bits(Run(CONFIG, seed=1).load(saved).bind().go(stop, STEPS).end(), whole.end())
    with pytest.raises(ValueError, match="base_decay=0.5, this run has base_decay=0.0"):
        plain.load(saved)


def test_the_bases_values_at_a_place_come_from_every_place_before():
    torch.manual_seed(0)
    base = torch.randn(12, 10)
    weight, touched = base.clone(), Touched()
    for _ in range(5):
        rows, columns = (torch.randperm(n)[:4].sort().values for n in weight.shape)
        touched.add(weight, rows, columns)
        weight[rows[:, None], columns] += 1
        assert torch.equal(touched.values_at(rows, columns), base[rows[:, None], columns])
    assert len(touched.values) > 2


def test_a_learning_rate_in_a_tensor_gives_bf16_subnets_the_same_bits():
    ends = []
    for lr in (2**-4, torch.tensor(2**-4)):
        run = Run(SHORT, make=lambda p, lr=lr: optim.AdamW(p, lr=lr)).bind()
        ends.append(run.go(0, 4).model.state_dict())
    toys.equal_bits(*ends)


def test_a_subnet_that_the_loop_moves_decays_to_the_base_where_it_is():
    base = toys.stack(torch.float64)
    model = copy.deepcopy(base)
    config = LosiaConfig(rank_factor=1 / 4, base_decay=DECAY)
    losia = losia_pro.attach(model, config)
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.1)
    losia.bind(optimizer)
    for batch in toys.batches(3, dtype=torch.float64):
        list(toys.train(model, optimizer, [batch]))
        for m in losia.modules.values():
            out_idx, in_idx = (m.out_idx + 1) % m.out_features, (m.in_idx + 1) % m.in_features
            m.select(out_idx, in_idx)
            with torch.no_grad():
                m.subnet.add_(1)
            m.subnet.grad = torch.zeros_like(m.subnet)
        losia.write_back()
        before = toys.weights(losia)
        optimizer.step()
        for name, m in losia.modules.items():
            at, was = (m.out_idx[:, None], m.in_idx), base.get_submodule(name).weight.detach()
            want = before[name].clone()
            want[at] -= 0.1 * DECAY * (want[at] - was[at])
            torch.testing.assert_close(m.weight.detach(), want, rtol=1e-12, atol=1e-15)
    with losia.base():
        toys.equal_bits(model.state_dict(), base.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_in_a_tensor_is_read_where_it_is(dtype):
    ends = []
    for lr in (2**-4, torch.tensor(2**-4)):
        model = toys.stack(dtype)
        losia = losia_pro.attach(model, CONFIG)
        optimizer = torch.optim.AdamW(losia.parameters(), lr=lr, foreach=False)
        losia.bind(optimizer)
        list(toys.train(model, optimizer, toys.batches(4, dtype=dtype)))
        ends.append(model.state_dict())
    for a, b in zip(*(end.values() for end in ends), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Rateless(torch.optim.Optimizer):
    """It finds its own rate, as transformers' Adafactor can."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": None})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=-0.1)


def test_an_optimizer_without_a_learning_rate_trains_without_decay_alone():
    def bound(kind, decay, **rate):
        losia = losia_pro.attach(toys.stack(), LosiaConfig(rank_factor=1 / 4, base_decay=decay))
        optimizer = kind(losia.parameters(), **rate)
        losia.bind(optimizer)
        return losia.model, list(toys.train(losia.model, optimizer, toys.batches(3)))

    with pytest.raises(ValueError, match="base_decay=0.5 is per learning rate, and Rateless was"):
        bound(Rateless, DECAY)
    (found, losses), (same, wanted) = bound(Rateless, 0.0), bound(torch.optim.SGD, 0.0, lr=0.1)
    assert losses == wanted
    toys.equal_bits(found.state_dict(), same.state_dict())


@pytest.mark.parametrize("loaded", ["nothing", "the same", "others", "a run"])
def test_weights_loaded_after_attach_are_not_what_decay_pulls_towards(loaded):
    """Which a loop is told, but where they are those of a run that goes on."""
    model, losia, optimizer = attached(LosiaConfig(), torch.float32)
    if loaded == "others":
        model.load_state_dict(toys.stack(seed=1).state_dict())
    elif loaded == "the same":
        model.load_state_dict(toys.stack().state_dict())
    elif loaded == "a run":
        other, run, trains = attached(LosiaConfig(), torch.float32)
        list(toys.train(other, trains, toys.batches(2)))
        losia.load_state_dict(run.state_dict())
        model.load_state_dict(other.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(toys.train(model, optimizer, toys.batches(2)))
    told = [
        "weights were loaded after attach(), e.g. layers.0.up's" in str(w.message) for w in caught
    ]
    assert sum(told) == (loaded == "others")
