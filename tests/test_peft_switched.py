"""losia_pro.peft: an adapter that is switched off and on, frozen and thawed."""

from __future__ import annotations

import pytest
import torch
import toys
from test_peft import IDS, adapted, logits, step


def test_training_goes_on_after_it_was_switched_off_and_on():
    _, model, optimizer = adapted(steps=4)
    _, other, its_optimizer = adapted(steps=4)
    torch.manual_seed(0)  # of dropout
    graph = model(input_ids=IDS, labels=IDS).loss
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
        model(input_ids=IDS, labels=IDS)  # also without torch.no_grad()
        with pytest.raises(RuntimeError, match="inside losia.base"):
            optimizer.step()
    graph.backward()  # a graph from before is good again
    torch.manual_seed(0)
    other(input_ids=IDS, labels=IDS).loss.backward()
    for name, module in model.losia.modules.items():
        assert torch.equal(module.subnet.grad, other.losia.modules[name].subnet.grad)
    for m, o in ((model, optimizer), (other, its_optimizer)):
        o.zero_grad()
        for _ in range(4):
            step(m, o)
    assert model.losia.history == other.losia.history
    toys.equal_bits(toys.weights(model.losia), toys.weights(other.losia))


def test_it_is_frozen_and_trained_again_as_peft_does():
    _, model, _ = adapted(steps=0)
    for freeze in (
        lambda: model.set_adapter("default", inference_mode=True),
        lambda: model.set_requires_grad("default", False),
    ):
        freeze()
        assert not any(p.requires_grad for p in model.parameters())
        with model.disable_adapter():
            pass
        assert not any(p.requires_grad for p in model.parameters())
        model.set_adapter("default")
        assert all(p.requires_grad for p in model.losia.parameters())


def test_an_adapter_that_is_chosen_while_off_trains_once_it_is_on():
    base, model, _ = adapted()
    model.set_requires_grad("default", False)
    with model.disable_adapter():
        model.set_adapter("default")
        out = model.eval()(
            input_ids=IDS
        ).logits  # with gradients enabled, as a reference may be called
        torch.testing.assert_close(out.detach(), logits(base), rtol=0, atol=0)
    assert all(p.requires_grad for p in model.losia.parameters())
