"""Attach and detach: bad input changes nothing, and detaching leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import pytest
import torch
import toys
from bound import attached, hooks
from torch import nn
from torch.nn.utils import parametrizations, prune

import losia_pro
from losia_pro import LosiaConfig, SubnetLinear


def attached_inside():
    model = nn.Sequential(toys.stack(), toys.stack(seed=1))
    losia_pro.attach(model[0])
    return model


def tied_within_blocks():
    model = toys.stack()
    model.layers[2].up.weight = model.layers[0].up.weight
    return model


def one_bias():
    model = toys.stack()
    model.layers[2].up.bias = model.layers[0].up.bias
    return model


def tied_by_memory():
    model = toys.stack()
    model.layers[2].up.weight.data = model.layers[0].up.weight.data
    return model


def with_changed(change, name="down"):
    def make():
        model = toys.stack()
        change(getattr(model.layers[1], name))
        return model

    return make


def weight_norm(linear):
    with torch.no_grad():
        torch.nn.utils.weight_norm(linear)


def parametrized_bias(linear):
    torch.nn.utils.parametrize.register_parametrization(linear, "bias", nn.Identity())


def in_dtype(dtype):
    def make():
        model = toys.stack()
        weight = model.layers[1].up.weight
        model.layers[1].up.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        return model

    return make


class HeadOfItsOwnKind(toys.Stack):
    def get_output_embeddings(self):
        return self.norm


def only_a_head():
    model = toys.words()
    del model.layers[:]
    return model


NO_TARGET = {
    "no linear": (lambda: nn.Sequential(nn.Conv2d(3, 4, 2)), {}, "Sequential holds no nn.Linear to adapt"),
    "empty": (nn.Module, {}, "Module holds no nn.Linear"),
    "only subclasses": (lambda: nn.MultiheadAttention(16, 2), {}, "adapt .NonDynamicallyQuantizableLinear: sub"),
    "a linear itself": (lambda: nn.Linear(16, 16), {}, "the model is itself a linear"),
    "only a head": (only_a_head, {}, "Words holds no nn.Linear besides its output head lm_head"),
    "name of nothing": (
        toys.stack, {"target_modules": ["up", "q_proj"]},
        "'q_proj' matches no module; linears are e.g. layers.0.up, layers.0.down",
    ),
    "part of a name": (toys.stack, {"target_modules": ["own"]}, "'own' matches no module"),
    "name of something else": (
        toys.stack, {"target_modules": ["norm"]}, "'norm' matches no nn.Linear, only LayerNorm",
    ),
    "expression for another": (
        toys.stack, {"target_modules": "layers"}, "'layers' matches no nn.Linear, only ModuleList",
    ),
    "expression for a part": (toys.stack, {"target_modules": "up"}, "'up' matches no module"),
    "no expression": (
        toys.stack, {"target_modules": "*.up"}, r"'\*.up' is not a regular expression .*; names go into a list",
    ),
    "no head": (
        lambda: nn.Sequential(nn.Linear(16, 16)), {"output_factor": 0.5},
        "output_factor = 0.5, but Sequential has no output head",
    ),
    "head that is no linear": (
        HeadOfItsOwnKind, {"output_factor": 0.5}, "HeadOfItsOwnKind has no output head",
    ),
}  # fmt: skip
COMPUTED = "layers.1.(up|down) computes its weight or bias from other parameters"
NO_WEIGHT = {
    "too few outputs": (
        toys.stack, {"out_factor": 0.05},
        "layers.0.down is too small to slice: 24 inputs and 16 outputs leave a subnet of 2 inputs and 0 outputs",
    ),
    "too few inputs": (
        toys.stack, {"rank_factor": 1 / 20},
        "layers.0.up is too small to slice: 16 inputs and 24 outputs leave a subnet of 0 inputs and 1 outputs",
    ),
    "too small for a run": (toys.stack, {"neuron_group": 8}, "layers.0.up is too small to slice"),
    "head too small": (
        toys.stack, {"output_factor": 0.1},
        "head is too small to slice: 16 inputs and 8 outputs leave a subnet of 16 inputs and 0 outputs",
    ),
    "meta": (
        lambda: toys.stack().to("meta"), {},
        "layers.0.up is on the meta device; load the model's weights before attach",
    ),
    "one on meta": (with_changed(lambda m: m.to("meta")), {}, "layers.1.down is on the meta device"),
    "shared weight": (tied_within_blocks, {}, "layers.2.up and layers.0.up share one weight"),
    "shared memory": (tied_by_memory, {}, "layers.2.up and layers.0.up share one weight"),
    "shared bias": (one_bias, {"train_bias": True}, "layers.2.up and layers.0.up share one bias"),
    "inference": (torch.inference_mode()(toys.stack), {}, r"layers.0.up is of torch.inference_mode\(\)"),
    "fp8": (in_dtype(torch.float8_e4m3fn), {}, "layers.1.up has torch.float8_e4m3fn weights; only those of"),
    "int8": (in_dtype(torch.int8), {}, r"layers.1.up \(Linear\) has quantized weights \(Parameter, torch.int8\)"),
    "weight norm": (with_changed(weight_norm), {}, COMPUTED),
    "parametrized": (with_changed(parametrizations.spectral_norm), {}, COMPUTED),
    "parametrized and named": (with_changed(parametrizations.spectral_norm), {"target_modules": ["down"]}, COMPUTED),
    "parametrized bias": (with_changed(parametrized_bias, "up"), {}, COMPUTED),
    "pruned bias": (with_changed(lambda m: prune.l1_unstructured(m, "bias", 3), "up"), {}, COMPUTED),
    "attached": (lambda: losia_pro.attach(toys.stack()).model, {}, "the model is attached already; call detach"),
    "attached inside": (attached_inside, {}, "the model is attached already; call detach"),
}  # fmt: skip
REFUSED = {**NO_TARGET, **NO_WEIGHT}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(("make", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_cannot_be_attached_is_left_as_it_was(make, settings, message):
    model = make()
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match=message):
        losia_pro.attach(model, LosiaConfig(**settings))
    toys.assert_same(before, toys.snapshot(model))


def test_a_shared_bias_that_is_not_trained_or_of_one_target_is_no_harm():
    losia_pro.attach(one_bias())
    losia_pro.attach(one_bias(), LosiaConfig(train_bias=True, target_modules=["layers.0.up"]))


def test_attaching_within_inference_mode_is_refused():
    model = toys.stack()
    untouched = toys.snapshot(model)
    with torch.inference_mode(), pytest.raises(ValueError, match="outside of it"):
        losia_pro.attach(model)
    toys.assert_same(untouched, toys.snapshot(model))


def test_a_refused_layer_can_be_left_out():
    losia = losia_pro.attach(tied_within_blocks(), LosiaConfig(target_modules=["down"]))
    assert list(losia.modules) == [f"layers.{i}.down" for i in range(3)]
    model = with_changed(parametrizations.spectral_norm)()
    losia = losia_pro.attach(model, LosiaConfig(target_modules=["up"]))
    assert list(losia.modules) == [f"layers.{i}.up" for i in range(3)]


def test_attaching_keeps_values_outputs_and_checkpoints():
    model = toys.stack(torch.bfloat16)
    x, _ = toys.batches(1, dtype=torch.bfloat16)[0]
    y, state = model(x), copy.deepcopy(model.state_dict())
    losia = losia_pro.attach(model)
    assert losia.model is model
    assert torch.equal(model(x), y)
    toys.equal_bits(model.state_dict(), state)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{n}.subnet" for n in losia.modules]
    assert [id(p) for p in losia.parameters()] == [id(m.subnet) for m in losia.modules.values()]
    plain = toys.stack(torch.bfloat16, seed=5)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), y)


def test_the_first_subnets_depend_on_the_seed_alone():
    def places(seed, warm):
        torch.manual_seed(warm)
        losia = losia_pro.attach(toys.stack(), LosiaConfig(rank_factor=1 / 4, seed=seed))
        return toys.indices(losia)

    assert places(0, 1) == places(0, 2) != places(3, 1)


def bound(model=None, **settings):
    config = LosiaConfig(**{"rank_factor": 1 / 4, "period": 2, **settings})
    return attached(config, torch.float32, model)[1:]


def remember(model):
    """What detaching must bring back: all of a snapshot but the values."""
    return {k: v for k, v in toys.snapshot(model).items() if k != "values"}


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "settings", [{}, {"train_bias": True}, {"output_factor": 0.5, "schedule": "sync"}], ids=str
)
def test_detaching_leaves_the_tuned_weights_and_nothing_else(settings, steps):
    """Between moves, in the middle of a slot, while rewarming; with a model part frozen, part in eval."""
    model = toys.stack()
    model.layers[0].up.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    model.layers[1].eval()
    before = remember(model)
    losia, optimizer = bound(model, **settings)
    list(toys.train(model, optimizer, toys.batches(steps)))
    tuned = copy.deepcopy(model.state_dict())
    modules = [weakref.ref(m) for m in losia.modules.values()]
    assert losia.detach() is model
    assert remember(model) == before
    toys.equal_bits(model.state_dict(), tuned)
    assert hooks(optimizer) == 0 and all(p.grad is None for p in model.parameters())
    assert not any(isinstance(m, SubnetLinear) for m in model.modules())
    optimizer.step()
    toys.equal_bits(model.state_dict(), tuned)
    del losia, optimizer
    gc.collect()
    assert not any(m() for m in modules)


def test_training_mode_set_while_attached_survives_detaching():
    losia, _ = bound()
    losia.model.eval()
    assert not any(m.training for m in losia.detach().modules())


def test_values_stepped_but_not_written_are_in_the_detached_weights():
    losia = losia_pro.attach(toys.stack(), LosiaConfig(rank_factor=1 / 4))
    m = losia.modules["layers.0.up"]
    with torch.no_grad():
        m.subnet.add_(1.0)
    rows, columns, value = m.out_idx, m.in_idx, m.subnet.detach().clone()
    assert torch.equal(losia.detach().layers[0].up.weight[rows][:, columns], value)


def test_a_detached_model_can_be_attached_again():
    losia, optimizer = bound()
    list(toys.train(losia.model, optimizer, toys.batches(3)))
    model = losia.detach()
    state = copy.deepcopy(model.state_dict())
    again, optimizer = bound(model, rank_factor=1 / 2, target_modules=["up"], seed=1)
    toys.equal_bits(model.state_dict(), state)
    list(toys.train(model, optimizer, toys.batches(3)))
    assert len(again.history) == 1 and again.step == 3


def test_an_ordinary_loop_trains_the_detached_model_in_full():
    losia, optimizer = bound()
    list(toys.train(losia.model, optimizer, toys.batches(3)))
    model = losia.detach()
    state = copy.deepcopy(model.state_dict())
    list(toys.train(model, torch.optim.SGD(model.parameters(), lr=0.1), toys.batches(1)))
    for n, p in model.named_parameters():
        assert not torch.equal(p, state[n]), n


@pytest.mark.parametrize("then", ["trained in full", "attached again"])
def test_a_detached_losia_never_writes_into_the_model_again(then, tmp_path):
    losia, optimizer = bound()
    list(toys.train(losia.model, optimizer, toys.batches(3)))
    model, state = losia.detach(), losia.state_dict()
    if then == "attached again":
        _, other = bound(model)
    else:
        other = torch.optim.SGD(model.parameters(), lr=0.1)
    list(toys.train(model, other, toys.batches(3)))
    now = copy.deepcopy(model.state_dict())
    losia.write_back()
    assert losia.detach() is model
    with contextlib.suppress(RuntimeError):  # where places changed that a delta leaves out
        losia.save_delta(tmp_path / "delta.safetensors")
    toys.equal_bits(model.state_dict(), now)
    calls = [
        lambda: losia.bind(optimizer),
        lambda: losia.load_state_dict(state),
        lambda: losia.calibrate(toys.batches(1), toys.loss_of),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"detached already.*attach\(\) the model again"):
            call()
    toys.equal_bits(model.state_dict(), now)
