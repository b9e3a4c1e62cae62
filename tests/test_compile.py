"""The layer under torch.compile, torch.func and opcheck."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from toys import Block

import losia_pro
from losia_pro import SubnetLinear, subnet_linear


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(mode: str = "pro") -> nn.Module:
    torch.manual_seed(0)
    block = Block()
    config = losia_pro.LosiaConfig(rank_factor=1 / 4, mode=mode, train_bias=True)
    losia_pro.attach(block, config)
    return block


def gradients(block: nn.Module, function: object, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    trained = [p for p in block.parameters() if p.requires_grad]
    assert len(trained) == 3  # two subnets and a bias
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


@pytest.mark.parametrize("mode", ["pro", "dense"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_block_compiles_whole_and_gives_the_same_bits(backend, checkpointed, mode):
    b = block(mode)
    x = torch.randn(5, 16)

    def run(x: Tensor) -> Tensor:
        return checkpoint(b, x, use_reentrant=False) if checkpointed else b(x)

    want = gradients(b, run, x)
    got = gradients(b, torch.compile(run, backend=backend, fullgraph=True), x)
    for a, c in zip(got, want, strict=True):
        assert torch.equal(a, c)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autocast_compiles_too(backend):
    b = block()
    x = torch.randn(5, 16)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return b(x)

    want = gradients(b, run, x)
    got = gradients(b, torch.compile(run, backend=backend, fullgraph=True), x)
    for a, c in zip(got, want, strict=True):
        assert a.dtype == c.dtype and torch.equal(a, c)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_moved_subnets_are_followed_without_recompiling(backend):
    """More moves than the compiler's limit of variants, 8."""
    b = block()
    compiled = torch.compile(b, backend=backend, fullgraph=True)
    x = torch.randn(5, 16)
    gradients(b, compiled, x)
    layers = [m for m in b.modules() if isinstance(m, SubnetLinear)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(10):
            for m in layers:
                out_idx, in_idx = (
                    torch.randperm(size)[: len(idx)]
                    for size, idx in ((m.out_features, m.out_idx), (m.in_features, m.in_idx))
                )
                m.select(out_idx, in_idx)
                with torch.no_grad():
                    m.subnet.add_(0.1)
                m.write_back()
            for got, want in zip(gradients(b, compiled, x), gradients(b, b, x), strict=True):
                assert torch.equal(got, want)


def test_the_compiler_writes_an_input_once_for_the_gather_and_the_product(monkeypatch):
    """Where the op binds its input's strides, Inductor computes x a second time for it."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 24, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(2 * x)

    model = Scaled()
    config = losia_pro.LosiaConfig(in_factor=1 / 2, neuron_group=4, target_modules=["linear"])
    losia_pro.attach(model, config)
    x = torch.randn(2, 3, 16)
    # The code is looked at, and not run: no C++ compiler is asked for it.
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", list)
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_, **__: lambda *_: None)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, (code, *_) = run_and_get_code(torch.compile(model, fullgraph=True), x)
    read = r"(?:reinterpret_tensor\()?(buf\d+)"
    gathered = re.findall(r"gather_columns\.default\(" + read, code)
    multiplied = re.findall(r"extern_kernels\.mm\(" + read, code)
    assert len(gathered) == 1 and gathered == multiplied


def test_indices_changed_after_a_compiled_forward_are_refused():
    b = block()
    y = torch.compile(b, backend="aot_eager", fullgraph=True)(
        torch.randn(5, 16, requires_grad=True)
    )
    layer = next(m for m in b.modules() if isinstance(m, SubnetLinear))
    layer.select(layer.out_idx.clone(), layer.in_idx.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def per_example(layer: SubnetLinear, x: Tensor, dy: Tensor) -> Tensor:
    rows = [
        torch.autograd.grad((layer(a) * b).sum(), layer.subnet)[0]
        for a, b in zip(x, dy, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["pro", "dense"])
def test_func_grad_and_vmap_give_each_examples_gradient(mode):
    torch.manual_seed(0)
    layer = SubnetLinear.from_linear(
        nn.Linear(12, 10, dtype=torch.float64), rank_factor=1 / 3, mode=mode
    )
    x, dy = torch.randn(4, 3, 12).double(), torch.randn(4, 3, 10).double()

    def loss(subnet: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return (functional_call(layer, {"subnet": subnet}, (x,)) * dy).sum()

    want = per_example(layer, x, dy)
    subnet = layer.subnet.detach()
    torch.testing.assert_close(grad(loss)(subnet, x[0], dy[0]), want[0])
    torch.testing.assert_close(vmap(grad(loss), (None, 0, 0))(subnet, x, dy), want)


@pytest.mark.parametrize("wants", ["x", "weight", "subnet", "x weight subnet"])
@pytest.mark.parametrize("batched", ["x", "weight subnet", "x weight subnet"])
def test_gradients_flow_out_of_a_vmap_to_whoever_wants_them(batched, wants):
    """Within, a tensor in batches does not say that it requires grad: an ensemble would not be trained."""
    torch.manual_seed(0)
    idx = torch.tensor([0, 2])
    tensors = {
        "x": torch.randn(3, 5, 6) if "x" in batched else torch.randn(5, 6),
        "weight": torch.randn(3, 4, 6) if "weight" in batched else torch.randn(4, 6),
    }
    tensors["subnet"] = tensors["weight"][..., idx, :][..., idx].clone()
    leaves = [tensors[name].requires_grad_() for name in wants.split()]

    def layer(x: Tensor, weight: Tensor, subnet: Tensor) -> Tensor:
        return subnet_linear(x, weight, subnet, idx, idx)

    y = vmap(layer, tuple(0 if name in batched else None for name in tensors))(*tensors.values())
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, dy)

    members = [
        layer(*(t[i] if name in batched else t for name, t in tensors.items())) for i in range(3)
    ]
    want = torch.autograd.grad(torch.stack(members), leaves, dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
