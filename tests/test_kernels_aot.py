"""The Triton kernels compile for every GPU generation they claim, and fit its shared memory. No GPU needed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from losia_pro.kernels import adamw, lerp  # noqa: E402
from losia_pro.kernels import gather_columns as gather  # noqa: E402
from losia_pro.kernels import importance_update as importance  # noqa: E402
from losia_pro.kernels import subnet_grad as grad  # noqa: E402
from losia_pro.kernels.tiles import Device, Tiles  # noqa: E402
from losia_pro.kernels.write_back import PART, write_back_kernel  # noqa: E402

KIB = 1024
ARCHS = {
    80: Device(108, 163 * KIB, False),
    90: Device(132, 227 * KIB, True),
    100: Device(148, 227 * KIB, True),
    120: Device(170, 99 * KIB, False),
}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # fp16 differs from bf16 in one letter


def compile_for(
    arch: int, kernel: Any, types: dict[str, str], values: dict[str, Any], **options: int
):
    """Compile as the launcher does for tensors aligned to 16 bytes and sizes divisible by 16."""
    names = kernel.arg_names
    assert set(names) == {*types, *values}
    whole = {n for n, t in types.items() if t.startswith(("*", "i"))}
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): v for n, v in values.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in whole},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check(binary: Any, arch: int, dtype: torch.dtype) -> None:
    """It fits, computes fp32 in IEEE precision, and uses Hopper's matrix units."""
    assert binary.metadata.shared <= ARCHS[arch].memory
    if dtype == torch.float32:
        assert "tf32" not in binary.asm["ptx"]
    elif not ARCHS[arch].bulk:  # pipelined, 16 bytes at a time
        assert "cp.async.cg.shared.global" in binary.asm["ptx"]
    elif arch == 90:
        assert "wgmma" in binary.asm["ptx"] and "cp.async.bulk" in binary.asm["ptx"]


def sums_from_zero(binary: Any) -> bool:
    """Whether the sums of BLOCK_K terms do; the interpreter cannot tell, for it sums so anyway."""
    return bool(re.search(r"tt\.dot %\w+, %\w+, %cst", binary.asm["ttir"]))


def tile_type(dtype: str, tokens: int, columns: int, arch: int) -> str:
    """The type of an operand as load_tile takes it."""
    return f"tensordesc<{dtype}[{tokens}, {columns}]>" if ARCHS[arch].bulk else f"*{dtype}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("group", [1, 8, 16])
@pytest.mark.parametrize("int64", [False, True])
def test_gather_columns_compiles_and_moves_runs_at_once(arch, group, int64):
    types = {"x_ptr": "*bf16", "idx_ptr": "*i64", "out_ptr": "*bf16", "stride_t": "i32"}
    types |= {"T": "i32", "n_runs": "i32"}
    block_t, block_c, warps = gather._tile(group, 512)
    values = {"stride_c": 1, "GROUP": group, "BLOCK_T": block_t, "BLOCK_C": block_c}
    values |= {"INT64": int64}
    binary = compile_for(arch, gather.gather_columns_kernel, types, values, num_warps=warps)
    assert f".target sm_{arch}" in binary.asm["ptx"] and binary.asm["cubin"]
    loads = [line for line in binary.asm["ptx"].splitlines() if "ld.global" in line]
    widest = "v4.b32" if group > 1 else "b16"  # of x: 16 bytes of a run, or a single neuron
    assert any(widest in line for line in loads), loads


