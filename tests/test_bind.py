"""Binding an optimizer: what cannot be bound is refused and changes nothing, and what was forgotten is said."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import toys
from bound import attached, hooks

import losia_pro
from losia_pro import LosiaConfig

TESTS = Path(__file__).parent


def bound():
    return attached(LosiaConfig(rank_factor=1 / 4, period=2), torch.float32)[1:]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


class ScheduleFree(torch.optim.SGD):
    """As the package schedulefree has them: training and evaluation are at different values."""

    def train(self): ...
    def eval(self): ...


BAD_OPTIMIZERS = {
    "nothing": (lambda losia: None, TypeError, "bind takes a torch.optim.Optimizer, got NoneType"),
    "parameters": (lambda losia: losia.parameters(), TypeError, "got list"),
    "scheduler": (
        lambda losia: torch.optim.lr_scheduler.ConstantLR(sgd(losia.parameters())),
        TypeError, "got ConstantLR",
    ),
    "lbfgs": (lambda losia: torch.optim.LBFGS(losia.parameters()), ValueError, "LBFGS keeps one flat history"),
    "schedule-free": (lambda losia: ScheduleFree(losia.parameters()), ValueError, "use AdamW with a scheduler"),
    "one subnet short": (
        lambda losia: sgd(losia.parameters()[:-1]), ValueError,
        "lacks 1 of 6 subnets, e.g. layers.2.down; create it with losia.parameters",
    ),
    "the dense weights": (
        lambda losia: sgd([m.weight for m in losia.modules.values()]), ValueError, "lacks 6 of 6 subnets",
    ),
    "another model's": (lambda losia: sgd(losia_pro.attach(toys.stack()).parameters()), ValueError, "lacks 6 of 6"),
}  # fmt: skip


@pytest.mark.parametrize("before", ["unbound", "bound"])
@pytest.mark.parametrize(
    ("make", "error", "message"), BAD_OPTIMIZERS.values(), ids=BAD_OPTIMIZERS.keys()
)
def test_an_optimizer_that_cannot_be_bound_changes_nothing(make, error, message, before):
    """Also not the optimizer that was bound before: training goes on with it."""
    losia, good = bound()
    if before == "unbound":
        losia = losia_pro.attach(toys.stack(), LosiaConfig(rank_factor=1 / 4, period=2))
    bad = make(losia)
    untouched = toys.snapshot(losia.model)
    with pytest.raises(error, match=message):
        losia.bind(bad)
    toys.assert_same(untouched, toys.snapshot(losia.model))
    if isinstance(bad, torch.optim.Optimizer):
        assert hooks(bad) == 0
    if before == "bound":
        assert hooks(good) == 2
        list(toys.train(losia.model, good, toys.batches(2)))
        assert losia.step == 2 and len(losia.history) == 2


@pytest.mark.parametrize("train_bias", [False, True])
def test_freezing_and_thawing_change_what_trains_but_not_what_an_optimizer_takes(train_bias):
    losia = losia_pro.attach(toys.stack(), LosiaConfig(period=2, train_bias=train_bias))
    taken = [id(p) for p in losia.parameters()]
    frozen_layer = losia.modules["layers.0.up"]
    frozen = frozen_layer.subnet
    losia.model.requires_grad_(True)  # as a loop may do that thaws a model: dense weights too
    frozen.requires_grad_(False)
    assert [id(p) for p in losia.parameters()] == taken
    losia.model.requires_grad_(False)
    for p in losia.parameters():
        p.requires_grad_(p is not frozen)
    optimizer = torch.optim.AdamW(losia.parameters(), lr=0.1)
    losia.bind(optimizer)
    before = {n: m.subnet.detach().clone() for n, m in losia.modules.items()}
    list(toys.train(losia.model, optimizer, toys.batches(1)))
    changed = {n for n, m in losia.modules.items() if not torch.equal(m.subnet, before[n])}
    assert changed == losia.modules.keys() - {"layers.0.up"}
    weight = frozen_layer.weight.clone()
    list(
        toys.train(losia.model, optimizer, toys.batches(9))
    )  # each block is profiled once, and more
    assert torch.equal(frozen_layer.weight, weight) and len(losia.history) == 10


def test_frozen_subnets_that_an_optimizer_leaves_out_are_named_as_such():
    losia = losia_pro.attach(toys.stack(), LosiaConfig(rank_factor=1 / 4))
    losia.model.requires_grad_(False)
    optimizer = sgd([torch.nn.Parameter(torch.zeros(1))])  # as Trainer makes one
    with pytest.raises(ValueError, match="6 of 6 subnets are frozen.*is_trainable=True"):
        losia.bind(optimizer)


def test_binding_another_optimizer_releases_the_last():
    losia, first = bound()
    second = sgd(losia.parameters())
    losia.bind(second)
    assert (hooks(first), hooks(second)) == (0, 2)
    losia.bind(second)
    assert hooks(second) == 2
    list(toys.train(losia.model, second, toys.batches(2)))
    assert losia.step == 2


class Reader(torch.nn.Module):
    """Reads the weight of one of its linears, and calls the other."""

    def __init__(self):
        super().__init__()
        self.read, self.called = torch.nn.Linear(16, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        return self.called(torch.nn.functional.linear(x, self.read.weight))


def test_subnets_without_a_gradient_are_named_once():
    """What would be a fast path that trains nothing: nn.TransformerEncoder's in eval(), for one."""
    model, losia, optimizer = attached(model=Reader(), config=LosiaConfig(rank_factor=1 / 4))
    with pytest.warns(UserWarning, match="1 of 2 subnets have no gradient.*, e.g. read, "):
        list(toys.train(model, optimizer, toys.batches(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(toys.train(model, optimizer, toys.batches(1)))
        model, _, optimizer = attached(model=losia.detach())
        model.get_submodule("read").subnet.requires_grad_(False)  # on purpose
        list(toys.train(model, optimizer, toys.batches(1)))


UNBOUND = """
import sys, warnings
import torch, toys, losia_pro
warnings.simplefilter("always")
losia = losia_pro.attach(toys.stack())
optimizer = torch.optim.SGD(losia.parameters(), lr=0.1, fused="fused" in sys.argv)
if "bind" in sys.argv:
    losia.bind(optimizer)
with warnings.catch_warnings(record=True) as caught:
    list(toys.train(losia.model, optimizer, toys.batches(4)))
print([str(w.message) for w in caught])
"""


@pytest.mark.parametrize("fused", [[], ["fused"]], ids=["", "fused"])
@pytest.mark.parametrize("bind", [True, False], ids=["bound", "unbound"])
def test_stepping_an_unbound_model_warns_once(bind, fused):
    """In a process of its own: "once" is once a process."""
    done = subprocess.run(
        [sys.executable, "-c", UNBOUND, *(["bind"] if bind else []), *fused],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.count("bind the optimizer with losia.bind(optimizer)") == (0 if bind else 1)
