"""The Triton kernels compile for every GPU generation they claim, and fit its shared memory. No GPU needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from losia_pro.kernels.gather_columns import BLOCK_C, BLOCK_T, gather_columns_kernel  # noqa: E402
from losia_pro.kernels.subnet_grad import (  # noqa: E402
    _tiles,
    subnet_grad_kernel,
    sum_splits_kernel,
)

KIB = 1024
# compute capability: shared memory that one block may have
ARCHS = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
SMALLEST = 99 * KIB  # of sm_86 and sm_89, which are compiled for as sm_80
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compile_for(
    arch: int, kernel: Any, types: dict[str, str], values: dict[str, Any], **options: int
):
    """Compile as the launcher does for tensors aligned to 16 bytes and sizes divisible by 16."""
    names = kernel.arg_names
    assert set(names) == {*types, *values}
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): v for n, v in values.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in types},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("int64", [False, True])
def test_gather_columns_compiles(arch, int64):
    types = {"x_ptr": "*bf16", "idx_ptr": "*i64", "out_ptr": "*bf16", "stride_t": "i32"}
    types |= {"T": "i32", "n_in": "i32"}
    values = {"stride_c": 1, "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C, "INT64": int64}
    binary = compile_for(arch, gather_columns_kernel, types, values, num_warps=4)
    assert f".target sm_{arch}" in binary.asm["ptx"] and binary.asm["cubin"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("fused", [False, True], ids=["gathered", "fused"])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_subnet_grad_compiles_and_fits(arch, fused, dtype):
    name, tiles = NAMES[dtype], _tiles(dtype)
    types = {"dy_ptr": f"*{name}", "x_ptr": f"*{name}", "idx_ptr": "*i64", "out_ptr": "*fp32"}
    types |= dict.fromkeys(("T", "M", "N", "T_SPLIT", "stride_dt", "stride_xt"), "i32")
    values = {"stride_dc": 1, "stride_xc": 1, "GATHER": fused, "INT64": False, "UPCAST": False}
    values |= {"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k}
    binary = compile_for(
        arch, subnet_grad_kernel, types, values, num_warps=tiles.warps, num_stages=tiles.stages
    )
    assert binary.metadata.shared <= min(ARCHS[arch], SMALLEST if arch == 80 else ARCHS[arch])
    if dtype == torch.float32:
        assert "tf32" not in binary.asm["ptx"]
    elif arch == 90:
        assert "wgmma" in binary.asm["ptx"]


@pytest.mark.parametrize("arch", ARCHS)
def test_sum_splits_compiles(arch):
    types = {"parts_ptr": "*fp32", "out_ptr": "*bf16", "numel": "i32", "SPLIT": "i32"}
    assert compile_for(arch, sum_splits_kernel, types, {"BLOCK": 1024}, num_warps=4).asm["cubin"]
