"""`subnet_grad` where tokens are split, on the CPU; `test_kernels_interpreted.py` runs this file with
TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from losia_pro.kernels import counters, launch, tuned
from losia_pro.kernels import subnet_grad as grad
from losia_pro.kernels.tiles import Device, Tiles

CPU = torch.device("cpu")
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
    counters._kept.clear()
    with tuned.forced("subnet_grad", TILES):
        yield


@pytest.fixture
def launches(monkeypatch):
    """Programs of each launch, by tile and split, its parts and its counters."""
    seen: list[tuple[tuple[int, int], torch.Tensor | None, torch.Tensor | None]] = []
    kernel = grad.subnet_grad_kernel

    class Watched:
        def __getitem__(self, grid):
            def run(*args, **options):
                seen.append((grid, args[4], args[5]))
                kernel[grid](*args, **options)

            return run

    monkeypatch.setattr(grad, "subnet_grad_kernel", Watched())
    return seen


def operands(tokens: int, runs: int, n_in: int, dtype: torch.dtype = torch.float32):
    """dy, x_sub and ``runs`` runs of 8 of dy's columns."""
    idx = (2 * torch.arange(runs)[:, None] * 8 + torch.arange(8)).flatten()
    return torch.randn(tokens, 16 * runs).to(dtype), torch.randn(tokens, n_in).to(dtype), idx


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
    for (tiles, programs), parts, _ in launches:
        assert tiles == -(-8 * runs // 16) * -(-n_in // 16) and programs == splits
        assert splits == 1 or parts.isfinite().all()  # each in a place of its own


def test_parts_are_added_in_the_order_of_the_splits():
    """Whoever adds them: the interpreter's last program is that of the last split."""
    parts = [2.0**25, 1.0, -(2.0**25), 1.0]  # 1 in this order, in another 0 or 2
    dy, x, idx = operands(4 * STEP, 1, 1)
    dy.zero_()
    dy[::STEP], x[:] = torch.tensor(parts)[:, None], 1.0
    assert torch.equal(product(dy, x, idx), torch.ones(8, 1))


def test_counters_are_zero_again_and_serve_the_next_launch(launches):
    for tokens, runs in ((5 * STEP, 4), (3 * STEP, 2), (5 * STEP, 4)):
        dy, x, idx = operands(tokens, runs, 30)
        first = product(dy, x, idx)
        assert torch.equal(product(dy, x, idx), first)
        assert not counters._kept[CPU].any()
    assert len({arrived.data_ptr() for *_, arrived in launches}) == 1


def test_one_split_needs_no_counters(launches):
    product(*operands(STEP, 4, 30))
    assert [given for _, *given in launches] == [[None, None]] and not counters._kept


def test_a_launch_after_one_that_failed_is_right(monkeypatch):
    dy, x, idx = operands(5 * STEP, 4, 30)
    right, kernel = product(dy, x, idx), grad.subnet_grad_kernel

    class Interrupted:
        def __getitem__(self, grid):
            def run(*args, **options):
                args[5].fill_(1)
                raise KeyboardInterrupt

            return run

    monkeypatch.setattr(grad, "subnet_grad_kernel", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        product(dy, x, idx)
    monkeypatch.setattr(grad, "subnet_grad_kernel", kernel)
    assert torch.equal(product(dy, x, idx), right)


def test_splits_cover_every_token_once():
    for tokens in (1, 31, 128, 129, 8192, 32768):
        for blocks in (1, 16, 44, 500):
            for tiles in (Tiles(64, 64, 32, 4, 3), Tiles(64, 256, 64, 8, 4)):
                size = grad._split_tokens(tokens, blocks, tiles, 132)
                splits = -(-tokens // size)
                assert size % tiles.k == 0 and (splits - 1) * size < tokens
                assert splits == 1 or splits * blocks <= 132
                assert splits == 1 or 4 * splits * tiles.m * tiles.n <= grad.LAST_BYTES


@pytest.mark.parametrize(
    ("n_out", "n_in", "wide"),
    [(512, 512, 128), (1376, 512, 256), (256, 256, 64), (128, 128, 64), (8192, 128, 128)],
)
def test_the_rules_tile_is_the_widest_that_leaves_the_last_program_little_to_read(
    n_out, n_in, wide
):
    """Of Hopper's 132 processors."""
    tiles = grad._tiles(torch.bfloat16, n_out, n_in, Device(132, 227 * 1024, True))
    assert (tiles.m, tiles.n) == (64, wide)
