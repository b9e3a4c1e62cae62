"""SubnetLinear as a module: made from a linear and back, its subnet moved, its values written into the weight."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import losia_pro.linear
from losia_pro import SubnetLinear, guard

pytestmark = pytest.mark.filterwarnings("error")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def block(layer: SubnetLinear) -> Tensor:
    """The subnet's entries of the dense weight."""
    return layer.weight.detach()[layer.out_idx][:, layer.in_idx]


def by_entry(layer: SubnetLinear) -> dict[tuple[int, int], float]:
    """The compact values by their place in the dense weight."""
    places = itertools.product(layer.out_idx.tolist(), layer.in_idx.tolist())
    return dict(zip(places, layer.subnet.detach().flatten().tolist(), strict=True))


def train_once(layer: SubnetLinear, scale: float = 1e-4) -> None:
    """Change the compact values by less than a bf16 weight can hold."""
    with torch.no_grad():
        layer.subnet.add_(torch.randn_like(layer.subnet), alpha=scale)
    layer.write_back()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_new_layer_starts_as_the_linear_of_the_same_seed(dtype, bias):
    torch.manual_seed(0)
    plain = nn.Linear(24, 17, bias, dtype=dtype)
    torch.manual_seed(0)
    layer = SubnetLinear(24, 17, bias, rank_factor=1 / 4, dtype=dtype)
    assert layer.subnet.shape == (4, 6)  # floor(17 / 4), floor(24 / 4)
    for name, t in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[name], t)
    for idx, size in ((layer.out_idx, 17), (layer.in_idx, 24)):
        assert idx.dtype == torch.int64 and set(idx.tolist()) <= set(range(size))
        assert bool((idx[1:] > idx[:-1]).all())
    assert layer.subnet.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert torch.equal(layer.subnet.to(dtype), block(layer))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["subnet"]


def test_the_first_subnet_follows_the_generator_alone():
    plain = nn.Linear(64, 64)

    def places(seed: int) -> tuple[list[int], list[int]]:
        layer = SubnetLinear.from_linear(plain, generator=torch.Generator().manual_seed(seed))
        return layer.out_idx.tolist(), layer.in_idx.tolist()

    before = torch.get_rng_state()
    assert places(1) == places(1) != places(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_converting_shares_the_parameters_and_converts_back(bias):
    plain = nn.Linear(24, 16, bias).eval()
    layer = SubnetLinear.from_linear(plain)
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert isinstance(layer, nn.Linear) and not layer.training
    assert not any(p.requires_grad for p in plain.parameters())
    x = torch.randn(5, 24)
    assert torch.equal(layer(x), plain(x))
    with torch.no_grad():
        layer.subnet.add_(1)  # not written back
    back = layer.to_linear()
    assert type(back) is nn.Linear and not back.training
    assert back.weight is plain.weight and back.bias is plain.bias
    assert torch.equal(block(layer), layer.subnet)
    assert torch.equal(back(x), F.linear(x, plain.weight, plain.bias))
    assert repr(back) == repr(plain) and back.state_dict().keys() == plain.state_dict().keys()


def test_sizes_override_the_rank_factor():
    layer = SubnetLinear.from_linear(nn.Linear(24, 16), rank_factor=1 / 8, n_in=24, n_out=3)
    assert layer.subnet.shape == (3, 24) and layer.in_idx.tolist() == list(range(24))
    assert SubnetLinear.from_linear(nn.Linear(24, 16), n_out=5).subnet.shape == (5, 3)


def test_a_trained_bias_gets_its_gradient_in_its_own_dtype():
    torch.manual_seed(0)
    plain = nn.Linear(24, 16, dtype=torch.bfloat16)
    layer = SubnetLinear.from_linear(plain, train_bias=True)
    x, dy = torch.randn(2, 5, 24).bfloat16(), torch.randn(2, 5, 16).bfloat16()
    layer(x).backward(dy)
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"subnet", "bias"}
    dense = nn.Linear(24, 16, dtype=torch.bfloat16)
    dense.load_state_dict(plain.state_dict())
    dense(x).backward(dy)
    assert layer.bias.grad.dtype == torch.bfloat16
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=2**-7, atol=0)


@pytest.mark.parametrize("mode", ["pro", "dense"])
def test_a_layers_gradient_is_the_slice_of_the_dense_one(mode):
    torch.manual_seed(0)
    plain = nn.Linear(24, 16, dtype=torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64)
    plain(x).square().sum().backward()
    want = plain.weight.grad
    layer = SubnetLinear.from_linear(plain, mode=mode)
    y = layer(x)
    kept = [t.shape for t in y.grad_fn.saved_tensors if t is not None]
    assert (x.shape in kept) == (mode == "dense")
    y.square().sum().backward()
    torch.testing.assert_close(layer.subnet.grad, want[layer.out_idx][:, layer.in_idx])


