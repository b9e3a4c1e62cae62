"""What the layer, the function and the ops refuse: at the door, with the value, and nothing half-done."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from losia_pro import SubnetLinear, dispatch, ops, subnet_linear

OPS = torch.ops.losia_pro


def idx(*values: int, **options: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, **options)


# --- making a layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0, -0.5, 1.01, float("nan")])
def test_a_rank_factor_outside_0_to_1_is_refused(factor):
    plain = nn.Linear(24, 16)
    for make in (
        lambda: SubnetLinear(24, 16, rank_factor=factor),
        lambda: SubnetLinear.from_linear(plain, rank_factor=factor),
    ):
        with pytest.raises(ValueError, match=rf"rank_factor must be in \(0, 1\], got {factor}"):
            make()
    assert plain.weight.requires_grad and plain.bias.requires_grad


@pytest.mark.parametrize(
    "sizes, found",
    [
        ({"rank_factor": 1 / 32}, "0 inputs and 0 outputs"),
        ({"rank_factor": 1 / 20}, "1 inputs and 0 outputs"),
        ({"n_in": 25}, "25 inputs and 2 outputs"),
        ({"n_out": 17}, "3 inputs and 17 outputs"),
        ({"n_out": 0}, "3 inputs and 0 outputs"),
        ({"n_in": -1}, "-1 inputs and 2 outputs"),
    ],
    ids=str,
)
def test_a_subnet_that_does_not_fit_is_refused(sizes, found):
    plain = nn.Linear(24, 16)
    with pytest.raises(ValueError, match=f"24 inputs and 16 outputs cannot hold .* {found}"):
        SubnetLinear.from_linear(plain, **sizes)
    assert plain.weight.requires_grad and plain.bias.requires_grad


def test_weights_on_the_meta_device_are_refused():
    plain = nn.Linear(24, 16, device="meta")
    with pytest.raises(ValueError, match="meta device; load its weights first"):
        SubnetLinear.from_linear(plain)
    with pytest.raises(ValueError, match="meta device; load its weights first"):
        SubnetLinear(24, 16, device="meta")
    assert plain.weight.requires_grad


# --- moving a subnet -------------------------------------------------------------------------------

BAD_INDICES = {
    "too few": (idx(1), r"int64 of shape \(3,\), got torch.int64 \(1,\)"),
    "2-D": (idx(0, 1, 2)[None], r"int64 of shape \(3,\), got torch.int64 \(1, 3\)"),
    "int32": (idx(0, 1, 2).int(), "got torch.int32"),
    "negative": (idx(3, -1, 2), r"within \[0, 12\), got -1..3"),
    "too large": (idx(3, 12, 2), r"within \[0, 12\), got 2..12"),
    "duplicate": (idx(5, 2, 5), "holds duplicates"),
    "elsewhere": (idx(0, 1, 2, device="meta"), "must be on cpu, got meta"),
}


@pytest.mark.parametrize("which", ["out_idx", "in_idx"])
@pytest.mark.parametrize("case", BAD_INDICES)
def test_bad_indices_are_refused_and_change_nothing(case, which):
    layer = SubnetLinear(12, 12, rank_factor=1 / 4)
    with torch.no_grad():
        layer.subnet.add_(1)  # not written back
    before = {k: t.clone() for k, t in [*layer.named_parameters(), *layer.named_buffers()]}
    bad, message = BAD_INDICES[case]
    with pytest.raises(ValueError, match=f"{which} .*{message}"):
        layer.select(**{"out_idx": idx(3, 4, 5), "in_idx": idx(3, 4, 5), which: bad})
    for k, t in [*layer.named_parameters(), *layer.named_buffers()]:
        assert torch.equal(t, before[k])


# --- calling ---------------------------------------------------------------------------------------

GOOD = {
    "x": torch.zeros(3, 6),
    "weight": torch.zeros(5, 6),
    "subnet": torch.zeros(2, 3),
    "out_idx": idx(0, 4),
    "in_idx": idx(0, 2, 5),
}
BAD_CALLS = {
    "mode": ({"mode": "fast"}, 'mode must be "pro" or "dense", got \'fast\''),
    "out_idx 2-D": ({"out_idx": idx(0, 4)[None]}, "out_idx must be 1-D int64 on x's cpu"),
    "in_idx int32": ({"in_idx": idx(0, 2, 5).int()}, "in_idx must be 1-D int64 .* got torch.int32"),
    "in_idx elsewhere": ({"in_idx": idx(0, 2, 5, device="meta")}, "in_idx .* got .* on meta"),
    "subnet": ({"subnet": torch.zeros(3, 2)}, r"subnet must be .* = \(2, 3\), got \(3, 2\)"),
    "weight 1-D": ({"weight": torch.zeros(6)}, r"weight must be \(out, in\), got \(6,\)"),
    "x 0-D": ({"x": torch.zeros(())}, r"x must be \(..., 6\), got \(\)"),
    "x": ({"x": torch.zeros(3, 5)}, r"x must be \(..., 6\), got \(3, 5\)"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_operands_that_do_not_fit_are_refused(case):
    bad, message = BAD_CALLS[case]
    assert subnet_linear(**GOOD).shape == (3, 5)
    with pytest.raises(ValueError, match=message):
        subnet_linear(**{**GOOD, **bad})


@pytest.mark.parametrize(
    "how, error", [({"impl": "fastest"}, ValueError), ({"impl": "cuda"}, RuntimeError)], ids=str
)
def test_a_layer_uses_the_implementation_that_it_was_given(how, error):
    layer = SubnetLinear.from_linear(nn.Linear(12, 12), **how)
    with pytest.raises(error, match=f"impl.*{how['impl']}"):
        layer(torch.zeros(3, 12))
    with pytest.raises(error, match=f"impl.*{how['impl']}"):
        layer.write_back()


# --- differentiating -------------------------------------------------------------------------------


@pytest.mark.parametrize("hooks", [False, True], ids=["", "saved-tensor hooks"])
def test_a_weight_changed_after_the_forward_is_refused(hooks):
    layer, x = SubnetLinear(12, 12), torch.randn(3, 12, requires_grad=True)
    with torch.autograd.graph.save_on_cpu() if hooks else torch.enable_grad():
        y = layer(x)
    layer.write_back()
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


@pytest.mark.parametrize("wrt", ["x", "subnet"])
@pytest.mark.parametrize("hooks", [False, True], ids=["", "saved-tensor hooks"])
def test_a_second_derivative_is_refused_and_a_first_with_a_graph_is_not(hooks, wrt):
    layer, x = SubnetLinear(12, 12), torch.randn(3, 12, requires_grad=True)
    with torch.autograd.graph.save_on_cpu() if hooks else torch.enable_grad():
        loss = layer(x).square().sum()
    target = x if wrt == "x" else layer.subnet
    (once,) = torch.autograd.grad(loss, target, create_graph=True)
    (want,) = torch.autograd.grad(layer(x).square().sum(), target)
    assert torch.equal(once, want)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        once.sum().backward()


def test_func_refuses_a_second_derivative():
    layer, x = SubnetLinear(12, 12), torch.randn(3, 12)

    def loss(subnet: Tensor) -> Tensor:
        return functional_call(layer, {"subnet": subnet}, (x,)).square().sum()

    subnet = layer.subnet.detach()
    assert grad(loss)(subnet).shape == subnet.shape
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad(lambda s: grad(loss)(s).sum())(subnet)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        jacrev(jacrev(loss))(subnet)


# --- the ops ---------------------------------------------------------------------------------------

W, X, DY, SUB = torch.zeros(5, 6), torch.zeros(3, 6), torch.zeros(3, 5), torch.zeros(2, 2)
UPDATE = (W, W, W, DY, X, None, 0.85, 0.85)
BAD_OPS = {
    "x not a matrix": ("gather_columns", (X[0], idx(0, 1)), "x must be a floating-point matrix"),
    "x of integers": ("gather_columns", (X.long(), idx(0, 1)), "x must be .* got torch.int64"),
    "float indices": ("gather_columns", (X, torch.zeros(2)), "in_idx must be 1-D int64, got torch.float"),
    "other tokens": ("subnet_grad", (DY, X[:2], idx(0, 1)), r"\(3, 5\).* \(2, 6\).* must agree"),
    "other dtype": ("subnet_grad", (DY, X.bfloat16(), idx(0, 1)), "bfloat16.* must agree"),
    "dy 3-D": ("subnet_grad", (DY[None], X, idx(0, 1)), "dy must be a floating-point matrix"),
    "importance": ("importance_update_", (W.T, *UPDATE[1:], "taylor"), r"importance .* \(5, 6\), got \(6, 5\)"),
    "uncertainty": ("importance_update_", (W, W[1:], *UPDATE[2:], "taylor"), "uncertainty must be"),
    "grad": ("importance_update_", (W, W, W, DY, X, W[1:], 0.85, 0.85, "taylor"), "grad must be"),
    "tokens": ("importance_update_", (W, W, W, DY[1:], X, None, 0.85, 0.85, "taylor"), "dy has 2 tokens, x has 3"),
    "variant": ("importance_update_", (*UPDATE, "third"), "variant must be one of .* got 'third'"),
    "lengths": ("write_back_", ([W], [SUB], [idx(0, 1)], []), "1 weights, .* 0 in_idx must be equally many"),
    "subnet": ("write_back_", ([W], [SUB], [idx(0, 1)], [idx(0)]), r"subnet must be .* = \(2, 1\), got \(2, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPS)
def test_an_op_refuses_what_does_not_fit(case):
    op, arguments, message = BAD_OPS[case]
    with pytest.raises(ValueError, match=message):
        getattr(OPS, op)(*arguments)
    assert not W.any()


AWAY = torch.zeros(5, 6, device="meta")
ELSEWHERE = {
    "subnet": ("write_back_", ([W], [AWAY[:2, :2]], [idx(0, 1)], [idx(0, 1)])),
    "x": ("importance_update_", (W, W, W, DY, AWAY[:3], None, 0.85, 0.85, "taylor")),
    "importance": ("importance_update_", (AWAY, *UPDATE[1:], "taylor")),
    "weight": ("importance_update_", (W, W, AWAY, *UPDATE[3:], "taylor")),
    "grad": ("importance_update_", (W, W, W, DY, X, AWAY, 0.85, 0.85, "taylor")),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_an_op_refuses_what_is_elsewhere(what):
    """A kernel would take its address for one of its own device. (Off the dispatcher, which takes meta for a trace.)"""
    op, arguments = ELSEWHERE[what]
    with pytest.raises(ValueError, match=f"{what} is on meta, the data on cpu"):
        getattr(ops, "_" + op)(*arguments)


@pytest.mark.parametrize("bad", [idx(0, 6), idx(-1, 0)], ids=str)
def test_indices_out_of_range_are_named_where_asked_for(bad, monkeypatch):
    """They are only checked under LOSIA_DEBUG=1: on a GPU the check waits for the device."""
    monkeypatch.setattr(dispatch, "DEBUG", True)
    low, high = bad.tolist()
    found = re.escape(f"got {low}..{high}")
    with pytest.raises(IndexError, match=rf"in_idx must be within \[0, 6\), {found}"):
        OPS.gather_columns(X, bad)
    with pytest.raises(IndexError, match=rf"out_idx must be within \[0, 5\), {found}"):
        OPS.subnet_grad(DY, X, bad)
    with pytest.raises(IndexError, match=rf"in_idx must be within \[0, 6\), {found}"):
        OPS.write_back_([W], [SUB], [idx(0, 1)], [bad])
    OPS.gather_columns(X, idx())
    OPS.gather_columns(X, idx(5, 0))
