"""Importance is a function of each optimizer step's whole gradient: not of how a batch was split, of what
was thrown away, or of loss scaling."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from bound import LR, attached, backward, profiles
from torch import nn

import losia_pro
from losia_pro import LosiaConfig, reference
from losia_pro.profile import Profile


def test_only_the_slots_group_is_profiled():
    model, losia, optimizer = attached(LosiaConfig(rank_factor=1 / 4, period=2))
    seen = []
    for _ in zip(
        range(8), toys.train(model, optimizer, toys.batches(8, dtype=torch.float64)), strict=False
    ):
        seen.append(sorted({int(n.split(".")[1]) for n in profiles(losia)}))
    assert seen == [[0], [1], [1], [2], [2], [0], [0], [1]]  # after each step: those of the next


def test_accumulated_importance_is_the_references():
    model, losia, optimizer = attached(
        LosiaConfig(rank_factor=1 / 4, period=10, beta1=0.7, beta2=0.6)
    )
    plain = toys.stack(torch.float64)
    smooth = {n: 0.0 for n in losia.groups[0]}
    uncertain = dict(smooth)
    for batch in toys.batches(5, dtype=torch.float64):
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        backward(plain, batch)
        for n in smooth:
            w = plain.get_submodule(n).weight
            now = reference.importance(w.grad, w.detach())
            smooth[n] = reference.smooth(smooth[n], now, 0.7)
            uncertain[n] = reference.uncertainty(uncertain[n], now, smooth[n], 0.6)
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    assert profiles(losia).keys() == smooth.keys()
    for n, (importance, uncertainty) in profiles(losia).items():
        torch.testing.assert_close(importance, smooth[n], rtol=1e-12, atol=0)
        torch.testing.assert_close(uncertainty, uncertain[n], rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("mode", ["pro", "dense"])
def test_4_micro_batches_of_2_are_1_batch_of_8(dtype, bound, mode):
    config = LosiaConfig(rank_factor=1 / 4, period=4, output_factor=1 / 2, mode=mode)
    data = toys.batches(22, dtype=dtype)

    def run(split):
        model, losia, optimizer = attached(config, dtype)
        for x, target in data:
            optimizer.zero_grad()
            for part in zip(x.chunk(split), target.chunk(split), strict=True):
                backward(model, part, 1 / split)
            optimizer.step()
        return losia

    whole, parts = run(1), run(4)
    assert len(whole.history) == 9 and toys.indices(whole) == toys.indices(parts)
    for n, w in toys.weights(whole).items():
        torch.testing.assert_close(w, toys.weights(parts)[n], rtol=0, atol=bound)
    for n, (importance, uncertainty) in profiles(whole).items():
        others = profiles(parts)[n]
        torch.testing.assert_close(importance, others[0], rtol=100 * bound, atol=bound * 1e-2)
        torch.testing.assert_close(uncertainty, others[1], rtol=100 * bound, atol=bound * 1e-2)


@pytest.mark.parametrize("split", [1, 2], ids=["batch", "micro-batches"])
@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zeros"])
def test_a_discarded_backward_leaves_no_trace(to_none, split):
    """``zero_grad`` without a step: of one backward or of several, to None or to zeros."""
    data = toys.batches(11, dtype=torch.float64)

    def run(discard):
        model, losia, optimizer = attached()
        for i, batch in enumerate(data[:10]):
            optimizer.zero_grad(set_to_none=to_none)
            if i in discard:
                for _ in range(split):
                    backward(model, data[10], 100.0)
                optimizer.zero_grad(set_to_none=to_none)
            backward(model, batch)
            optimizer.step()
        return losia

    clean, marked = run(()), run((0, 1, 3, 4, 9))
    toys.equal_bits(profiles(marked), profiles(clean))
    toys.equal_bits(toys.weights(marked), toys.weights(clean))
    assert len(clean.history) == 4 and marked.history == clean.history


def test_micro_batches_count_fully_where_the_subnets_own_gradient_is_zero():
    """No gradient reaches the subnet (dead outputs), yet the rest of the weight's belongs to the step."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False).double())
    config = LosiaConfig(rank_factor=1 / 2, period=10)
    losia = losia_pro.attach(model, config)
    optimizer = torch.optim.SGD(losia.parameters(), lr=LR)
    losia.bind(optimizer)
    module = losia.modules["0"]
    alive = torch.ones(8, dtype=torch.float64)
    alive[module.out_idx] = 0
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for part in x.chunk(3):
        (model(part) * alive).sum().backward()
    optimizer.step()
    grad = alive[:, None] * x.sum(0)
    now = reference.importance(grad, module.weight)
    torch.testing.assert_close(module.profile.importance, 0.15 * now, rtol=1e-12, atol=0)


def test_steps_with_a_closure_profile_each_steps_own_gradient():
    data = toys.batches(10, dtype=torch.float64)
    _, plain, optimizer = attached()
    for _ in toys.train(plain.model, optimizer, data):
        pass
    model, losia, optimizer = attached()
    for batch in data:

        def closure(batch=batch):
            optimizer.zero_grad()
            backward(model, batch)

        optimizer.step(closure)
    assert plain.history and losia.history == plain.history
    toys.equal_bits(toys.weights(losia), toys.weights(plain))
    toys.equal_bits(profiles(losia), profiles(plain))


