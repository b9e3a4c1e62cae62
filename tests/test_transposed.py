"""Linears that are stored transposed, as GPT-2's: the same training as of linears that are not."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from mixtures import Conv1D, transposed
from torch import nn

import losia_pro
from losia_pro import LosiaConfig


def pair(dtype=torch.float64):
    """A stack of linears, and the same with its linears stored transposed."""
    model = toys.stack(dtype)
    for block in model.layers:
        block.down.register_parameter("bias", nn.Parameter(torch.zeros(toys.IN, dtype=dtype)))
    return model, transposed(copy.deepcopy(model))


def state_of(model, transposed):
    return {
        n: t.t() if transposed and n.startswith("layers") and n.endswith("weight") else t
        for n, t in model.state_dict().items()
    }


def trained(model, steps, **settings):
    config = LosiaConfig(**{"rank_factor": 1 / 4, "period": 2, **settings})
    losia = losia_pro.attach(model, config)
    optimizer = torch.optim.AdamW(losia.parameters(), lr=1e-2)
    losia.bind(optimizer)
    list(toys.train(model, optimizer, toys.batches(steps, dtype=model.norm.weight.dtype)))
    return losia


SETTINGS = {
    "alone": {},
    "biases too": {"train_bias": True},
    "formed in full": {"mode": "dense"},
    "runs, all at once": {"neuron_group": 2, "schedule": "sync"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training_over_moves_is_that_of_linears_stored_as_they_are(settings):
    plain, other = pair()
    losia, other_losia = trained(plain, 9, **settings), trained(other, 9, **settings)
    assert list(losia.modules) == list(other_losia.modules) and other_losia.groups == losia.groups
    assert toys.indices(other_losia) == toys.indices(losia)
    assert len(other_losia.history) == len(losia.history) >= 8
    found, expected = state_of(other, True), state_of(plain, False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_parameters_keep_their_names_shapes_and_flags_and_hooks_run():
    _, model = pair()
    layer, calls = model.layers[0].up, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer.register_buffer("own", torch.ones(2), persistent=False)
    state, before = copy.deepcopy(model.state_dict()), toys.snapshot(model)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, train_bias=True))
    toys.equal_bits(model.state_dict(), state)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.{p}" for n in losia.modules for p in ("bias", "subnet")}
    x, _ = toys.batches(1, dtype=torch.float64)[0]
    model(x)
    assert calls == [1]
    assert model.layers[0].up.own is layer.own
    toys.assert_same(before, toys.snapshot(losia.detach()))
    assert model.layers[0].up is layer


def test_the_base_deltas_and_a_loaded_checkpoint_are_exact(tmp_path):
    _, plain = pair(torch.bfloat16)
    losia = trained(copy.deepcopy(plain), 5, train_bias=True)
    tuned = copy.deepcopy(losia.model.state_dict())
    with losia.base():
        toys.equal_bits(losia.model.state_dict(), plain.state_dict())
    losia.save_delta(tmp_path / "delta")
    delta = losia_pro.Delta(tmp_path / "delta")
    model = copy.deepcopy(plain)
    toys.equal_bits(delta.apply(model).state_dict(), tuned)
    delta.remove()
    toys.equal_bits(model.state_dict(), plain.state_dict())
    toys.equal_bits(losia_pro.load_delta(model, tmp_path / "delta").state_dict(), tuned)

    again = losia_pro.attach(plain, LosiaConfig(rank_factor=1 / 4))
    again.model.load_state_dict(tuned)
    for m in again.modules.values():
        block = m.weight[m.out_idx][:, m.in_idx]
        assert torch.equal(m.subnet.to(block.dtype), block)
    again.write_back()
    toys.equal_bits(again.model.state_dict(), tuned)


def test_a_plain_linear_can_be_made_of_one():
    _, model = pair()
    m = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4)).modules["layers.0.up"]
    x, _ = toys.batches(1, dtype=torch.float64)[0]
    linear = m.to_linear()
    assert type(linear) is nn.Linear and linear.weight.data_ptr() == m.weight.data_ptr()
    torch.testing.assert_close(linear(x), m(x), rtol=1e-12, atol=1e-14)


def test_a_model_that_is_one_itself_is_refused():
    layer = Conv1D(8, 8)
    with pytest.raises(ValueError, match="the model is itself a linear"):
        losia_pro.attach(layer)
