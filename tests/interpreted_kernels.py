"""The Triton kernels on the CPU; `test_kernels_interpreted.py` runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from losia_pro import dispatch, reference, torch_ops
from losia_pro.kernels import gather_columns as gather
from losia_pro.kernels import importance_update, indexing, launch, tiles
from losia_pro.kernels import subnet_grad as grad

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens, in or out, chosen
SHAPES = [
    (64, 256, 32),
    (37, 129, 13),
    (1, 1, 1),
    (5, 700, 600),
    (0, 8, 3),
    (6, 8, 0),
    (300, 96, 96),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every buffer that the kernels must fill starts as NaN; the same data every run."""
    torch.manual_seed(0)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **k: empty(*size, **k).fill_(torch.nan))


def choose(n: int, k: int) -> torch.Tensor:
    return torch.randperm(n)[:k].sort().values


def relative(a: torch.Tensor, truth: torch.Tensor) -> float:
    return float((a.double() - truth).norm() / truth.norm().clamp_min(1e-300))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_columns_moves_the_bits(shape, dtype):
    tokens, n, k = shape
    x, idx = torch.randn(tokens, n).to(dtype), choose(n, k)
    y = torch.ops.losia_pro.gather_columns(x, idx, impl="triton")
    assert y.is_contiguous()
    assert torch.equal(y, x[:, idx])


