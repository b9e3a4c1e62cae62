"""Experts and transposed linears on a device: kernels read and write slices, and weights of any strides."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from mixtures import Routed, conv_stack

import losia_pro
from losia_pro import LosiaConfig

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MAKE = {"transposed": conv_stack, "experts": Routed}


@pytest.mark.parametrize("neuron_group", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_training_writes_exactly_the_subnets_and_the_base_comes_back(
    name, dtype, neuron_group, impl
):
    plain = MAKE[name](dtype).to(DEVICE)
    model = copy.deepcopy(plain)
    config = LosiaConfig(rank_factor=1 / 4, period=2, neuron_group=neuron_group, impl=impl)
    losia = losia_pro.attach(model, config)
    optimizer = torch.optim.AdamW(losia.parameters(), lr=1e-2)
    losia.bind(optimizer)
    losses = []
    for x, target in toys.batches(13, size=64, dtype=dtype):
        before, places = toys.weights(losia), toys.places(losia)
        optimizer.zero_grad()
        loss = toys.loss_of(model, (x.to(DEVICE), target.float().to(DEVICE)))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        for n, m in losia.modules.items():
            rows, columns = places[n]
            inside = torch.zeros_like(m.weight, dtype=torch.bool)
            inside[rows[:, None], columns] = True
            assert torch.equal(m.weight[~inside], before[n][~inside]), n
            now = m.weight[m.out_idx][:, m.in_idx]
            assert torch.equal(now, m.subnet.to(dtype)), n
    assert losses[-1] < losses[0] and len({r.group for r in losia.history}) == len(losia.groups)
    tuned = copy.deepcopy(model.state_dict())
    with losia.base():
        toys.equal_bits(model.state_dict(), plain.state_dict())
    toys.equal_bits(losia.detach().state_dict(), tuned)


@pytest.mark.parametrize("name", MAKE)
def test_importance_is_that_of_plain_pytorch(name, impl):
    """Of fp32, whose products a kernel may form in tf32: 2^-11 of the largest."""
    found = []
    for how in (impl, "torch"):
        losia = losia_pro.attach(
            MAKE[name](torch.float32).to(DEVICE),
            LosiaConfig(rank_factor=1 / 4, period=9, schedule="sync", impl=how),
        )
        optimizer = torch.optim.SGD(losia.parameters(), lr=0.0)
        losia.bind(optimizer)
        x, target = toys.batches(1, size=64)[0]
        toys.loss_of(losia.model, (x.to(DEVICE), target.to(DEVICE))).backward()
        optimizer.step()
        found.append({n: m.profile.importance for n, m in losia.modules.items()})
    for n, expected in found[1].items():
        bound = 2**-10 * float(expected.max())
        assert expected.any()
        torch.testing.assert_close(found[0][n], expected, rtol=0, atol=bound)
