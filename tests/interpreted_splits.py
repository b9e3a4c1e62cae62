"""`subnet_grad` where tokens are split, on the CPU; `test_kernels_interpreted.py` runs this file with
TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from losia_pro.kernels import launch, tuned
from losia_pro.kernels import subnet_grad as grad
from losia_pro.kernels.tiles import Device, Tiles

TILES = Tiles(16, 16, 16, 4, 1)
STEP = 4 * TILES.k  # the fewest tokens of a split
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def many_splits(monkeypatch):
    """Small tiles on a device of many processors; every buffer that the kernel must fill starts as NaN."""
    torch.manual_seed(0)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **k: empty(*size, **k).fill_(torch.nan))
    monkeypatch.setattr(grad, "device_of", lambda _: Device(1000, 227 * 1024, True))
    with tuned.forced("subnet_grad", TILES):
        yield


@pytest.fixture
def launches(monkeypatch):
    """Programs of each launch, by tile and split, and what they write."""
    seen: list[tuple[tuple[int, int], torch.Tensor]] = []
    kernel = grad.subnet_grad_kernel

    class Watched:
        def __getitem__(self, grid):
            def run(*args, **options):
                seen.append((grid, args[3]))
                kernel[grid](*args, **options)

            return run

    monkeypatch.setattr(grad, "subnet_grad_kernel", Watched())
    return seen


def operands(tokens: int, runs: int, n_in: int, dtype: torch.dtype = torch.float32):
    """dy, x_sub and ``runs`` runs of 8 of dy's columns; what is not chosen is NaN."""
    idx = (2 * torch.arange(runs)[:, None] * 8 + torch.arange(8)).flatten()
    dy = torch.full((tokens, 16 * runs), torch.nan, dtype=dtype)
    dy[:, idx] = torch.randn(tokens, 8 * runs).to(dtype)
    return dy, torch.randn(tokens, n_in).to(dtype), idx


def product(dy, x, idx, out_dtype=torch.float32):
    return launch.subnet_grad(dy, x, idx, out_dtype, 8, fused=True)


def relative(a: torch.Tensor, truth: torch.Tensor) -> float:
    return float((a.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "runs", "n_in", "splits"),
    [(2 * STEP, 2, 16, 2), (8 * STEP - 5, 5, 21, 7), (STEP + 1, 1, 1, 1), (2 * STEP + 1, 3, 40, 2)],
)
def test_split_sums_are_as_exact_as_pytorch(tokens, runs, n_in, splits, dtype, launches):
    dy, x, idx = operands(tokens, runs, n_in, dtype)
    truth = dy[:, idx].double().T @ x.double()
    for out_dtype in DTYPES:
        ours = product(dy, x, idx, out_dtype)
        peer = (dy[:, idx].float().T @ x.float()).to(out_dtype)
        assert ours.dtype == out_dtype and relative(ours, truth) <= 2 * relative(peer, truth)
    for (tiles, programs), parts in launches:
        assert tiles == -(-8 * runs // 16) * -(-n_in // 16) and programs == splits
        assert parts.numel() == splits * 8 * runs * n_in and parts.isfinite().all()


def test_parts_are_added_in_the_order_of_the_splits():
    parts = [2.0**25, 1.0, -(2.0**25), 1.0]  # 1 in this order, in another 0 or 2
    dy, x, idx = operands(4 * STEP, 1, 1)
    dy.zero_()
    dy[::STEP], x[:] = torch.tensor(parts)[:, None], 1.0
    assert torch.equal(product(dy, x, idx), torch.ones(8, 1))


def test_the_same_bits_every_run():
    work = operands(7 * STEP, 4, 30)
    first = product(*work)
    assert all(torch.equal(product(*work), first) for _ in range(3))


def test_one_split_is_the_result_and_not_summed(launches, monkeypatch):
    monkeypatch.setattr(grad, "sum_splits_kernel", None)
    result = product(*operands(STEP, 4, 30))
    assert [written.data_ptr() for _, written in launches] == [result.data_ptr()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_take_no_more_memory_for_more_tokens(dtype, launches, monkeypatch):
    """fp32's neither: its sums are exact in few splits."""
    monkeypatch.setattr(grad, "device_of", lambda _: Device(2, 227 * 1024, True))
    for tokens in (1000, 4000):
        product(*operands(tokens, 1, 8, dtype))
    few, many = (written.shape for _, written in launches)
    assert few == many == (8 if dtype == torch.float32 else 2, 8, 8)


def test_splits_cover_every_token_once():
    for tokens in (1, 31, 128, 129, 8192, 32768):
        for blocks in (1, 16, 44, 500):
            for step in (32, 64):
                size = grad._split_tokens(tokens, blocks, step, 132)
                splits = -(-tokens // size)
                assert size % step == 0 and (splits - 1) * size < tokens
                assert splits == 1 or splits * blocks <= 132
