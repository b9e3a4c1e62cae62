"""Aligned runs of neurons and whole sides on a CUDA device, for every implementation."""

from __future__ import annotations

import pytest
import torch
from ops_tools import DEVICE, DTYPES, as_exact_as_pytorch, choose_runs, gather, grad, randn, usable

from losia_pro.gathering import gathering_pays


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [2, 8, 16, 24])
@pytest.mark.parametrize("tokens, runs, n_in", [(8192, 64, 512), (1000, 9, 203), (1, 1, 1)])
def test_aligned_runs_give_what_single_neurons_give(impl, dtype, group, tokens, runs, n_in):
    usable("subnet_grad", impl)
    dy, idx = randn(tokens, group * (3 * runs + 1), dtype=dtype), choose_runs(3 * runs, runs, group)
    x_sub = randn(tokens, n_in, dtype=dtype)
    assert torch.equal(gather(dy, idx, impl, group), dy[:, idx])
    as_exact_as_pytorch(grad(dy, x_sub, idx, impl, group=group), dy, x_sub, idx)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, group, runs, n_in",
    [
        (1, 8, 16, 8),
        (31, 16, 9, 136),
        (333, 8, 17, 200),  # edges on all sides
        (1000, 8, 16, 1024),
        (4097, 16, 86, 512),  # several splits, and one token more
        (9000, 24, 6, 1000),
        (32768, 16, 8, 264),
    ],
)
def test_runs_are_read_alone_whatever_lies_between_them(
    impl, tokens, group, runs, n_in, dtype, out_dtype, monkeypatch
):
    """Between rows too: what is not chosen is NaN. Triton's product gathers runs itself where that pays."""
    usable("subnet_grad", impl)
    if impl == "triton" and gathering_pays(group * runs, n_in):
        monkeypatch.setattr("losia_pro.kernels.subnet_grad.gather_columns", None)
    out, idx = group * 3 * runs, choose_runs(3 * runs, runs, group)
    dy = torch.full((tokens, out + 8), torch.nan, dtype=dtype, device=DEVICE)[:, :out]
    dy[:, idx] = randn(tokens, len(idx), dtype=dtype)
    x_sub = torch.full((tokens, n_in + 8), torch.nan, dtype=dtype, device=DEVICE)[:, :n_in]
    x_sub.copy_(randn(tokens, n_in, dtype=dtype))
    ours = grad(dy, x_sub, idx, impl, out_dtype, group)
    assert ours.dtype == out_dtype and torch.equal(
        grad(dy, x_sub, idx, impl, out_dtype, group), ours
    )
    as_exact_as_pytorch(ours, dy, x_sub, idx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, out, n_in", [(8192, 4096, 64), (1000, 777, 172), (1, 1, 1)])
def test_a_whole_side_needs_no_indices(impl, dtype, tokens, out, n_in):
    usable("subnet_grad", impl)
    dy, x_sub = randn(tokens, out, dtype=dtype), randn(tokens, n_in, dtype=dtype)
    every = torch.arange(out, device=DEVICE)
    as_exact_as_pytorch(grad(dy, x_sub, every, impl, group=out), dy, x_sub, every)
