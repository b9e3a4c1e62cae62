"""The kernels that write subnets and weights, on the CPU; `test_kernels_interpreted.py` runs this file with
TRITON_INTERPRET=1."""

from __future__ import annotations

import lerps
import pytest
import torch
from adamw_steps import CONSTANTS, compare
from interpreted_kernels import choose

from losia_pro import SubnetLinear, dispatch, linear
from losia_pro.kernels import launch
from losia_pro.optim import AdamW


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_write_back_writes_every_layer_and_nothing_else(dtype):
    shapes = [(40, 56), (7, 1000), (64, 64), (1, 1), (9, 2000)]
    weights = [torch.randn(s).to(dtype) for s in shapes]
    weights[2] = weights[2].T
    rows = [choose(w.shape[0], -(-w.shape[0] // 4)) for w in weights]
    columns = [choose(w.shape[1], -(-w.shape[1] // 4)) for w in weights]
    for _ in range(2):  # with new tables, and with kept ones
        subnets = [torch.randn(len(r), len(c)) for r, c in zip(rows, columns, strict=True)]
        expected = [w.clone() for w in weights]
        for w, s, r, c in zip(expected, subnets, rows, columns, strict=True):
            w[r[:, None], c] = s.to(dtype)
        torch.ops.losia_pro.write_back_(weights, subnets, rows, columns, impl="triton")
        assert all(map(torch.equal, weights, expected))


def test_write_back_rounds_stochastically_to_the_bits_of_pytorch():
    shapes = [(40, 56), (7, 1000), (1, 1), (9, 2000)]
    weights = [torch.zeros(s).bfloat16() for s in shapes]
    weights[1] = torch.zeros(1000, 7).bfloat16().T
    rows, columns = ([choose(s[k], -(-s[k] // 4)) for s in shapes] for k in (0, 1))
    subnets = [torch.randn(len(r), len(c)) for r, c in zip(rows, columns, strict=True)]
    subnets[0][0, :3] = torch.tensor([torch.inf, -torch.inf, 3.39e38])
    for seed in (0, -3, 2**63 - 1):
        expected = [w.clone() for w in weights]
        layers = subnets, rows, columns
        torch.ops.losia_pro.write_back_(expected, *layers, seed=seed, impl="torch")
        torch.ops.losia_pro.write_back_(weights, *layers, seed=seed, impl="triton")
        assert all(map(torch.equal, weights, expected))


def test_write_back_refuses_what_it_would_read_wrongly_with_kept_tables_too(monkeypatch):
    weight, subnet, idx = torch.zeros(8, 8), torch.randn(4, 4), torch.arange(8)
    write = torch.ops.losia_pro.write_back_
    write([weight], [subnet], [idx[:4]], [idx[4:]], impl="triton")
    with pytest.raises(ValueError, match="subnet must be contiguous"):
        write([weight], [subnet.T], [idx[:4]], [idx[4:]], impl="triton")
    with pytest.raises(ValueError, match="out_idx must be contiguous"):
        write([weight], [subnet], [idx[::2]], [idx[4:]], impl="triton")
    monkeypatch.setattr(dispatch, "DEBUG", True)
    idx[3] = 8
    with pytest.raises(IndexError, match=r"out_idx must be within \[0, 8\), got 0..8"):
        write([weight], [subnet], [idx[:4]], [idx[4:]], impl="triton")


def test_a_weight_written_after_the_forward_is_refused():
    layer = SubnetLinear.from_linear(torch.nn.Linear(12, 12), impl="triton")
    y = layer(torch.randn(3, 12, requires_grad=True))
    layer.write_back()
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_is_pytorchs_step_with_the_same_random_bits(maximize):
    compare(launch.adamw_, [(64, 80), (5,), (1, 1), (33, 65)], "cpu", maximize)


def test_adamw_refuses_strides_by_name():
    p = torch.zeros(4, 6).bfloat16()
    with pytest.raises(ValueError, match="exp_avg_sq must be contiguous"):
        launch.adamw_([p], [p], [p], [p.T], [1], [1], maximize=False, **CONSTANTS)


def test_lerp_has_the_bits_of_pytorch():
    lerps.compare(launch.lerp_, "cpu", tiny=1e-37)  # the interpreter takes bf16 below 2^-126 for 0


@pytest.mark.parametrize("other", lerps.OTHERS)
def test_lerp_in_fp32_rounds_product_and_sum_one_by_one(other):
    lerps.compare_fp32(launch.lerp_, "cpu", other, tiny=1e-37)


def test_lerp_refuses_what_it_would_read_wrongly():
    lerps.refuses(launch.lerp_, "cpu")


def test_a_step_in_bf16_that_is_not_written_back_warns(monkeypatch):
    monkeypatch.setattr(dispatch, "IMPL", "triton")
    linear._warn_stale.cache_clear()
    layer = SubnetLinear.from_linear(
        torch.nn.Linear(16, 16, dtype=torch.bfloat16), subnet_dtype=torch.bfloat16
    )
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    layer(x).sum().backward()
    AdamW([layer.subnet]).step()
    with pytest.warns(UserWarning, match="not written into its dense weight"):
        layer(x)
