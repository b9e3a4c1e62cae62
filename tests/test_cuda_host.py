"""The host side of the CUDA kernels: where a build runs, and what is refused before a launch."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch


@pytest.fixture
def cuda_ops(monkeypatch):
    """losia_pro._cuda_ops over a module that records calls, with CPU tensors let through."""
    calls: list[tuple[str, tuple]] = []
    module = types.ModuleType("losia_pro._cuda")
    module.ARCHS, module.SUBNET_GRAD_TILE = "75-real,80-real,86-real,90-real,120", 64
    module.gather_columns = lambda *a: calls.append(("gather_columns", a))
    module.subnet_grad = lambda *a: calls.append(("subnet_grad", a))
    monkeypatch.setitem(sys.modules, "losia_pro._cuda", module)
    monkeypatch.delitem(sys.modules, "losia_pro._cuda_ops", raising=False)
    wrapper = importlib.import_module("losia_pro._cuda_ops")
    monkeypatch.setattr(wrapper, "_where", lambda device: (0, 7))
    monkeypatch.setattr(wrapper, "_processors", lambda device: 132)
    wrapper.calls = calls
    yield wrapper
    sys.modules.pop("losia_pro._cuda_ops", None)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80-real", 80, True),
        ("80-real", 86, True),  # machine code runs on later minor versions
        ("86-real", 80, False),
        ("80-real", 90, False),
        ("80", 90, True),  # PTX runs on everything later
        ("80-virtual", 80, True),
        ("90", 89, False),
        ("75-real,120", 75, True),
        ("75-real,120", 90, False),
    ],
)
def test_a_build_runs_where_its_machine_code_or_ptx_does(cuda_ops, built, capability, runs):
    assert cuda_ops.runs_on(built, capability) is runs


def test_a_device_it_was_not_built_for_is_named(cuda_ops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert "compute capability 7.0" in cuda_ops.why_not(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 1))
    assert cuda_ops.why_not(torch.device("cuda:0")) == ""
    assert "not on cpu" in cuda_ops.why_not(torch.device("cpu"))


def test_gather_columns_passes_sizes_strides_and_width(cuda_ops):
    x, idx = torch.randn(6, 10).half().T, torch.tensor([0, 5])
    out = cuda_ops.gather_columns(x, idx)
    ((_, args),) = cuda_ops.calls
    assert args == (x.data_ptr(), idx.data_ptr(), out.data_ptr(), 10, 2, 1, 10, 2, 0, 7)


@pytest.mark.parametrize(("tokens", "splits"), [(100, 1), (8192, 8), (2**20, 8)])
def test_subnet_grad_splits_long_inputs_into_parts_of_their_own(cuda_ops, tokens, splits):
    dy, x_sub, idx = (
        torch.empty(tokens, 1),
        torch.empty(1, 512).expand(tokens, 512),
        torch.arange(512),
    )
    cuda_ops.subnet_grad(dy, x_sub, idx, torch.bfloat16)
    ((_, args),) = cuda_ops.calls
    assert bool(args[4]) == (splits > 1)
    assert args[5:] == (tokens, 512, 512, 1, 1, 0, 1, splits, 0, 1, 0, 7)


def test_nothing_to_sum_gives_zeros_and_no_launch(cuda_ops):
    assert not cuda_ops.subnet_grad(
        torch.empty(0, 4), torch.empty(0, 3), torch.tensor([1, 2]), torch.float32
    ).any()
    assert cuda_ops.gather_columns(torch.empty(0, 4), torch.tensor([1])).shape == (0, 1)
    assert not cuda_ops.calls


def test_dtypes_that_it_cannot_compute_are_refused_by_name(cuda_ops):
    dy, x_sub, idx = torch.randn(4, 5), torch.randn(4, 2), torch.tensor([1])
    for args, message in [
        ((dy.double(), x_sub.double(), idx, torch.float32), "dy torch.float64; use impl='torch'"),
        ((dy, x_sub, idx, torch.float64), "out_dtype torch.float64"),
        ((dy, x_sub.half(), idx, torch.float32), "must be of one dtype"),
    ]:
        with pytest.raises(TypeError, match=message):
            cuda_ops.subnet_grad(*args)
    assert not cuda_ops.calls


def test_a_module_that_does_not_load_says_so(cuda_ops, monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: cudaFoo")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match=r"_cuda does not load: undefined symbol: cudaFoo"):
        importlib.reload(cuda_ops)