@st.composite
def moves(draw: st.DrawFn) -> tuple[int, int, list[int], list[int], torch.dtype]:
    into, out = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    rows = draw(st.permutations(range(out)))[: draw(st.integers(1, out))]
    columns = draw(st.permutations(range(into)))[: draw(st.integers(1, into))]
    return into, out, rows, columns, draw(st.sampled_from(DTYPES))


@settings(max_examples=200, deadline=None)
@given(moves())
def test_selecting_keeps_exact_values_of_entries_that_stay_and_reads_the_others(move):
    into, out, rows, columns, dtype = move
    torch.manual_seed(0)
    layer = SubnetLinear.from_linear(
        nn.Linear(into, out, dtype=dtype), n_out=len(rows), n_in=len(columns)
    )
    train_once(layer)
    old = by_entry(layer)
    weight, parameter = layer.weight.detach().clone(), layer.subnet
    layer.select(torch.tensor(rows), torch.tensor(columns))
    assert layer.out_idx.tolist() == sorted(rows) and layer.in_idx.tolist() == sorted(columns)
    assert layer.subnet is parameter and torch.equal(layer.weight, weight)
    for (r, c), value in by_entry(layer).items():
        assert value == old.get((r, c), float(weight[r, c]))


def test_selecting_writes_back_what_was_trained_first():
    layer = SubnetLinear(16, 16, rank_factor=1 / 4)
    with torch.no_grad():
        layer.subnet.add_(1)
    value = float(layer.subnet[0, 0].detach())
    row, column = int(layer.out_idx[0]), int(layer.in_idx[0])
    others = [
        torch.tensor([i for i in range(16) if i not in idx.tolist()][:4])
        for idx in (layer.out_idx, layer.in_idx)
    ]
    layer.select(*others)
    assert float(layer.weight[row, column].detach()) == value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_back_rounds_once_and_can_be_repeated(dtype):
    torch.manual_seed(0)
    layer = SubnetLinear(24, 16, rank_factor=1 / 4, dtype=dtype)
    before = layer.weight.detach().clone()
    train_once(layer, scale=1e-2)
    assert torch.equal(block(layer), layer.subnet.detach().to(dtype))
    outside = torch.ones_like(before, dtype=torch.bool)
    outside[layer.out_idx[:, None], layer.in_idx] = False
    assert torch.equal(layer.weight[outside], before[outside])
    once, compact = layer.weight.detach().clone(), layer.subnet.detach().clone()
    layer.write_back()
    assert torch.equal(layer.weight, once) and torch.equal(layer.subnet, compact)


def test_small_updates_to_a_bf16_weight_arrive():
    """200 updates of 1e-4 to 1.0: each one alone is lost in bf16, whose next number is 1 + 2^-7."""
    layer = SubnetLinear(8, 8, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1)
    layer.adopt_weight()
    plain = layer.weight.detach().clone()
    for _ in range(200):
        with torch.no_grad():
            layer.subnet += 1e-4
            plain += 1e-4
        layer.write_back()
    assert bool((plain == 1).all())
    assert float(layer.subnet.detach()) == pytest.approx(1.02, abs=201 * 2**-24)
    assert float(block(layer)) == 1 + 3 * 2**-7  # the bf16 number nearest to 1.02


def test_a_subnet_that_is_not_written_back_warns_once():
    losia_pro.linear._warn_stale.cache_clear()
    layer, x = SubnetLinear(16, 16), torch.randn(3, 16)
    optimizer = torch.optim.SGD([layer.subnet], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(x).sum().backward()
        assert not caught
        optimizer.step()
        for _ in range(3):
            layer(x).sum().backward()
            SubnetLinear(16, 16)(x)
            optimizer.step()
    assert [str(w.message)[:20] for w in caught] == ["a subnet was changed"]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("settle", ["write_back", "select", "adopt_weight", "load_state_dict"])
def test_a_settled_subnet_does_not_warn(settle):
    losia_pro.linear._warn_stale.cache_clear()
    layer = SubnetLinear(16, 16)
    with torch.no_grad():
        layer.subnet.add_(1)
    arguments = {
        "select": (layer.out_idx.clone(), layer.in_idx.clone()),
        "load_state_dict": (nn.Linear(16, 16).state_dict(),),
    }
    getattr(layer, settle)(*arguments.get(settle, ()))
    layer(torch.randn(3, 16))  # warnings are errors here


class Sharded(nn.Parameter):
    """As FSDP2's: what a step changes is not what a forward reads."""

    device_mesh = None


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(("rate", "changed"), [(0.0, False), (0.1, True)])
def test_a_step_of_shards_at_a_rate_of_zero_leaves_nothing_to_write(rate, changed, as_tensor):
    """``torch.distributed.checkpoint`` makes one, with a tensor on the CPU where rates are tensors."""
    layer = SubnetLinear(16, 16)
    layer.subnet = Sharded(layer.subnet.detach())
    layer.subnet.grad = torch.zeros_like(layer.subnet)
    torch.optim.SGD([layer.subnet], lr=torch.tensor(rate) if as_tensor else rate).step()
    assert (layer._written == guard.STEPPED) == changed
