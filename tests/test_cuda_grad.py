"""The subnet's gradient by the CUDA kernels: which of two ways, and what each is told."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from cuda_on_cpu import Kernels, cuda_ops_on_cpu, load

from losia_pro import torch_ops


@pytest.fixture
def cuda_ops(monkeypatch):
    yield from cuda_ops_on_cpu(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("group", [1, 4, 24])
def test_subnet_grad_is_the_product_of_what_was_gathered(cuda_ops, group, dtype):
    dy, x_sub = torch.randn(9, 24).to(dtype), torch.randn(9, 5).to(dtype)
    idx = torch.arange(24) if group == 24 else torch.tensor([4, 5, 6, 7, 16, 17, 18, 19])
    ours = cuda_ops.subnet_grad(dy, x_sub, idx, torch.float32, group)
    assert torch.equal(ours, torch_ops.product(dy[:, idx], x_sub, torch.float32))
    assert len(cuda_ops.kernels.units) == (group != 24)


def runs_of(group, n_out, tokens=2100, n_in=136, dtype=torch.bfloat16):
    """Operands of ``n_out`` columns in runs of ``group``, every other one, in rows with something between them."""
    dy = torch.randn(tokens, 2 * n_out + 8).to(dtype)[:, : 2 * n_out]
    idx = (torch.arange(n_out // group)[:, None] * 2 * group + torch.arange(group)).flatten()
    return dy, torch.randn(tokens, n_in + -n_in % 8 + 8).to(dtype)[:, :n_in], idx


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [8, 16, 24])
def test_long_runs_of_many_tokens_are_gathered_by_the_product(cuda_ops, group, dtype, out_dtype):
    dy, x_sub, idx = runs_of(group, 144, dtype=dtype)
    strided_idx = torch.stack([idx, idx], 1)[:, 0]
    ours = cuda_ops.subnet_grad(dy, x_sub, strided_idx, out_dtype, group)
    truth = torch_ops.product(dy[:, idx], x_sub, torch.float32).to(out_dtype)
    torch.testing.assert_close(ours, truth, rtol=2**-7, atol=1e-3)
    assert cuda_ops.kernels.splits == [7] and not cuda_ops.kernels.units


def test_one_split_needs_no_room_for_parts(cuda_ops, monkeypatch):
    monkeypatch.setattr(cuda_ops, "_processors", lambda device: 1)
    dy, x_sub, idx = runs_of(16, 144)
    ours = cuda_ops.subnet_grad(dy, x_sub, idx, torch.float32, 16)
    torch.testing.assert_close(ours, dy[:, idx].float().T @ x_sub.float(), rtol=1e-5, atol=1e-3)
    assert cuda_ops.kernels.splits == [1]


@pytest.mark.parametrize(
    "why",
    ["few tokens", "short runs", "few outputs", "many inputs", "odd inputs", "fp32", "no inputs",
     "dy's rows", "x_sub's rows", "x_sub's columns", "where dy begins", "old device"],
)  # fmt: skip
def test_other_gradients_are_the_librarys_product_of_what_was_gathered(cuda_ops, why, monkeypatch):
    group = 4 if why == "short runs" else 8
    n_in = {"many inputs": 1032, "odd inputs": 132, "no inputs": 0}.get(why, 136)
    dy, x_sub, idx = runs_of(group, 120 if why == "few outputs" else 144, n_in=n_in)
    if why == "few tokens":
        dy, x_sub = dy[:2048], x_sub[:2048]
    elif why == "fp32":
        dy, x_sub = dy.float(), x_sub.float()
    elif why == "dy's rows":
        dy = torch.cat([dy, dy[:, :4]], 1)[:, : dy.shape[1]]
    elif why == "x_sub's rows":
        x_sub = torch.cat([x_sub, x_sub[:, :4]], 1)[:, :n_in]
    elif why == "x_sub's columns":
        x_sub = torch.stack([x_sub, x_sub], 2)[:, :, 0]
    elif why == "where dy begins":
        dy = torch.cat([dy[:, :8], dy], 1)[:, 4 : 4 + dy.shape[1]]
    elif why == "old device":
        monkeypatch.setattr(cuda_ops, "_processors", lambda device: 0)
    ours = cuda_ops.subnet_grad(dy, x_sub, idx, torch.float32, group)
    assert torch.equal(ours, torch_ops.product(dy[:, idx], x_sub, torch.float32))
    assert not cuda_ops.kernels.splits


@pytest.mark.parametrize(
    ("built", "capability", "processors"),
    [
        ("75-real,80-real,90", (9, 0), 132),
        ("75-real,80-real,90", (7, 5), 0),
        ("75", (9, 0), 0),  # runs, by code for an older device
        ("75,80-real", (8, 6), 132),
        ("75,80-real", (9, 0), 0),
    ],
)
def test_the_product_that_gathers_runs_where_its_instructions_were_built(
    monkeypatch, built, capability, processors
):
    module = Kernels()
    module.ARCHS = built
    wrapper = load(monkeypatch, module)
    sys.modules.pop("losia_pro._cuda_ops")
    properties = types.SimpleNamespace(
        major=capability[0], minor=capability[1], multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert wrapper._processors(torch.device("cuda:0")) == processors
