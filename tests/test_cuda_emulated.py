"""Kernels of csrc/ on a CPU: themselves, over the threads and instructions of tests/emulated/.

They show each index that is read and written, the tails, that 16 bytes begin at a multiple of 16, and the bits of what
rounds one operation at a time. They do not show times.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import lerps
import pytest
import torch

from losia_pro import reference
from losia_pro.tables import lerp_tables

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("c++")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/losia.h
LERP_PART = int(re.findall(r"LERP_PART = (\d+);", (ROOT / "csrc/losia.h").read_text())[0])

UPDATE = """
extern "C" const char* run(void* importance, void* uncertainty, const void* weight, const float* product,
                           const float* grad, int64_t rows, int64_t columns, int64_t stride_r, int64_t stride_c,
                           int variant, int weight_dtype, int kept_dtype) {
  emulated::broken = "";
  const cudaError_t error =
      losia::importance_update({importance, uncertainty, weight, product, grad, rows, columns, stride_r, stride_c,
                                0.75f, 0.25f, 0.5f, 0.5f, 2.0f, variant, losia::Dtype(weight_dtype),
                                losia::Dtype(kept_dtype)}, nullptr);
  return error == cudaSuccess ? emulated::broken : "refused";
}
"""


GATHER = """
extern "C" const char* run(const void* x, const int64_t* in_idx, void* out, int64_t tokens, int64_t n_in,
                           int64_t stride_t, int64_t stride_c, int unit, int step) {
  emulated::broken = "";
  const cudaError_t error =
      losia::gather_columns(x, in_idx, out, tokens, n_in, stride_t, stride_c, unit, step, nullptr);
  return error == cudaSuccess ? emulated::broken : "refused";
}
"""

LERP = """
extern "C" const char* run(const int64_t* tensors, const float* weight, const int32_t* parts, int64_t n_parts, int t,
                           int other) {
  emulated::broken = "";
  const cudaError_t error =
      losia::lerp(tensors, weight, parts, n_parts, losia::Dtype(t), losia::Dtype(other), nullptr);
  return error == cudaSuccess ? emulated::broken : "refused";
}
"""


def compiled(folder: Path, name: str, entry: str, launches: int = 1) -> ctypes.CDLL:
    """A kernel's file and an entry point ``run``, which returns the rule that was broken, for this CPU."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    for source in ("losia.h", "eight.cuh", "rounding.cuh"):
        shutil.copy(ROOT / "csrc" / source, folder)
    for source in (ROOT / "tests" / "emulated").iterdir():
        shutil.copy(source, folder)
    text = (ROOT / "csrc" / name).read_text()
    text, found = re.subn(r"(\w+(?:<[\w, ]+>)?)<<<(.*?)>>>\(", r"emulated::run(\1, \2)(", text)
    assert found == launches
    (folder / "kernel.cpp").write_text(text + entry)
    library = folder / "kernel.so"
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
        "-I.",
        "-o",
        library,
        "kernel.cpp",
    ]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="module")
def update(tmp_path_factory):
    return compiled(
        tmp_path_factory.mktemp("update"), "importance_update.cu", UPDATE, launches=2
    ).run


LAYOUTS = {  # of weights, and whether rows are taken eight entries at a time
    "contiguous": (lambda t: t, 40),
    "a slice of wider rows": (lambda t: torch.cat([t, t, t], 1)[:, : t.shape[1]], 40),
    "rows of odd lengths apart": (lambda t: torch.cat([t, t[:, :1]], 1)[:, :-1], 40),
    "transposed": (lambda t: t.T.contiguous().T, 40),
    "begins within 16 bytes": (
        lambda t: torch.cat([t, t], 1).flatten()[1:].as_strided(t.shape, (80, 1)),
        40,
    ),
    "every other of wider rows": (lambda t: torch.stack([t, t], 2)[:, :, 0], 40),
    "an odd number of columns": (lambda t: torch.cat([t, t[:, :3]], 1)[:, :-3], 37),
}


