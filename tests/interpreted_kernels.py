"""The Triton kernels on the CPU; `test_kernels_interpreted.py` runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from losia_pro import ops, torch_ops
from losia_pro.kernels import gather_columns as gather
from losia_pro.kernels import indexing, launch
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


def test_splits_cover_every_token_once():
    for tokens in (1, 31, 128, 129, 8192, 32768):
        for blocks in (1, 16, 44, 500):
            size = grad._split_tokens(tokens, blocks, 32, 132)
            splits = -(-tokens // size)
            assert size % 32 == 0 and (splits - 1) * size < tokens
            assert splits == 1 or splits * blocks <= 132


def test_fp64_is_refused_by_name():
    dy, x_sub, idx = torch.randn(4, 5).double(), torch.randn(4, 2).double(), torch.tensor([1])
    with pytest.raises(TypeError, match=r"got dy torch.float64; use impl='torch'"):
        torch.ops.losia_pro.subnet_grad(dy, x_sub, idx, impl="triton")
    with pytest.raises(TypeError, match="out_dtype torch.float64"):
        launch.subnet_grad(dy.float(), x_sub.float(), idx, torch.float64)
    with pytest.raises(TypeError, match="must be of one dtype"):
        launch.subnet_grad(dy.float(), x_sub.half(), idx, torch.float32)


def test_the_interpreter_counts_as_a_device():
    assert ops.resolve("subnet_grad", "cpu", "triton") == "triton"
