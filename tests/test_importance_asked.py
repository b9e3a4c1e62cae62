"""Importance comes from the backward of a step, not from gradients that are asked for besides."""

from __future__ import annotations

import functools

import pytest
import torch
import toys
from bound import attached, backward, profiles
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("how", ["grad", "backward"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_backward_for_other_gradients_alone_leaves_no_trace(how, checkpointed):
    """A saliency map between a step's backward and the step, say."""
    data = toys.batches(10, dtype=torch.float64)

    def run(look):
        model, losia, optimizer = attached()
        for batch in data:
            optimizer.zero_grad()
            backward(model, batch)
            if look:
                x = batch[0].clone().requires_grad_()
                call = functools.partial(checkpoint, model, use_reentrant=False)
                y = 100 * (call if checkpointed else model)(x).sum()
                torch.autograd.grad(y, x) if how == "grad" else y.backward(inputs=[x])
            optimizer.step()
        return losia

    clean, marked = run(False), run(True)
    toys.equal_bits(profiles(marked), profiles(clean))
    assert len(clean.history) == 4 and marked.history == clean.history


def test_gradients_asked_for_by_name_are_profiled_as_those_of_backward():
    batch = toys.batches(1, dtype=torch.float64)[0]

    def importance(ask):
        model, losia, optimizer = attached()
        ask(losia, toys.loss_of(model, batch))
        optimizer.step()
        return profiles(losia)

    def by_name(losia, loss):
        for p, grad in zip(
            losia.parameters(), torch.autograd.grad(loss, losia.parameters()), strict=True
        ):
            p.grad = grad

    expected = importance(lambda losia, loss: loss.backward())
    assert all(i.any() for i, _ in expected.values())
    toys.equal_bits(importance(by_name), expected)
    named = importance(lambda losia, loss: loss.backward(inputs=losia.parameters()))
    toys.equal_bits(named, expected)


def test_a_profiled_layer_refuses_the_gradients_of_torch_func():
    model, losia, _ = attached()
    x, _ = toys.batches(1, dtype=torch.float64)[0]
    fixed = {n: p.detach() for n, p in model.named_parameters()}
    subnets = {n: p for n, p in fixed.items() if n.endswith("subnet")}

    def loss(subnets, x):
        return torch.func.functional_call(model, fixed | subnets, (x,)).sum()

    for call in (torch.func.grad(loss), torch.func.vmap(torch.func.grad(loss), (None, 0))):
        with pytest.raises(RuntimeError, match="not those of torch.func: train with period=None"):
            call(subnets, x)
    assert all(m.profile.pending is None for m in losia.group_modules(0).values())
