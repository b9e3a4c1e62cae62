"""SubnetLinear's state: nn.Linear's checkpoints, dtype and device conversions, copies, files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from losia_pro import SubnetLinear

pytestmark = pytest.mark.filterwarnings("error")

BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def trained(bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> SubnetLinear:
    """A layer whose compact values are no values of its dense weight's dtype, written back, with a gradient."""
    torch.manual_seed(0)
    layer = SubnetLinear(16, 12, bias, rank_factor=1 / 4, dtype=dtype)
    with torch.no_grad():
        layer.subnet.add_(torch.randn_like(layer.subnet), alpha=1e-3)
    layer.write_back()
    layer.subnet.grad = torch.randn_like(layer.subnet)
    return layer


def compact(layer: SubnetLinear) -> dict[str, Tensor]:
    return {
        "subnet": layer.subnet.detach().clone(),
        "out_idx": layer.out_idx.clone(),
        "in_idx": layer.in_idx.clone(),
    }


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, t in a.items():
        assert t.dtype == b[key].dtype and torch.equal(t, b[key]), key


@BIAS
def test_a_checkpoint_is_that_of_a_linear(bias):
    layer = trained(bias)
    assert list(layer.state_dict()) == list(nn.Linear(16, 12, bias).state_dict())
    plain = nn.Linear(16, 12, bias, dtype=torch.bfloat16)
    assert str(plain.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(5, 16).bfloat16()
    assert torch.equal(plain(x), layer(x))


@BIAS
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_linears_checkpoint_takes_its_values_over(bias, assign):
    layer = trained(bias)
    before = compact(layer)
    plain = nn.Linear(16, 12, bias, dtype=torch.bfloat16)
    layer.load_state_dict(plain.state_dict(), assign=assign)
    want = plain.weight.detach()[layer.out_idx][:, layer.in_idx].float()
    assert_equal(compact(layer), before | {"subnet": want})
    assert torch.equal(layer.weight, plain.weight) and not layer.weight.requires_grad
    layer.write_back()
    assert torch.equal(layer.weight, plain.weight)


def test_loading_its_own_checkpoint_keeps_the_exact_values():
    layer = trained()
    before = compact(layer)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert_equal(compact(layer), before)


def test_adopting_a_weight_keeps_what_rounds_to_it_and_reads_the_rest():
    layer = trained()
    before = compact(layer)
    with torch.no_grad():
        layer.weight[layer.out_idx[0], layer.in_idx[1]] = 3
    layer.adopt_weight()
    before["subnet"][0, 1] = 3
    assert_equal(compact(layer), before)


@pytest.mark.parametrize("nested", [False, True])
def test_a_strict_load_still_finds_what_is_missing_or_unexpected(nested):
    layer = nn.Sequential(trained()) if nested else trained()
    prefix = "0." if nested else ""
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{prefix}weight"'):
        layer.load_state_dict({prefix + "bias": torch.zeros(12)})
    with pytest.raises(RuntimeError, match=rf'Unexpected key.*"{prefix}extra"'):
        layer.load_state_dict({**layer.state_dict(), prefix + "extra": torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("swap", [False, True], ids=["", "swapped parameters"])
def test_converting_the_dtype_keeps_the_subnet_and_its_gradient_exact(dtype, swap):
    layer = trained(dtype=torch.float32)
    before, grad, weight = compact(layer), layer.subnet.grad.clone(), layer.weight.detach().clone()
    parameter = layer.subnet
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layer.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer.subnet is parameter and layer.subnet.requires_grad
    assert torch.equal(layer.weight, weight.to(dtype)) and not layer.weight.requires_grad
    assert_equal(compact(layer), before)
    assert layer.subnet.grad.dtype == torch.float32 and torch.equal(layer.subnet.grad, grad)
    layer(torch.randn(3, 16, dtype=dtype)).sum().backward()


def test_a_layer_in_fp64_has_its_subnet_in_fp64():
    layer = trained()
    before, grad = compact(layer), layer.subnet.grad.clone()
    layer.double()
    assert_equal(compact(layer), before | {"subnet": before["subnet"].double()})
    assert layer.subnet.grad.dtype == torch.float64 and torch.equal(
        layer.subnet.grad, grad.double()
    )
    layer.float()
    assert_equal(compact(layer), before)


def test_an_optimizer_goes_on_after_a_conversion():
    layer = trained()
    optimizer = torch.optim.AdamW([layer.subnet], lr=0.1)
    optimizer.step()
    layer.float()
    before = layer.subnet.detach().clone()
    optimizer.step()
    assert bool((layer.subnet != before).all())


def test_a_conversion_does_not_hide_that_the_subnet_was_not_written():
    layer = trained(dtype=torch.float32)
    with torch.no_grad():
        layer.subnet.add_(1)
    layer.bfloat16()
    assert layer._written < layer.subnet._version
    layer.write_back()
    got = layer.weight.detach()[layer.out_idx][:, layer.in_idx]
    assert torch.equal(got, layer.subnet.detach().bfloat16())


def test_emptying_the_weights_leaves_the_subnet_where_it_is():
    """``to_empty`` gives memory of any content, which would be indices out of range."""
    layer = trained()
    before = compact(layer)
    layer.to_empty(device="cpu")
    assert_equal(compact(layer), before)
    plain = nn.Linear(16, 12, dtype=torch.bfloat16)
    layer.load_state_dict(plain.state_dict())
    layer.write_back()
    assert torch.equal(layer.weight, plain.weight)


def test_a_layer_can_go_to_the_meta_device_but_not_come_back():
    layer = trained().to("meta")
    assert all(
        t.is_meta for t in (layer.weight, layer.bias, layer.subnet, layer.out_idx, layer.in_idx)
    )
    assert layer.float().subnet.dtype == torch.float32
    layer(torch.empty(3, 16, device="meta")).sum().backward()
    assert layer.subnet.grad.is_meta and layer.subnet.grad.shape == (3, 4)
    with pytest.raises(RuntimeError, match="does not know where its subnet is"):
        layer.to_empty(device="cpu")


def test_shared_memory_holds_all_of_a_layer():
    layer = trained()
    before = compact(layer)
    layer.share_memory()
    assert all(
        t.is_shared() for t in (layer.weight, layer.bias, layer.subnet, layer.out_idx, layer.in_idx)
    )
    assert_equal(compact(layer), before)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copy_is_equal_and_independent(how, tmp_path):
    layer = trained()
    before = compact(layer)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    else:
        torch.save(layer, tmp_path / "layer.pt")
        other = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert_equal(compact(other), before)
    x = torch.randn(3, 16).bfloat16()
    assert torch.equal(other(x), layer(x))
    other.select(torch.arange(3), torch.arange(4))
    other(x).sum().backward()
    assert_equal(compact(layer), before)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == ["subnet"]


def test_a_copy_sees_when_its_own_subnet_is_not_written():
    layer = trained()
    for _ in range(5):
        layer.write_back()
        with torch.no_grad():
            layer.subnet.add_(1)
    layer.write_back()
    other = copy.deepcopy(layer)
    assert other._written >= other.subnet._version
    other.subnet.grad = torch.ones_like(other.subnet)
    torch.optim.SGD([other.subnet], lr=1.0, fused=True).step()
    assert other._written < other.subnet._version


def test_a_profile_follows_its_layer_once_that_is_converted():
    class Sink:
        def add(self, dy: Tensor, x: Tensor) -> None: ...

        def follow(self) -> None:
            seen.append((layer.weight.dtype, layer.subnet.dtype))

    seen: list[tuple[torch.dtype, torch.dtype]] = []
    layer = trained()
    layer.profile = Sink()
    layer.double()
    assert seen == [(torch.float64, torch.float64)]