@pytest.mark.parametrize("fused", [False, True], ids=["gathered", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subnet_grad_is_as_exact_as_pytorch(shape, dtype, fused):
    tokens, n, k = shape
    n_in = max(1, k // 2)
    dy, x_sub, idx = (
        torch.randn(tokens, n).to(dtype),
        torch.randn(tokens, n_in).to(dtype),
        choose(n, k),
    )
    truth = dy.double()[:, idx].T @ x_sub.double()
    for out_dtype in DTYPES:
        ours = launch.subnet_grad(dy, x_sub, idx, out_dtype, fused=fused)
        assert ours.dtype == out_dtype and ours.shape == (k, n_in)
        peer = (dy[:, idx].T @ x_sub).to(out_dtype) if dtype == out_dtype else None
        peer = torch_ops.subnet_grad(dy, x_sub, idx, out_dtype) if peer is None else peer
        assert relative(ours, truth) <= 2 * relative(peer, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [2, 8, 16, 24])
def test_aligned_runs_give_what_single_neurons_give(group, dtype):
    tokens, n_in = 70, 5
    idx = (choose(10, 4)[:, None] * group + torch.arange(group)).flatten()
    dy, x_sub = torch.randn(tokens, 10 * group).to(dtype), torch.randn(tokens, n_in).to(dtype)
    gathered = torch.ops.losia_pro.gather_columns(dy, idx, group=group, impl="triton")
    assert torch.equal(gathered, dy[:, idx])
    ours = torch.ops.losia_pro.subnet_grad(dy, x_sub, idx, group=group, impl="triton")
    truth = dy.double()[:, idx].T @ x_sub.double()
    assert relative(ours, truth) <= 2 * relative(dy[:, idx].T @ x_sub, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_in", [5, 16, 300])
def test_a_whole_side_needs_no_indices(n_in, dtype):
    dy, x_sub = torch.randn(70, 50).to(dtype), torch.randn(70, n_in).to(dtype)
    every = torch.arange(50)
    ours = torch.ops.losia_pro.subnet_grad(dy, x_sub, every, group=50, impl="triton")
    truth = dy.double().T @ x_sub.double()
    assert relative(ours, truth) <= 2 * relative(dy.T @ x_sub, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", reference.VARIANTS)
@pytest.mark.parametrize("micro_batches, tokens", [(1, 33), (2, 33), (2, 0)])
@pytest.mark.parametrize("bulk", [True, False], ids=["bulk copies", "loads"])
def test_importance_update_follows_its_equation(
    bulk, micro_batches, tokens, variant, dtype, monkeypatch
):
    """Without tokens too: data parallel, and a compiled backward, sum the whole gradient before."""
    device = tiles.Device(4, 99 * 1024, bulk)
    monkeypatch.setattr(importance_update, "device_of", lambda _: device)
    shape, scale, beta1, beta2 = (140, 56), 0.5, 0.8, 0.9
    dy, x = torch.randn(tokens, shape[0]).to(dtype), torch.randn(tokens, shape[1]).to(dtype)
    weight = torch.randn(shape[1], shape[0]).to(dtype).T  # any strides
    before = torch.randn(shape) if micro_batches > 1 else None
    smoothed, uncertain = torch.rand(shape), torch.rand(shape)
    g = scale * (dy.double().T @ x.double() + (0 if before is None else before.double()))
    current = reference.importance(g, weight.double(), variant)
    truth_i = reference.smooth(smoothed.double(), current, beta1)
    truth_u = reference.uncertainty(uncertain.double(), current, truth_i, beta2)
    own = smoothed.clone(), uncertain.clone()
    for kept, impl in ((own, "torch"), ((smoothed, uncertain), "triton")):
        args = (*kept, weight, dy, x, before, beta1, beta2, variant)
        torch.ops.losia_pro.importance_update_(*args, scale=scale, impl=impl)
    assert relative(smoothed, truth_i) <= 2 * relative(own[0], truth_i)
    assert relative(uncertain, truth_u) <= 2 * relative(own[1], truth_u)
    # g's rounding is at most tokens ulps of its terms' size; squaring doubles it, the rest are few operations.
    bound = 4 * max(tokens, 1) * torch.finfo(torch.float32).eps
    assert relative(smoothed, truth_i) <= bound and relative(uncertain, truth_u) <= bound


def test_what_a_step_weighs_is_rounded_once(monkeypatch):
    """1 - fp32(0.85) is 2.0e-7 of it away from fp32(1 - 0.85)."""
    kernel = importance_update.importance_update_kernel

    class Narrow:  # as a GPU's launch passes floats; the interpreter's are fp64
        def __getitem__(self, grid):
            def launch(*args, **options):
                args = [float(np.float32(a)) if isinstance(a, float) else a for a in args]
                kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(importance_update, "importance_update_kernel", Narrow())
    one = torch.ones(1, 1)
    smoothed, uncertain = torch.zeros(1, 1), torch.zeros(1, 1)
    args = (smoothed, uncertain, one, one, one, None, 0.85, 0.5, "first")
    torch.ops.losia_pro.importance_update_(*args, impl="triton")
    assert smoothed.item() == torch.tensor(1 - 0.85)
    args = (smoothed.zero_(), uncertain.zero_(), one, one, one, None, 0.5, 0.85, "first")
    torch.ops.losia_pro.importance_update_(*args, impl="triton")
    assert uncertain.item() == torch.tensor(1 - 0.85) / 2


def test_importance_in_bf16_is_rounded_once_a_step():
    shape, beta = (20, 30), 0.85
    dy, x, weight = torch.randn(16, 20), torch.randn(16, 30), torch.randn(shape)
    exact = [torch.rand(shape), torch.rand(shape)]
    short = [t.bfloat16() for t in exact]
    exact = [t.float() for t in short]
    for kept in (exact, short):
        args = (*kept, weight, dy, x, None, beta, beta, "taylor")
        torch.ops.losia_pro.importance_update_(*args, impl="triton")
    for a, b in zip(
        short, exact, strict=True
    ):  # the interpreter truncates: one unit, not half of one
        assert ((a.float() - b).abs() <= 2**-7 * b.abs()).all()


def test_a_single_column_chosen_twice_is_not_taken_for_all():
    dy, x_sub, idx = torch.randn(9, 1), torch.randn(9, 5), torch.tensor([0, 0])
    ours = launch.subnet_grad(dy, x_sub, idx, torch.float32)
    assert torch.equal(ours, torch_ops.subnet_grad(dy, x_sub, idx, torch.float32))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T.contiguous().T,
        lambda t: torch.stack([t, t], 2)[:, :, 0],
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        lambda t: t[:1].expand(t.shape),
    ],
    ids=["transposed", "every other", "row-padded", "expanded"],
)
def test_any_strides(view):
    x, dy, idx = view(torch.randn(33, 50)), view(torch.randn(33, 50)), choose(50, 20)
    assert torch.equal(launch.gather_columns(x, idx), x[:, idx])
    truth = dy.double()[:, idx].T @ x.double()
    for fused in (False, True):
        ours = launch.subnet_grad(dy, x, idx, torch.float32, fused=fused)
        assert relative(ours, truth) <= 2 * relative(dy[:, idx].T @ x, truth)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_columns_that_are_not_chosen_do_not_leak(bad):
    dy, idx = torch.randn(40, 30), torch.tensor([0, 3, 28])
    dirty = torch.full_like(dy, bad)
    dirty[:, idx] = dy[:, idx]
    x_sub = torch.randn(40, 7)
    assert torch.equal(launch.gather_columns(dirty, idx), dy[:, idx])
    for fused in (False, True):
        args = (x_sub, idx, torch.float32)
        ours = launch.subnet_grad(dirty, *args, fused=fused)
        assert torch.equal(ours, launch.subnet_grad(dy, *args, fused=fused))


def test_64_bit_offsets_give_the_same(monkeypatch):
    x, dy, idx = torch.randn(70, 50), torch.randn(70, 50), choose(50, 20)
    narrow = [
        launch.gather_columns(x, idx),
        launch.subnet_grad(dy, x, idx, torch.float32, fused=True),
    ]
    monkeypatch.setattr(gather, "needs_int64", lambda *t: True)
    monkeypatch.setattr(grad, "needs_int64", lambda *t: True)
    wide = [
        launch.gather_columns(x, idx),
        launch.subnet_grad(dy, x, idx, torch.float32, fused=True),
    ]
    assert all(map(torch.equal, narrow, wide))


def test_64_bit_offsets_are_used_exactly_where_32_would_wrap():
    def spans(rows, stride):
        return torch.empty_strided((rows, 2), (stride, 1), device="meta")

    assert not indexing.needs_int64(spans(2, 2**31 - 2))  # last offset 2^31 - 1
    assert indexing.needs_int64(spans(2, 2**31 - 1))
    assert indexing.needs_int64(torch.empty(1, 1), spans(2**15 + 1, 2**16))
    assert not indexing.needs_int64(torch.empty(0, 5))


def test_fp64_is_refused_by_name():
    dy, x_sub, idx = torch.randn(4, 5).double(), torch.randn(4, 2).double(), torch.tensor([1])
    with pytest.raises(TypeError, match=r"got dy torch.float64; use impl='torch'"):
        torch.ops.losia_pro.subnet_grad(dy, x_sub, idx, impl="triton")
    with pytest.raises(TypeError, match="out_dtype torch.float64"):
        launch.subnet_grad(dy.float(), x_sub.float(), idx, torch.float64)
    with pytest.raises(TypeError, match="must be of one dtype"):
        launch.subnet_grad(dy.float(), x_sub.half(), idx, torch.float32)


def test_the_interpreter_counts_as_a_device():
    assert dispatch.resolve("subnet_grad", "cpu", "triton") == "triton"