def compile_subnet_grad(arch: int, group: int, dtype: torch.dtype, tiles: Tiles) -> Any:
    name = NAMES[dtype]
    types = {"dy_ptr": f"*{name}", "idx_ptr": "*i64", "out_ptr": "*fp32"}
    types |= dict.fromkeys(("T", "M", "N", "T_SPLIT", "stride_dt", "stride_xt"), "i32")
    types["x"] = tile_type(name, tiles.k, tiles.n, arch)
    values = {"stride_dc": 1, "stride_xc": 1, "GROUP": group, "INT64": False, "UPCAST": False}
    values["BULK"] = ARCHS[arch].bulk
    values |= {"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return compile_for(arch, grad.subnet_grad_kernel, types, values, **options)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("group", [1, 8], ids=["single", "runs"])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_subnet_grad_compiles_and_fits(arch, group, dtype):
    for n_in in (64, 512):
        binary = compile_subnet_grad(arch, group, dtype, grad._tiles(dtype, n_in, ARCHS[arch]))
        check(binary, arch, dtype)
        assert sums_from_zero(binary) == (dtype == torch.float32)
        if group > 1 and dtype != torch.float32:  # the gather is pipelined, 16 bytes at a time
            assert "cp.async.cg.shared.global" in binary.asm["ptx"]


@pytest.mark.parametrize("arch", ARCHS)
def test_sum_splits_compiles(arch):
    types = {"parts_ptr": "*fp32", "out_ptr": "*bf16", "numel": "i32", "SPLIT": "i32"}
    values = {"BLOCK": 1024}
    assert compile_for(arch, grad.sum_splits_kernel, types, values, num_warps=4).asm["cubin"]


def compile_importance(arch: int, has_grad: bool, dtype: torch.dtype, tiles: Tiles) -> Any:
    name = NAMES[dtype]
    kept = "bf16" if dtype == torch.bfloat16 else "fp32"
    types = {"importance_ptr": f"*{kept}", "uncertainty_ptr": f"*{kept}", "grad_ptr": "*fp32"}
    types |= {"weight_ptr": f"*{name}"} | dict.fromkeys(("T", "M", "N"), "i32")
    types |= dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "scale"), "fp32")
    types |= dict.fromkeys(("stride_dt", "stride_xt", "stride_wm"), "i32")
    types["dy"] = tile_type(name, tiles.k, tiles.m, arch)
    types["x"] = tile_type(name, tiles.k, tiles.n, arch)
    values = {"VARIANT": 0, "HAS_GRAD": has_grad, "PROGRAMS": 132, "INT64": False}
    values |= {"stride_dc": 1, "stride_xc": 1, "stride_wn": 1, "BULK": ARCHS[arch].bulk}
    values |= {"GROUP_M": importance.GROUP_M, "UPCAST": False}
    values |= {"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return compile_for(arch, importance.importance_update_kernel, types, values, **options)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("has_grad", [False, True], ids=["alone", "accumulating"])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_importance_update_compiles_and_fits(arch, has_grad, dtype):
    tiles = importance._tiles(dtype, 4096, 4096, ARCHS[arch])
    binary = compile_importance(arch, has_grad, dtype, tiles)
    check(binary, arch, dtype)
    assert sums_from_zero(binary) == (dtype == torch.float32)


@pytest.mark.parametrize("arch", [90, 120], ids=["most memory", "least memory"])
def test_every_launch_shape_that_is_measured_compiles_and_fits(arch):
    """In bf16: the steps in flight of fp32 are of half as many tokens."""
    device = ARCHS[arch]
    for tiles in grad.candidates(torch.bfloat16, device):
        binary = compile_subnet_grad(arch, 8, torch.bfloat16, tiles)
        assert binary.metadata.shared <= device.memory, tiles
    for tiles in importance.candidates(torch.bfloat16, device):
        binary = compile_importance(arch, True, torch.bfloat16, tiles)
        assert binary.metadata.shared <= device.memory, tiles


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_write_back_compiles(arch, dtype, stochastic):
    types = {"layers_ptr": "*i64", "parts_ptr": "*i32", "key": "i64"}
    types |= {"weight_like": f"*{NAMES[dtype]}", "subnet_like": "*fp32"}
    values = {"STOCHASTIC": stochastic, "BLOCK_R": 4, "BLOCK_C": PART // 4}
    assert compile_for(arch, write_back_kernel, types, values, num_warps=4).asm["cubin"]


@pytest.mark.parametrize("arch", ARCHS)
def test_adamw_compiles(arch):
    types = {"tensors_ptr": "*i64", "factors_ptr": "*fp32", "parts_ptr": "*i32", "like": "*bf16"}
    types |= dict.fromkeys(("keep", "rest1", "beta2", "rest2", "eps", "sign"), "fp32")
    values = {"BLOCK": adamw.BLOCK}
    assert compile_for(arch, adamw.adamw_kernel, types, values, num_warps=4).asm["cubin"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("dtype", "other"), [("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16")]
)
def test_lerp_compiles_and_rounds_the_product_before_the_sum(arch, dtype, other):
    """As PyTorch does in bf16 and CUDA's in both, or their bits would differ."""
    types = {"tensors_ptr": "*i64", "weight_ptr": "*fp32", "parts_ptr": "*i32"}
    types |= {"like": f"*{dtype}", "like_other": f"*{other}"}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    binary = compile_for(arch, lerp.lerp_kernel, types, {"BLOCK": lerp.BLOCK}, **options)
    assert binary.asm["cubin"] and "mul" in binary.asm["ptx"] and "fma.rn" not in binary.asm["ptx"]
    assert ("xor" in binary.asm["ptx"]) == (dtype == "bf16")  # random bits where they are used
