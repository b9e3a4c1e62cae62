"""subnet_linear: F.linear's output bit for bit, and for each input the gradient that a dense layer gives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losia_pro import subnet_linear
from losia_pro.shared import SharedInputs

pytestmark = pytest.mark.filterwarnings("error")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDE = torch.float64


class Case(NamedTuple):
    leading: tuple[int, ...]
    n_in: int
    into: int
    n_out: int
    out: int
    dtype: torch.dtype
    bias: bool
    wants: tuple[bool, bool, bool, bool]  # x, weight, subnet, bias
    strided: bool
    hooks: bool
    mode: str
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    into, out = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return Case(
        leading=tuple(draw(st.lists(st.integers(0, 4), max_size=3))),
        n_in=draw(st.integers(1, into)),
        into=into,
        n_out=draw(st.integers(1, out)),
        out=out,
        dtype=draw(st.sampled_from(DTYPES)),
        bias=draw(st.booleans()),
        wants=draw(st.tuples(*[st.booleans()] * 4)),
        strided=draw(st.booleans()),
        hooks=draw(st.booleans()),
        mode=draw(st.sampled_from(["pro", "dense"])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    subnet: Tensor
    out_idx: Tensor
    in_idx: Tensor
    bias: Tensor | None


def operands(c: Case) -> Operands:
    g = torch.Generator().manual_seed(c.seed)
    x = torch.randn(*c.leading, c.into, generator=g).to(c.dtype)
    if c.strided:
        x = torch.stack([x, x], -1)[..., 0]
    weight = torch.randn(c.out, c.into, generator=g).to(c.dtype)
    bias = torch.randn(c.out, generator=g).to(c.dtype) if c.bias else None
    out_idx = torch.randperm(c.out, generator=g)[: c.n_out]
    in_idx = torch.randperm(c.into, generator=g)[: c.n_in]
    compact = WIDE if c.dtype == WIDE else torch.float32
    subnet = weight[out_idx][:, in_idx].to(compact)
    for t, wants in zip((x, weight, subnet, bias), c.wants, strict=True):
        if t is not None:
            t.requires_grad_(wants)
    return Operands(x, weight, subnet, out_idx, in_idx, bias)


def assert_product(got: Tensor, a: Tensor, b: Tensor, accumulated: torch.dtype) -> None:
    """``got = a b`` as exactly as its dtype and the dtype of its accumulation promise.

    A sum of n products in floats of unit roundoff u is off by at most ``g_n |a| |b|``,
    ``g_n = n u / (1 - n u)``, in whatever order (Higham, *Accuracy and Stability of Numerical
    Algorithms*, section 3.5); the result is then rounded once. The truth in fp64 has its own such error.
    """
    a, b = a.to(WIDE), b.to(WIDE)
    n = a.shape[-1]
    truth, size = a @ b, a.abs() @ b.abs()

    def roundoff(dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps / 2

    def gamma(dtype: torch.dtype) -> float:
        return n * roundoff(dtype) / (1 - n * roundoff(dtype))

    info = torch.finfo(got.dtype)
    error = gamma(accumulated) + gamma(WIDE)
    bound = (error + roundoff(got.dtype) * (1 + error)) * size + info.smallest_normal * info.eps
    assert got.shape == truth.shape
    assert bool(((got.to(WIDE) - truth).abs() <= bound).all())


@settings(max_examples=400, deadline=None)
@given(cases())
def test_output_is_f_linear_and_each_gradient_is_that_of_the_dense_layer(c: Case) -> None:
    x, weight, subnet, out_idx, in_idx, bias = operands(c)
    if c.hooks:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            y = subnet_linear(x, weight, subnet, out_idx, in_idx, bias, mode=c.mode)
    else:
        y = subnet_linear(x, weight, subnet, out_idx, in_idx, bias, mode=c.mode)
    assert torch.equal(y, F.linear(x, weight, bias))
    trained = [t for t in (x, weight, subnet, bias) if t is not None and t.requires_grad]
    assert y.requires_grad == bool(trained)
    if not trained:
        return

    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(c.seed)).to(c.dtype)
    y.backward(dy)
    flat_dy, flat_x = dy.reshape(-1, c.out), x.detach().reshape(-1, c.into)
    for t in (x, weight, subnet, bias):
        if t is not None:
            assert (t.grad is not None) == t.requires_grad
            assert t.grad is None or (t.grad.dtype, t.grad.shape) == (t.dtype, t.shape)
    if x.grad is not None:
        assert_product(x.grad.reshape(-1, c.into), flat_dy, weight.detach(), c.dtype)
    if weight.grad is not None:
        assert_product(weight.grad, flat_dy.T, flat_x, subnet.dtype)
    if subnet.grad is not None:
        assert_product(subnet.grad, flat_dy.T[out_idx], flat_x[:, in_idx], subnet.dtype)
    if bias is not None and bias.grad is not None:
        ones = torch.ones(len(flat_dy), 1, dtype=c.dtype)
        assert_product(bias.grad[:, None], flat_dy.T, ones, c.dtype)


@pytest.mark.parametrize("mode", ["pro", "dense"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3), (0,)], ids=str)
def test_gradcheck(leading: tuple[int, ...], with_bias: bool, mode: str) -> None:
    """The forward reads ``weight`` alone, so what a perturbed subnet does is seen through a weight that
    has it put into its place; by way of ``detach``, so that ``subnet_linear`` gives the only gradient."""
    torch.manual_seed(0)
    out_idx, in_idx = torch.tensor([4, 1]), torch.tensor([0, 3, 2])
    base = torch.randn(6, 5, dtype=WIDE)

    def layer(x: Tensor, subnet: Tensor, bias: Tensor | None) -> Tensor:
        weight = base.index_put((out_idx[:, None], in_idx), subnet.detach())
        return subnet_linear(x, weight, subnet, out_idx, in_idx, bias, mode=mode)

    x = torch.randn(*leading, 5, dtype=WIDE, requires_grad=True)
    subnet = torch.randn(2, 3, dtype=WIDE, requires_grad=True)
    bias = torch.randn(6, dtype=WIDE, requires_grad=True) if with_bias else None
    assert torch.autograd.gradcheck(layer, (x, subnet, bias), check_batched_grad=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, WIDE], ids=str)
def test_gradient_of_the_subnet_has_the_subnets_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    out_idx, in_idx = torch.tensor([0, 5]), torch.tensor([1, 2, 7])
    subnet = weight[out_idx][:, in_idx].to(dtype).requires_grad_()
    dy = torch.randn(64, 6).bfloat16()
    subnet_linear(x, weight, subnet, out_idx, in_idx).backward(dy)
    assert subnet.grad is not None and subnet.grad.dtype == dtype
    accumulated = torch.promote_types(dtype, torch.float32)  # never in bf16
    assert_product(subnet.grad, dy.T[out_idx], x[:, in_idx], accumulated)


@pytest.mark.parametrize("mode", ["pro", "dense"])
def test_a_layer_used_twice_gets_the_sum_of_both_gradients(mode: str) -> None:
    torch.manual_seed(0)
    out_idx, in_idx = torch.tensor([1, 3, 4]), torch.tensor([0, 5])
    weight = torch.randn(6, 6, dtype=WIDE)
    subnet = weight[out_idx][:, in_idx].requires_grad_()
    x = torch.randn(7, 6, dtype=WIDE)
    y = subnet_linear(x, weight, subnet, out_idx, in_idx, mode=mode).tanh()
    subnet_linear(y, weight, subnet, out_idx, in_idx, mode=mode).square().sum().backward()

    dense = weight.clone().requires_grad_()
    F.linear(F.linear(x, dense).tanh(), dense).square().sum().backward()
    assert dense.grad is not None
    torch.testing.assert_close(subnet.grad, dense.grad[out_idx][:, in_idx])


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_product_is_bf16_and_each_gradient_its_owners(given) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8).to(given).requires_grad_()
    weight, bias = torch.randn(6, 8), torch.randn(6, requires_grad=True)
    out_idx, in_idx = torch.tensor([0, 5]), torch.tensor([1, 2, 7])
    subnet = weight[out_idx][:, in_idx].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = subnet_linear(x, weight, subnet, out_idx, in_idx, bias)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, F.linear(x, weight, bias))
    dy = torch.randn(3, 5, 6).bfloat16()
    y.backward(dy)
    assert x.grad is not None and x.grad.dtype == given
    assert subnet.grad is not None and bias.grad is not None
    rounded, flat_dy = x.detach().bfloat16().reshape(-1, 8), dy.reshape(-1, 6)
    assert_product(subnet.grad, flat_dy.T[out_idx], rounded[:, in_idx], torch.float32)
    assert_product(bias.grad[:, None], flat_dy.T, torch.ones(15, 1), torch.float32)
    assert_product(x.grad.reshape(-1, 8), flat_dy, weight.bfloat16(), torch.bfloat16)


def test_autocast_leaves_fp64_alone() -> None:
    x, weight = torch.randn(3, 8, dtype=WIDE), torch.randn(6, 8, dtype=WIDE)
    idx = torch.arange(2)
    subnet = weight[:2, :2].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = subnet_linear(x, weight, subnet, idx, idx)
    assert torch.equal(y, x @ weight.T) and y.dtype == WIDE


def test_a_backward_inside_autocast_gives_the_same_bits() -> None:
    """fp32 gradients of the subnet are never computed in bf16, wherever ``backward`` is called."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 8), torch.randn(6, 8)
    idx = torch.tensor([0, 3, 5])
    grads = []
    for enabled in (False, True):
        subnet = weight[idx][:, idx].requires_grad_()
        y = subnet_linear(x, weight, subnet, idx, idx)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y.square().sum().backward()
        grads.append(subnet.grad)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("hooks", [False, True], ids=["", "saved-tensor hooks"])