@pytest.mark.parametrize("unscale_first", [False, True], ids=["step", "unscale-clip-step"])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_importance_does_not_depend_on_the_loss_scale(fused, unscale_first):
    """Scales are powers of two, so that scaling and unscaling are exact."""

    def run(scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale is not None)
        model, losia, optimizer = attached(
            dtype=torch.float32,
            optimizer=lambda p: torch.optim.AdamW(p, lr=LR, fused=fused, foreach=not fused),
            scaler=scaler,
        )
        for batch in toys.batches(10):
            optimizer.zero_grad()
            scaler.scale(toys.loss_of(model, batch)).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(losia.parameters(), 1e9)
            scaler.step(optimizer)
            scaler.update()
        return losia

    plain = run(None)
    assert len(plain.history) == 4
    for scale in (2.0**-6, 2.0**16):
        scaled = run(scale)
        toys.equal_bits(profiles(scaled), profiles(plain))
        toys.equal_bits(toys.weights(scaled), toys.weights(plain))
        assert scaled.history == plain.history


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_a_step_that_overflows_is_no_step(fused):
    """It moves nothing, counts for nothing in the schedule, and leaves importance as it was."""

    def run(overflow):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        model, losia, optimizer = attached(
            dtype=torch.float32,
            optimizer=lambda p: torch.optim.AdamW(p, lr=LR, fused=fused, foreach=not fused),
            scaler=scaler,
        )
        for i, batch in enumerate(toys.batches(10)):
            for again in (True, False) if i in overflow else (False,):
                before = toys.weights(losia), losia.step
                optimizer.zero_grad()
                loss = toys.loss_of(model, batch)
                scaler.scale(loss * float("inf") if again else loss).backward()
                scaler.step(optimizer)
                scaler.update()
                if again:
                    toys.equal_bits((toys.weights(losia), losia.step), before)
        return losia

    plain, interrupted = run(()), run((0, 2, 3, 4, 8))
    assert interrupted.step == plain.step == 10
    assert len(plain.history) == 4 and interrupted.history == plain.history
    toys.equal_bits(profiles(interrupted), profiles(plain))
    toys.equal_bits(toys.weights(interrupted), toys.weights(plain))


def test_a_group_that_no_gradient_reaches_keeps_its_subnet_and_state():
    class TwoTowers(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = toys.stack(torch.float64), toys.stack(torch.float64, seed=1)
            self.use_right = True

        def forward(self, x):
            return self.left(x) + (self.right(x) if self.use_right else 0)

    model = TwoTowers()
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=1))
    optimizer = torch.optim.AdamW(losia.parameters(), lr=LR, weight_decay=0.0)
    losia.bind(optimizer)
    assert [g[0] for g in losia.groups][3:] == [f"right.layers.{i}.up" for i in range(3)]
    data = toys.batches(12, dtype=torch.float64)
    loop = toys.train(model, optimizer, data)
    for _ in range(3):
        next(loop)
    start, moments = toys.indices(losia), copy.deepcopy(optimizer.state_dict())
    model.use_right = False
    list(loop)
    right = [r for r in losia.history if r.name.startswith("right")]
    assert len(right) == 12 and all((r.score_kept, r.overlap) == (0.0, 1.0) for r in right)
    for i, (n, where) in enumerate(toys.indices(losia).items()):
        if n.startswith("right"):
            assert where == start[n]
            toys.equal_bits(optimizer.state_dict()["state"][i], moments["state"][i])
    assert any(toys.indices(losia)[n] != start[n] for n in losia.groups[0])


def test_a_step_without_gradient_decays_importance():
    model, losia, optimizer = attached()
    batch = toys.batches(1, dtype=torch.float64)[0]
    optimizer.zero_grad()
    backward(model, batch)
    optimizer.step()
    first = profiles(losia)
    optimizer.zero_grad()
    optimizer.step()
    for n, (importance, uncertainty) in profiles(losia).items():
        torch.testing.assert_close(importance, 0.85 * first[n][0])
        torch.testing.assert_close(uncertainty, 0.85 * first[n][1] + 0.15 * importance)


def test_profile_follows_the_model_to_another_dtype_in_mid_slot():
    model, losia, optimizer = attached(LosiaConfig(rank_factor=1 / 4, period=4), torch.float32)
    loop = toys.train(model, optimizer, toys.batches(2))
    next(loop)
    before = profiles(losia)
    model.double()
    for n, (importance, uncertainty) in profiles(losia).items():
        assert importance.dtype == uncertainty.dtype == torch.float64
        torch.testing.assert_close(importance.float(), before[n][0], rtol=0, atol=0)
        torch.testing.assert_close(uncertainty.float(), before[n][1], rtol=0, atol=0)


def test_sums_of_micro_batches_exist_only_where_there_are_several():
    """A dense gradient is kept between backwards only under accumulation."""
    model, losia, optimizer = attached()
    profile = losia.modules["layers.0.up"].profile
    assert isinstance(profile, Profile)
    first, second = toys.batches(2, dtype=torch.float64)
    backward(model, first)
    assert profile.grad is None and profile.pending is not None
    backward(model, second)
    assert profile.grad is not None
    optimizer.step()
    assert profile.grad is None and profile.pending is None
