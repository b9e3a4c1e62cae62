"""Neurons in aligned runs, and whole sides: what the layer tells the kernels is true, and nothing else changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import toys
from operators import Operators

import losia_pro
from losia_pro import LosiaConfig, SubnetLinear, dispatch

SETTINGS = {
    "runs": {"rank_factor": 1 / 2, "neuron_group": 4},
    "runs of whole outputs": {"in_factor": 1 / 4, "out_factor": 1.0, "neuron_group": 4},
    "whole outputs": {"in_factor": 1 / 8, "out_factor": 1.0},
    "whole inputs": {"in_factor": 1.0, "out_factor": 1 / 8},
    "all": {"rank_factor": 1.0},
}


def ours(ops: Operators) -> list[tuple[str, int, int]]:
    """The calls of gather_columns and subnet_grad: name, ``group``, number of columns."""
    return [
        (name.split("::")[1], kwargs.get("group", 1), args[0].shape[1])
        for name, args, kwargs in ops.calls
        if name in ("losia_pro::gather_columns", "losia_pro::subnet_grad")
    ]


def aligned(idx: torch.Tensor, group: int) -> bool:
    runs = idx.view(-1, group)
    return bool((runs[:, 0] % group == 0).all()) and torch.equal(
        runs, runs[:, :1] + torch.arange(group)
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_kernels_are_told_of_the_indices_is_true_before_and_after_moves(settings, monkeypatch):
    monkeypatch.setattr(dispatch, "DEBUG", True)  # the ops check it
    model = toys.stack()
    losia = losia_pro.attach(model, LosiaConfig(**{"rank_factor": 1 / 8, "period": 2, **settings}))
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.1)
    losia.bind(optimizer)
    for _ in range(2):
        for module in losia.modules.values():
            for idx, group in zip((module.out_idx, module.in_idx), module.groups, strict=True):
                assert aligned(idx, group)
        list(toys.train(model, optimizer, toys.batches(6)))
    assert len({r.step for r in losia.history}) == 6


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_gradient_is_the_dense_ones_slice(settings):
    model, plain = toys.stack(), toys.stack()
    losia = losia_pro.attach(model, LosiaConfig(**{"rank_factor": 1 / 8, **settings}))
    batch = toys.batches(1)[0]
    toys.loss_of(model, batch).backward()
    toys.loss_of(plain, batch).backward()
    for name, m in losia.modules.items():
        dense = plain.get_submodule(name).weight.grad[m.out_idx][:, m.in_idx]
        torch.testing.assert_close(m.subnet.grad, dense, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shared", [False, True])
def test_by_default_inputs_come_in_runs_of_16_where_there_are_three_or_more(shared, monkeypatch):
    """Before and after moves; the output head, and small layers, have single neurons."""
    monkeypatch.setattr(dispatch, "DEBUG", True)
    model, batches = toys.stack(width=512, hidden=100), toys.batches(4, width=512)
    config = LosiaConfig(period=1, output_factor=0.4, share_inputs=shared)
    losia = losia_pro.attach(model, config, example=batches[0][:1] if shared else None)
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.1)
    losia.bind(optimizer)
    up, down, head = model.layers[0].up, model.layers[0].down, model.head
    assert [up.groups[1], down.groups[1], head.groups] == [16, 1, (1, 512)]
    assert [m.subnet.shape for m in (up, down, head)] == [(100, 48), (512, 9), (3, 512)]
    first = {m: m.in_idx.clone() for m in (up, down)}
    list(toys.train(model, optimizer, batches))
    assert len(losia.history) == 7
    for m, idx in first.items():
        assert aligned(m.in_idx, m.groups[1]) and not torch.equal(m.in_idx, idx)


def test_a_size_of_ones_own_is_of_single_neurons_unless_runs_are_asked_for():
    for size in ({"rank_factor": 1 / 8}, {"in_factor": 3 / 32}, {"out_factor": 1.0}):
        config = LosiaConfig(**size)
        assert config.group(4096) == 1
        back = dataclasses.replace(config, **dict.fromkeys(size))
        assert back == LosiaConfig() and back.group(4096) == 16
    assert LosiaConfig(neuron_group=1).n_in(1000) == 93
    assert [LosiaConfig().n_in(n) for n in (511, 512, 1000, 4096)] == [47, 48, 80, 384]
    assert LosiaConfig(neuron_group=8).n_in(1000) == 88


@pytest.mark.parametrize("width, group", [(512, 16), (64, 1)])
def test_a_state_of_the_same_runs_is_taken_however_they_were_asked_for(width, group):
    def attached(config: LosiaConfig) -> losia_pro.Losia:
        return losia_pro.attach(toys.stack(width=width, hidden=width), config)

    default = attached(LosiaConfig(seed=1))
    for settings in ({"neuron_group": group}, {"in_factor": 3 / 32, "neuron_group": group}):
        same = attached(LosiaConfig(**{"out_factor": 1.0, **settings}))
        same.load_state_dict(default.state_dict())
        assert toys.indices(same) == toys.indices(default)
    others = {3 * group: {"neuron_group": 3 * group}, 1: {"in_factor": 3 / 32}}
    for run, settings in others.items():
        if run != group:
            said = (
                rf"in runs of {width} and {group} \(neuron_group\), this run of {width} and {run}$"
            )
            with pytest.raises(ValueError, match=said):
                attached(LosiaConfig(**settings)).load_state_dict(default.state_dict())


def test_whole_sides_are_neither_gathered_nor_copied():
    x, kept = torch.randn(5, 16), []
    layer = SubnetLinear.from_linear(torch.nn.Linear(16, 24), n_in=16, n_out=3)
    with (
        Operators() as ops,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        layer(x).sum().backward()
    assert ours(ops) == [("subnet_grad", 1, 24)]
    assert x.data_ptr() in {t.data_ptr() for t in kept}
    layer = SubnetLinear.from_linear(torch.nn.Linear(16, 24), n_in=2, n_out=24)
    with Operators() as ops:
        layer(x).sum().backward()
    assert ours(ops) == [("gather_columns", 1, 16), ("subnet_grad", 24, 24)]


def test_runs_that_do_not_fill_a_layer_leave_its_last_neurons_out():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        layer = SubnetLinear.from_linear(
            torch.nn.Linear(19, 19), n_in=8, n_out=12, neuron_group=4, generator=g
        )
        assert aligned(layer.in_idx, 4) and aligned(layer.out_idx, 4)
        assert int(layer.in_idx.max()) < 16 and int(layer.out_idx.max()) < 16


@pytest.mark.parametrize(
    "bad", [[1, 2, 3, 4, 8, 9, 10, 11], [0, 1, 2, 3, 8, 9, 10, 12]], ids=["shifted", "torn"]
)
def test_indices_that_are_no_aligned_runs_are_refused(bad):
    layer = SubnetLinear.from_linear(torch.nn.Linear(16, 16), n_in=8, n_out=8, neuron_group=4)
    good, before = torch.tensor([0, 1, 2, 3, 12, 13, 14, 15]), layer.out_idx.clone()
    with pytest.raises(ValueError, match="in_idx must be aligned runs of 4"):
        layer.select(good, torch.tensor(bad))
    assert torch.equal(layer.out_idx, before)
    layer.select(good.flip(0), good)
    assert torch.equal(layer.out_idx, good)


@pytest.mark.parametrize("group", [0, 3])
def test_ops_refuse_runs_that_the_indices_cannot_hold(group):
    x, idx = torch.randn(5, 16), torch.arange(8)
    with pytest.raises(ValueError, match=f"not runs of group = {group}"):
        torch.ops.losia_pro.gather_columns(x, idx, group=group)
    with pytest.raises(ValueError, match=f"not runs of group = {group}"):
        torch.ops.losia_pro.subnet_grad(x, x, idx, group=group)


def test_debug_mode_finds_indices_that_are_not_the_runs_they_are_said_to_be(monkeypatch):
    x, idx = torch.randn(5, 16), torch.tensor([1, 2, 3, 4])
    torch.ops.losia_pro.gather_columns(x, idx, group=4)
    monkeypatch.setattr(dispatch, "DEBUG", True)
    with pytest.raises(IndexError, match="in_idx must come in aligned runs of group = 4"):
        torch.ops.losia_pro.gather_columns(x, idx, group=4)


def test_hooks_of_a_linear_run_while_it_is_attached_and_after():
    model, seen = toys.stack(), []
    model.layers[0].up.register_forward_hook(lambda *_: seen.append("forward"))
    model.layers[0].up.register_full_backward_hook(lambda *_: seen.append("backward"))
    losia = losia_pro.attach(model)
    handle = model.layers[0].up.register_forward_pre_hook(lambda *_: seen.append("pre"))
    batch = toys.batches(1)[0]
    toys.loss_of(model, (batch[0].requires_grad_(), batch[1])).backward()
    assert seen == ["pre", "forward", "backward"]
    losia.detach()
    model(batch[0])
    assert seen[3:] == ["pre", "forward"]
    handle.remove()
    model(batch[0])
    assert seen[5:] == ["forward"]
