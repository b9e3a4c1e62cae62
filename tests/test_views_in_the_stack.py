"""Experts, and linears stored transposed, under autocast, scalers, checkpoints, torch.func and compilers."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from mixtures import KINDS, Mixture, X, conv_stack, experts_of
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import losia_pro
from losia_pro import LosiaConfig
from losia_pro.kinds import find_linear

MAKE = {
    "transposed": conv_stack,
    **{
        name: lambda dtype=torch.float64, make=make: Mixture(experts_of(make, dtype))
        for name, make in KINDS.items()
    },
}
layers = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def attach(model, **settings):
    return losia_pro.attach(model, LosiaConfig(**{"rank_factor": 1 / 4, **settings}))


def gradients(losia, run, x):
    x = x.clone().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(loss_of(y), [x, *losia.parameters()])]


def loss_of(y):
    return y.to(torch.promote_types(y.dtype, torch.float32)).square().sum()


def values_of(plain, losia, x):
    """The output, and the gradient of what ``losia`` trains, by a plain model's full gradients."""
    plain.zero_grad()
    y = plain(x)
    loss_of(y).backward()
    found = [y.detach()]
    for name, m in losia.modules.items():
        linear = find_linear(plain, name)
        grad = linear.stored.grad if linear.index is None else linear.stored.grad[linear.index]
        grad = grad.t() if linear.transposed else grad
        found.append(grad[m.out_idx][:, m.in_idx])
    return found


@layers
def test_under_autocast_nothing_is_further_from_the_exact_values_than_in_a_plain_bf16_model(make):
    """Further than twice: outputs and gradients both."""
    plain = make(torch.float32)
    losia = attach(copy.deepcopy(plain))
    truth = values_of(copy.deepcopy(plain).double(), losia, X)
    peers = values_of(copy.deepcopy(plain).bfloat16(), losia, X.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert losia.model(X.float()).dtype == plain(X.float()).dtype
        y, _, *grads = gradients(losia, losia.model, X.float())
    assert {g.dtype for g in grads} == {torch.float32}
    for exact, peer, own in zip(truth, peers, [y, *grads], strict=True):
        assert (own - exact).abs().max() <= 2 * (peer - exact).abs().max()


@layers
def test_a_step_that_overflows_is_no_step(make):
    def run(overflow):
        model = make(torch.float32)
        losia = attach(model, period=2)
        optimizer = torch.optim.AdamW(losia.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        losia.bind(optimizer, scaler=scaler)
        for i in range(7):
            for again in (True, False) if i in overflow else (False,):
                optimizer.zero_grad()
                loss = (model(X.float()) + i).square().mean()
                scaler.scale(loss * float("inf") if again else loss).backward()
                scaler.step(optimizer)
                scaler.update()
        return losia

    plain, interrupted = run(()), run((0, 1, 3, 6))
    assert interrupted.step == plain.step == 7 and interrupted.history == plain.history
    assert plain.history
    toys.equal_bits(toys.weights(interrupted), toys.weights(plain))


@layers
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(make, reentrant):
    losia = attach(make())
    expected = gradients(losia, losia.model, X)
    x = X.clone().requires_grad_()
    y = checkpoint(losia.model, x, use_reentrant=reentrant)
    loss_of(y).backward()
    found = [y.detach(), x.grad, *[p.grad for p in losia.parameters()]]
    toys.equal_bits(found, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@layers
def test_func_grad_and_vmap_give_each_examples_gradient(make):
    """With a routing that is the same for each, as it must be for the plain layer too."""
    losia = attach(make())
    subnets = {n: p.detach() for n, p in losia.model.named_parameters() if p.requires_grad}
    x = torch.stack([X, X.flip(0), X * 2])

    def loss(subnets, x):
        return functional_call(losia.model, subnets, (x,)).square().sum()

    each = [gradients(losia, losia.model, one)[2:] for one in x]
    expected = {n: torch.stack(g) for n, g in zip(subnets, zip(*each, strict=True), strict=True)}
    one = grad(loss)(subnets, x[0])
    torch.testing.assert_close(one, {n: g[0] for n, g in expected.items()})
    torch.testing.assert_close(vmap(grad(loss), (None, 0))(subnets, x), expected)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("transposed", "layers.0.up: a view of weight"),
        ("gated", "layers.0.experts.gate_up_proj.0: a view of gate_up_proj"),
    ],
)
def test_sharding_is_refused_by_name(kind, name):
    distributed = torch.distributed
    losia, late = attach(MAKE[kind]()), MAKE[kind]()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fsdp = pytest.importorskip("torch.distributed.fsdp")
        for model in (losia.model, late):
            fsdp.fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=f"^{name.partition(':')[0]} is sharded already"):
            attach(late)
        said = ", which is sharded: .* use DistributedDataParallel, or leave them out"
        with pytest.raises(TypeError, match=f"^{name}{said}"):
            losia.bind(torch.optim.AdamW(losia.parameters()))
        with pytest.raises(TypeError, match=said):
            losia.write_back()
    finally:
        distributed.destroy_process_group()


@layers
def test_bf16_subnets_train_and_are_in_the_dense_weights(make):
    losia = attach(make(torch.bfloat16), period=2, subnet_dtype="bfloat16")
    optimizer = losia_pro.optim.AdamW(losia.parameters(), lr=1e-2)
    losia.bind(optimizer)
    start = toys.weights(losia)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(losia.model(X.bfloat16()))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        for n, m in losia.modules.items():
            assert m.subnet.dtype == torch.bfloat16
            assert torch.equal(m.weight[m.out_idx][:, m.in_idx], m.subnet), n
    assert losses[-1] < losses[0] and losia.history
    moved = [n for n, m in losia.modules.items() if not torch.equal(m.weight, start[n])]
    assert len(moved) >= len(losia.modules) - 2  # all but those of an expert that is idle
