"""What autograd keeps for a linear, and what is computed: only what is asked for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operators import Operators
from torch import Tensor
from toys import stack

import losia_pro
from losia_pro import SubnetLinear, subnet_linear

pytestmark = pytest.mark.filterwarnings("error")

WIDTH, TOKENS = 512, 96


class Sink:
    """Takes what a profiled layer hands over."""

    def add(self, dy: Tensor, x: Tensor) -> None:
        self.got = dy, x

    def follow(self) -> None: ...


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves, as the saved-tensor hooks see them."""
    tensors: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        tensors.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield tensors


def assert_only_x_sub(tensors: list[Tensor], layer: SubnetLinear, x: Tensor) -> None:
    """Besides indices, ``x[:, X_S]`` alone, and no memory but its own behind it."""
    (x_sub,) = (t for t in tensors if t.is_floating_point())
    assert torch.equal(x_sub, x.reshape(-1, x.shape[-1])[:, layer.in_idx])
    assert x_sub.untyped_storage().nbytes() == x_sub.numel() * x_sub.element_size()


@pytest.mark.parametrize("leading", [(TOKENS,), (4, TOKENS // 4)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autograd_keeps_x_sub_and_nothing_else_of_each_linear(dtype, leading):
    """A 512-wide model of 8 layers; what its other operators keep is not counted."""
    model = stack(dtype, n_blocks=8, width=WIDTH, hidden=WIDTH)
    losia = losia_pro.attach(model)
    assert len(losia.modules) == 16
    counted = 0
    for layer in losia.modules.values():
        forward = layer.forward

        def counting(x: Tensor, layer: SubnetLinear = layer, forward: Any = forward) -> Tensor:
            nonlocal counted
            with kept() as tensors:
                y = forward(x)
            assert_only_x_sub(tensors, layer, x)
            counted += 1
            return y

        layer.forward = counting
    x = torch.randn(*leading, WIDTH, dtype=dtype)
    model(x).sum().backward()
    assert counted == 16
    assert all(layer.subnet.grad is not None for layer in losia.modules.values())


def allocated(layers: list[torch.nn.Linear]) -> list[int]:
    """Bytes of every block that a training step allocates, in or out of the ops."""
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained) if trained else None
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        y = x
        for layer in layers:
            y = y + layer(y)
        y.square().sum().backward()
        if optimizer is not None:
            optimizer.step()
            for layer in layers:
                layer.write_back()
    events = profile.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def test_a_step_allocates_no_more_large_blocks_than_a_frozen_model():
    """Outside profiling there is nothing of the size of W, nor another copy of x or dy."""
    torch.manual_seed(0)
    ours = allocated([SubnetLinear(WIDTH, WIDTH) for _ in range(8)])
    frozen = allocated([torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(8)])
    activation = TOKENS * WIDTH * 4
    assert max(ours) == activation < WIDTH * WIDTH * 4
    assert ours.count(activation) == frozen.count(activation)


@pytest.mark.parametrize("hooks", [False, True], ids=["", "saved-tensor hooks"])
def test_the_weight_is_kept_by_reference_and_the_input_is_let_go(hooks):
    layer = SubnetLinear(WIDTH, WIDTH)
    leaf = torch.randn(TOKENS, WIDTH, requires_grad=True)
    x = leaf * 2  # keeps nothing of its own
    storage = weakref.ref(x.untyped_storage())
    if hooks:
        with kept():
            y = layer(x)
        held = [t for t in y.grad_fn.early.own if t is not None]
    else:
        y = layer(x)
        held = [t for t in y.grad_fn.saved_tensors if t is not None]
    (weight,) = (t for t in held if t.shape == layer.weight.shape)
    assert weight.data_ptr() == layer.weight.data_ptr()
    freed = weakref.ref(x)
    del x, held, weight
    assert freed() is None and storage() is None
    y.sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("hooks", [False, True], ids=["", "saved-tensor hooks"])
def test_without_an_input_gradient_the_weight_is_not_kept(hooks):
    layer = SubnetLinear(WIDTH, WIDTH)
    with kept() if hooks else torch.enable_grad():
        y = layer(torch.randn(TOKENS, WIDTH))
    held = y.grad_fn.early.own if hooks else y.grad_fn.saved_tensors
    assert not any(
        t is not None and t.is_floating_point() and t.dim() == 2 and len(t) == WIDTH for t in held
    )


@pytest.mark.parametrize("mode", ["pro", "dense"])
@pytest.mark.parametrize("wants", list(product([False, True], repeat=4)), ids=str)
def test_nothing_is_kept_or_computed_that_is_not_asked_for(wants, mode):
    """``wants``: who requires grad of x, weight, subnet and bias."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(7, 12), torch.randn(10, 12), torch.randn(10)
    out_idx, in_idx = torch.arange(3), torch.arange(4)
    subnet = weight[:3, :4].clone()
    for t, want in zip((x, weight, subnet, bias), wants, strict=True):
        t.requires_grad_(want)
    wants_x, wants_weight, wants_subnet, wants_bias = wants
    compact = wants_subnet and mode == "pro"

    with Operators() as forward, kept() as tensors:
        y = subnet_linear(x, weight, subnet, out_idx, in_idx, bias, mode=mode)
    shapes = [t.shape for t in tensors if t.is_floating_point()]
    wanted = [(7, 4)] * compact + [(7, 12)] * (wants_weight or wants_subnet and mode == "dense")
    if wants_x and not (wants_weight or wants_subnet):
        wanted.append((12, 10))  # it is F.linear, whose hooks see the weight as its transpose
    assert sorted(shapes) == sorted(wanted)
    assert forward.count("losia_pro::gather_columns") == compact
    assert forward.count("aten::addmm") == 1

    if not any(wants):
        assert y.grad_fn is None
        return
    with Operators() as backward:
        y.backward(torch.ones_like(y))
    full = wants_weight + (wants_subnet and mode == "dense")
    assert backward.count("losia_pro::subnet_grad") == compact
    assert backward.count("aten::mm") == wants_x + full
    assert backward.count("aten::sum") + backward.count("aten::sum.dim_IntList") == wants_bias


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen", "frozen input only"])
def test_where_no_gradient_is_asked_for_the_call_is_f_linear(how):
    torch.manual_seed(0)
    layer = SubnetLinear(12, 10)
    layer.subnet.requires_grad_(not how.startswith("frozen"))
    layer.profile = None if how.startswith("frozen") else Sink()
    x = torch.randn(7, 12, requires_grad=how == "frozen input only")
    without = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    context = without.get(how, torch.enable_grad)
    with context(), Operators() as ours, kept() as tensors:
        y = layer(x)
    with context(), Operators() as plain, kept() as plain_tensors:
        want = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(y, want) and type(y.grad_fn) is type(want.grad_fn)
    assert ours.names() == plain.names()
    assert len(tensors) == len(plain_tensors)
    assert y.is_inference() == want.is_inference()


def test_eval_mode_changes_neither_output_nor_gradients():
    """As for every linear of PyTorch: ``eval`` is not ``no_grad``."""
    torch.manual_seed(0)
    layer = SubnetLinear(12, 10)
    x = torch.randn(7, 12)
    grads = []
    for training in (True, False):
        layer.train(training)
        y = layer(x)
        assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
        grads.append(torch.autograd.grad(y.square().sum(), layer.subnet)[0])
    assert torch.equal(grads[0], grads[1])


def test_a_profiled_layer_keeps_its_input_and_hands_it_over():
    torch.manual_seed(0)
    layer, x, dy = SubnetLinear(12, 10), torch.randn(2, 7, 12), torch.randn(2, 7, 10)
    plain = torch.autograd.grad(layer(x), layer.subnet, dy)[0]
    layer.profile = sink = Sink()
    with kept() as tensors:
        y = layer(x)
    assert sorted(t.shape for t in tensors if t.is_floating_point()) == [(14, 1), (14, 12)]
    assert torch.equal(torch.autograd.grad(y, layer.subnet, dy)[0], plain)
    assert torch.equal(sink.got[0], dy.flatten(0, 1)) and torch.equal(sink.got[1], x.flatten(0, 1))