@pytest.mark.parametrize("layout, columns", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_grad, variant", [(False, 0), (True, 1), (True, 2)])
def test_importance_is_updated_in_every_layout(
    update, has_grad, variant, dtype, kept, layout, columns
):
    torch.manual_seed(0)
    rows = 67  # more than a block of eights, and a last block that is not full
    product, grad, weight = torch.randn(3, rows, columns)
    weight = layout(weight.to(dtype))
    ours = torch.rand(2, rows + 1, columns).to(kept)  # a row that must stay
    smoothed, uncertain = ours[0].clone(), ours[1].clone()
    pointers = ours[0], ours[1], weight, product, grad if has_grad else None
    addresses = (ctypes.c_void_p(t if t is None else t.data_ptr()) for t in pointers)
    sizes = map(ctypes.c_int64, (rows, columns, *weight.stride()))
    assert update(*addresses, *sizes, variant, DTYPES[dtype], DTYPES[kept]) == b""
    g = 2 * (product + grad if has_grad else product)
    now = reference.importance(g, weight.float(), reference.VARIANTS[variant])
    mean = 0.75 * smoothed[:rows].float() + 0.25 * now
    smoothed[:rows] = mean
    uncertain[:rows] = 0.5 * uncertain[:rows].float() + 0.5 * (now - mean).abs()
    for a, b in zip(ours, (smoothed, uncertain), strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a[rows], b[rows])


@pytest.fixture(scope="module")
def gather(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("gather"), "gather_columns.cu", GATHER).run


@pytest.mark.parametrize("tokens", [1, 7, 18])
@pytest.mark.parametrize(
    "dtype, run, n_in",
    [
        (torch.bfloat16, 1, 1),
        (torch.bfloat16, 1, 172),
        (torch.bfloat16, 1, 384),  # two blocks of 192 threads
        (torch.bfloat16, 1, 1032),
        (torch.bfloat16, 16, 384),
        (torch.bfloat16, 8, 8 * 43),
        (torch.float32, 1, 300),
        (torch.float32, 4, 48),
        (torch.float64, 1, 33),
    ],
)
def test_every_chosen_column_is_copied_once_and_nothing_else(gather, dtype, run, n_in, tokens):
    torch.manual_seed(0)
    runs = torch.randperm(2 * n_in // run)[: n_in // run].sort().values
    idx = (runs[:, None] * run + torch.arange(run)).flatten()
    x = torch.randn(tokens, 2 * n_in + 8).to(dtype)
    out = torch.full((tokens + 2, n_in), torch.nan, dtype=dtype)
    element = x.element_size()
    step = 16 // element if run * element % 16 == 0 else 1
    sizes = tokens, n_in, x.stride(0) * element, element
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, idx, out))
    said = gather(*pointers, *map(ctypes.c_int64, sizes), step * element, step)
    assert said.decode() == ""
    assert torch.equal(out[:tokens], x[:, idx]) and out[tokens:].isnan().all()


@pytest.fixture(scope="module")
def lerp(tmp_path_factory):
    """``losia_pro._cuda_ops.lerp_``, over the kernel on a CPU."""
    run = compiled(tmp_path_factory.mktemp("lerp"), "lerp.cu", LERP).run

    def call(tensors, others, weight, key):
        made = lerp_tables(tensors, others, weight, key, LERP_PART)
        addresses = (ctypes.c_void_p(t.data_ptr()) for t in made)
        kinds = DTYPES[tensors[0].dtype], DTYPES[others[0].dtype]
        assert run(*addresses, ctypes.c_int64(made[-1].shape[0]), *kinds).decode() == ""

    return call


def test_the_interpolation_has_the_bits_of_pytorch(lerp):
    lerps.compare(lerp, "cpu")


@pytest.mark.parametrize("other", lerps.OTHERS)
def test_the_interpolation_in_fp32_rounds_product_and_sum_one_by_one(lerp, other):
    lerps.compare_fp32(lerp, "cpu", other)
