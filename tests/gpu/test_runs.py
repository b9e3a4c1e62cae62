"""Aligned runs of neurons and whole sides on a CUDA device, for every implementation."""

from __future__ import annotations

import pytest
import torch
from ops_tools import DEVICE, DTYPES, as_exact_as_pytorch, choose_runs, gather, grad, randn, usable


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [2, 8, 16, 24])
@pytest.mark.parametrize("tokens, runs, n_in", [(8192, 64, 512), (1000, 9, 203), (1, 1, 1)])
def test_aligned_runs_give_what_single_neurons_give(impl, dtype, group, tokens, runs, n_in):
    usable("subnet_grad", impl)
    dy, idx = randn(tokens, group * (3 * runs + 1), dtype=dtype), choose_runs(3 * runs, runs, group)
    x_sub = randn(tokens, n_in, dtype=dtype)
    assert torch.equal(gather(dy, idx, impl, group), dy[:, idx])
    as_exact_as_pytorch(grad(dy, x_sub, idx, impl, group=group), dy, x_sub, idx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, out, n_in", [(8192, 4096, 64), (1000, 777, 172), (1, 1, 1)])
def test_a_whole_side_needs_no_indices(impl, dtype, tokens, out, n_in):
    usable("subnet_grad", impl)
    dy, x_sub = randn(tokens, out, dtype=dtype), randn(tokens, n_in, dtype=dtype)
    every = torch.arange(out, device=DEVICE)
    as_exact_as_pytorch(grad(dy, x_sub, every, impl, group=out), dy, x_sub, every)
