"""The host side of the CUDA kernels: where a build runs, and what is refused before a launch."""

from __future__ import annotations

import ctypes
import importlib
import sys
import types

import lerps
import pytest
import torch
from adamw_steps import CONSTANTS, compare

from losia_pro import reference, rounding, torch_ops


def memory(address: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The tensor at an address."""
    buffer = (ctypes.c_char * max(1, numel * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype, count=numel)


class Kernels(types.ModuleType):
    """What csrc/ computes, on the CPU and from the same arguments: addresses, sizes, strides."""

    ARCHS = "75-real,80-real,86-real,90-real,120"
    PART = 32
    ADAMW_PART = 64
    LERP_PART = 48
    DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

    def __init__(self) -> None:
        super().__init__("losia_pro._cuda")
        self.units: list[int] = []
        self.rows: list[int] = []

    def gather_columns(
        self, x, in_idx, out, tokens, n_in, stride_t, stride_c, unit, step, device, stream
    ):
        assert (device, stream) == (0, 7) and n_in % step == 0
        self.units.append(unit)
        idx, units = memory(in_idx, n_in, torch.int64).tolist(), n_in // step
        for t in range(tokens):
            for j in range(units):
                source = x + idx[j * step] * stride_c + t * stride_t
                target = out + (t * units + j) * unit
                assert source % unit == target % unit == 0
                ctypes.memmove(target, source, unit)

    def importance_update(
        self, importance, uncertainty, weight, product, grad, rows, columns, stride_r, stride_c,
        beta1, rest1, beta2, rest2, scale, variant, weight_dtype, kept_dtype, device, stream,
    ):  # fmt: skip
        assert (device, stream) == (0, 7)
        beta1, rest1, beta2, rest2, scale = torch.tensor([beta1, rest1, beta2, rest2, scale])
        self.rows.append(rows)
        span = (rows - 1) * stride_r + (columns - 1) * stride_c + 1
        w = memory(weight, span, self.DTYPES[weight_dtype])
        w = w.as_strided((rows, columns), (stride_r, stride_c)).float()
        g, i, u = (
            memory(p, rows * columns, d).view(rows, columns)
            for p, d in (
                (product, torch.float32),
                (importance, self.DTYPES[kept_dtype]),
                (uncertainty, self.DTYPES[kept_dtype]),
            )
        )
        g = g + memory(grad, rows * columns, torch.float32).view(rows, columns) if grad else g
        now = reference.importance(g * scale, w, reference.VARIANTS[variant])
        smoothed = beta1 * i.float() + rest1 * now
        i.copy_(smoothed)
        u.copy_(beta2 * u.float() + rest2 * (now - smoothed).abs())

    def write_back(
        self, layers, parts, n_parts, log2_columns, weight_dtype, subnet_dtype, key, device, stream
    ):
        assert (device, stream) == (0, 7)
        width = 2**log2_columns
        height = self.PART // width
        for layer, part in memory(parts, 2 * n_parts, torch.int32).view(-1, 2).tolist():
            row = memory(layers + 72 * layer, 9, torch.int64).tolist()
            weight, subnet, out_idx, in_idx, n_out, n_in, stride_r, stride_c, n = row
            rows, columns = (
                memory(p, n, torch.int64).tolist() for p, n in ((out_idx, n_out), (in_idx, n_in))
            )
            values = memory(subnet, n_out * n_in, self.DTYPES[subnet_dtype]).view(n_out, n_in)
            dtype = self.DTYPES[weight_dtype]
            if key and (dtype, values.dtype) == (torch.bfloat16, torch.float32):
                random = rounding.noise(rounding.numbers_of(values, n), key)
                values = rounding.to_bf16(values, random)
            across = -(-n_in // width)
            i0, j0 = part // across * height, part % across * width
            for i in range(i0, min(i0 + height, n_out)):
                for j in range(j0, min(j0 + width, n_in)):
                    at = weight + (rows[i] * stride_r + columns[j] * stride_c) * dtype.itemsize
                    memory(at, 1, dtype).copy_(values[i, j])

    def adamw(
        self, tensors, factors, parts, n_parts, keep, rest1, beta2, rest2, eps, sign, device, stream
    ):
        assert (device, stream) == (0, 7)
        for which, block in memory(parts, 2 * n_parts, torch.int32).view(-1, 2).tolist():
            *addresses, numel, key = memory(tensors + 48 * which, 6, torch.int64).tolist()
            lr, scale = memory(factors + 8 * which, 2, torch.float32)
            part = slice(block * self.ADAMW_PART, (block + 1) * self.ADAMW_PART)
            short = [memory(a, numel, torch.bfloat16)[part] for a in addresses]
            p, g, m, v = (t.float() for t in short)
            g = g * sign
            m = m + rest1 * (g - m)
            v = v * beta2 + rest2 * g * g
            p = p * keep - lr * (m / (v.sqrt() * scale + eps))
            random = rounding.noise(rounding.numbers_of(p, part.start), key)
            short[0].copy_(rounding.to_bf16(p, random))
            short[2].copy_(rounding.to_bf16(m, random >> 16))
            short[3].copy_(rounding.to_bf16(v, rounding.mix(random)))

    def lerp(self, tensors, weight, parts, n_parts, dtype, other_dtype, device, stream):
        assert (device, stream) == (0, 7)
        (w,) = memory(weight, 1, torch.float32)
        for which, block in memory(parts, 2 * n_parts, torch.int32).view(-1, 2).tolist():
            row = memory(tensors + 40 * which, 5, torch.int64).tolist()
            *addresses, numel, before, key = row
            part = slice(block * self.LERP_PART, (block + 1) * self.LERP_PART)
            dtypes = self.DTYPES[dtype], self.DTYPES[other_dtype]
            t, other = (memory(a, numel, d)[part] for a, d in zip(addresses, dtypes, strict=True))
            start, c = (t, w) if w < 0.5 else (other, w - 1)
            value = start.float() + (other.float() - t.float()) * c
            random = rounding.noise(rounding.numbers_of(value, before + part.start), key)
            t.copy_(rounding.to_bf16(value, random) if t.dtype == torch.bfloat16 else value)


@pytest.fixture
def cuda_ops(monkeypatch):
    """losia_pro._cuda_ops over those kernels, with CPU tensors let through."""
    torch.manual_seed(0)
    module = Kernels()
    monkeypatch.setitem(sys.modules, "losia_pro._cuda", module)
    monkeypatch.delitem(sys.modules, "losia_pro._cuda_ops", raising=False)
    wrapper = importlib.import_module("losia_pro._cuda_ops")
    monkeypatch.setattr(wrapper, "_where", lambda device: (0, 7))
    wrapper.kernels = module
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


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", reference.VARIANTS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_importance_is_updated_some_rows_at_a_time(
    cuda_ops, micro_batches, variant, kept, monkeypatch
):
    monkeypatch.setattr(cuda_ops, "_CHUNK", 128 * 20)
    dy, x = torch.randn(7, 300).bfloat16(), torch.randn(7, 20).bfloat16()
    weight = torch.randn(20, 300).bfloat16().T
    grad = torch.randn(300, 20) if micro_batches > 1 else None
    ours = [torch.rand(300, 20).to(kept) for _ in range(2)]
    truth = [t.clone() for t in ours]
    for function, to in ((cuda_ops, ours), (torch_ops, truth)):
        function.importance_update_(*to, weight, dy, x, grad, 0.8, 0.9, variant, 0.5)
    assert cuda_ops.kernels.rows == [128, 128, 44]
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


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
def test_lerp_in_fp32_rounds_product_and_sum_one_by_one(cuda_ops, other):
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