def test_a_graph_can_be_kept_and_once_freed_says_so(hooks: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(6, 8)
    idx = torch.tensor([0, 3, 5])
    subnet = weight[idx][:, idx].requires_grad_()
    with torch.autograd.graph.save_on_cpu() if hooks else nullcontext():
        loss = subnet_linear(x, weight, subnet, idx, idx).sum()
    first = torch.autograd.grad(loss, (x, subnet), retain_graph=True)
    again = torch.autograd.grad(loss, (x, subnet))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, (x, subnet))


@pytest.mark.parametrize(("n_out", "n_in"), [(0, 1), (1, 0), (0, 0)])
def test_a_subnet_of_none_of_one_neuron_gets_an_empty_gradient(n_out, n_in):
    out_idx, in_idx = torch.arange(n_out), torch.arange(n_in)
    subnet = torch.empty(n_out, n_in, requires_grad=True)
    subnet_linear(torch.ones(5, 1), torch.ones(1, 1), subnet, out_idx, in_idx).sum().backward()
    assert subnet.grad.shape == (n_out, n_in)


class Between:
    """A dtype that is equal to all; while it is compared, something else happens, as if in another thread."""

    def __init__(self, happens: Callable[[], object]) -> None:
        self.happens = happens

    def __eq__(self, other: object) -> bool:
        self.happens()
        return True

    __hash__ = None  # type: ignore[assignment]


def test_threads_that_share_inputs_each_get_the_columns_of_their_own():
    shared, x, other = SharedInputs(torch.tensor([0, 2])), torch.zeros(1, 4), torch.ones(1, 4)

    def gather(_: object) -> Tensor:
        return x[:, shared.in_idx]

    def another() -> Tensor:
        return shared.columns(other, other, lambda flat: flat[:, shared.in_idx])

    flats = [SimpleNamespace(dtype=Between(another)) for _ in range(2)]
    first, second = (shared.columns(x, flat, gather) for flat in flats)
    assert second is first
