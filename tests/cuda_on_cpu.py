"""losia_pro._cuda_ops over kernels in PyTorch, so that its host side runs on a CPU."""

from __future__ import annotations

import ctypes
import importlib
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from losia_pro import reference, rounding


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


def load(monkeypatch: pytest.MonkeyPatch, module: Kernels) -> types.ModuleType:
    """losia_pro._cuda_ops, loaded anew with ``module`` as the compiled one."""
    monkeypatch.setitem(sys.modules, "losia_pro._cuda", module)
    monkeypatch.delitem(sys.modules, "losia_pro._cuda_ops", raising=False)
    return importlib.import_module("losia_pro._cuda_ops")


def cuda_ops_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """losia_pro._cuda_ops over those kernels, with CPU tensors let through."""
    torch.manual_seed(0)
    module = Kernels()
    wrapper = load(monkeypatch, module)
    monkeypatch.setattr(wrapper, "_launch", lambda kernel, device, *rest: kernel(*rest, 0, 7))
    wrapper.kernels = module
    yield wrapper
    sys.modules.pop("losia_pro._cuda_ops", None)
