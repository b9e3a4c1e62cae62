"""The host side of the CUDA kernels: where a build runs, and what is refused before a launch."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext

import lerps
import pytest
import torch
from adamw_steps import CONSTANTS, compare
from cuda_on_cpu import Kernels, cuda_ops_on_cpu, load

from losia_pro import ops, reference, torch_ops


@pytest.fixture
def cuda_ops(monkeypatch):
    yield from cuda_ops_on_cpu(monkeypatch)


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


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("before", [0, 1])
def test_a_launch_leaves_the_current_device_as_it_was(monkeypatch, before, broken):
    """The module's own runtime makes the kernel's device the thread's current one, in PyTorch's eyes too."""
    module, current, launched = Kernels(), [before], []
    wrapper = load(monkeypatch, module)
    sys.modules.pop("losia_pro._cuda_ops")

    def kernel(*arguments):
        current[0] = arguments[-2]
        launched.append(arguments)
        if broken:
            raise RuntimeError("invalid configuration argument")

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.index, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.index

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False
    )
    with pytest.raises(RuntimeError, match="argument") if broken else nullcontext():
        wrapper._launch(kernel, torch.device("cuda:1"), 5, 6)
    assert launched == [(5, 6, 1, 71)] and current == [before]


VIEWS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "every other": lambda t: torch.stack([t, t], 2)[:, :, 0],
    "odd rows": lambda t: torch.cat([t, t[:, :1]], 1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_gather_columns_moves_runs_16_bytes_at_a_time_where_they_are_aligned(
    cuda_ops, group, dtype, view
):
    x = view(torch.randn(5, 64).to(dtype))
    idx = (torch.tensor([0, 2, 3])[:, None] * group + torch.arange(group)).flatten()
    assert torch.equal(cuda_ops.gather_columns(x, idx, group), x[:, idx])
    wide = group * dtype.itemsize % 16 == 0 and x.stride(1) == 1 and x.stride(0) == 64
    assert cuda_ops.kernels.units == [16 if wide else dtype.itemsize]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("group", [1, 4, 24])
def test_subnet_grad_is_the_product_of_what_was_gathered(cuda_ops, group, dtype):
    dy, x_sub = torch.randn(9, 24).to(dtype), torch.randn(9, 5).to(dtype)
    idx = torch.arange(24) if group == 24 else torch.tensor([4, 5, 6, 7, 16, 17, 18, 19])
    ours = cuda_ops.subnet_grad(dy, x_sub, idx, torch.float32, group)
    assert torch.equal(ours, torch_ops.product(dy[:, idx], x_sub, torch.float32))
    assert len(cuda_ops.kernels.units) == (group != 24)


def test_none_chosen_of_one_is_none_and_not_all(cuda_ops):
    none = torch.empty(0, dtype=torch.int64)
    ours = cuda_ops.subnet_grad(torch.ones(9, 1), torch.ones(9, 5), none, torch.float32)
    assert ours.shape == (0, 5)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", reference.VARIANTS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_importance_is_updated_some_rows_at_a_time(
    cuda_ops, micro_batches, variant, kept, monkeypatch
):
    monkeypatch.setattr(cuda_ops, "_CHUNK", 400 * 20)
    dy, x = torch.randn(7, 900).bfloat16(), torch.randn(7, 20).bfloat16()
    weight = torch.randn(20, 900).bfloat16().T
    grad = torch.randn(900, 20) if micro_batches > 1 else None
    ours = [torch.rand(900, 20).to(kept) for _ in range(2)]
    truth = [t.clone() for t in ours]
    for function, to in ((cuda_ops, ours), (torch_ops, truth)):
        function.importance_update_(*to, weight, dy, x, grad, 0.8, 0.9, variant, 0.5)
    assert cuda_ops.kernels.rows == [384, 384, 132]
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_no_product_is_of_few_rows_however_wide_they_are(cuda_ops, monkeypatch):
    monkeypatch.setattr(cuda_ops, "_CHUNK", 20)
    kept = torch.zeros(2, 300, 20)
    dy, x, weight = torch.randn(7, 300), torch.randn(7, 20), torch.randn(300, 20)
    cuda_ops.importance_update_(*kept, weight, dy, x, None, 0.8, 0.9, "first")
    assert cuda_ops.kernels.rows == [256, 44]


def test_what_a_step_weighs_is_rounded_once(cuda_ops):
    """1 - fp32(0.85) is 2.0e-7 of it away from fp32(1 - 0.85)."""
    one = torch.ones(1, 1)
    smoothed, uncertain = torch.zeros(1, 1), torch.zeros(1, 1)
    cuda_ops.importance_update_(smoothed, uncertain, one, one, one, None, 0.85, 0.5, "first")
    assert smoothed.item() == torch.tensor(1 - 0.85)
    cuda_ops.importance_update_(
        smoothed.zero_(), uncertain.zero_(), one, one, one, None, 0.5, 0.85, "first"
    )
    assert uncertain.item() == torch.tensor(1 - 0.85) / 2


@pytest.mark.parametrize("key", [None, 2**62 + 5], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_write_back_writes_every_layer_and_nothing_else(cuda_ops, dtype, key):
    weights = [torch.randn(s).to(dtype) for s in ((9, 40), (1, 1), (30, 7))]
    weights[2] = weights[2].T
    rows, columns = (
        [torch.randperm(w.shape[k])[: -(-w.shape[k] // 2)].sort().values for w in weights]
        for k in (0, 1)
    )
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    checked = []
    subnets = [torch.empty(len(r), len(c), dtype=exact) for r, c in zip(rows, columns, strict=True)]
    for _ in range(2):  # with new tables, and with kept ones
        for s in subnets:
            s.normal_()
        expected = [w.clone() for w in weights]
        torch_ops.write_back_(expected, subnets, rows, columns, lambda: None, key)
        cuda_ops.write_back_(weights, subnets, rows, columns, lambda: checked.append(1), key)
        assert all(map(torch.equal, weights, expected))
    assert checked == [1]


def test_weights_on_a_gpu_and_on_the_cpu_are_written_by_what_answers_on_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "function", lambda _, like, impl: lambda *_: asked.append(like.device))
    away, here = torch.zeros(3, 4, device="meta"), torch.zeros(3, 4)
    for weights in ([away, here], [here, away], [away, away]):
        ops._write_back_(weights, weights, [], [])
    assert [device.type for device in asked] == ["cpu", "cpu", "meta"]


@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_is_pytorchs_step_with_the_same_random_bits(cuda_ops, maximize):
    compare(cuda_ops.adamw_, [(9, 40), (1, 1), (30, 7), (64,), (0, 4)], "cpu", maximize)


def test_adamw_refuses_strides_by_name(cuda_ops):
    t = torch.zeros(4, 6).bfloat16()
    with pytest.raises(ValueError, match="exp_avg must be contiguous"):
        cuda_ops.adamw_([t], [t], [t.T], [t], [1], [1], maximize=False, **CONSTANTS)


def test_lerp_has_the_bits_of_pytorch(cuda_ops):
    lerps.compare(cuda_ops.lerp_, "cpu")


@pytest.mark.parametrize("other", lerps.OTHERS)
def test_the_fp32_lerp_is_told_its_tensors_and_dtypes(cuda_ops, other):
    lerps.compare_fp32(cuda_ops.lerp_, "cpu", other)


def test_lerp_refuses_what_it_would_read_wrongly(cuda_ops):
    lerps.refuses(cuda_ops.lerp_, "cpu")


def test_nothing_to_sum_gives_zeros_and_no_launch(cuda_ops):
    assert not cuda_ops.subnet_grad(
        torch.empty(0, 4), torch.empty(0, 3), torch.tensor([1, 2]), torch.float32
    ).any()
    assert cuda_ops.gather_columns(torch.empty(0, 4), torch.tensor([1])).shape == (0, 1)
    assert not cuda_ops.kernels.units


def test_dtypes_that_it_cannot_compute_are_refused_by_name(cuda_ops):
    dy, x_sub, idx = torch.randn(4, 5), torch.randn(4, 2), torch.tensor([1])
    for args, message in [
        ((dy.double(), x_sub.double(), idx, torch.float32), "dy torch.float64; use impl='torch'"),
        ((dy, x_sub, idx, torch.float64), "out_dtype torch.float64"),
        ((dy, x_sub.half(), idx, torch.float32), "must be of one dtype"),
    ]:
        with pytest.raises(TypeError, match=message):
            cuda_ops.subnet_grad(*args)
    assert not cuda_ops.kernels.units


def test_a_module_that_does_not_load_says_so(cuda_ops, monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: cudaFoo")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match=r"_cuda does not load: undefined symbol: cudaFoo"):
        importlib.reload(cuda_ops)
