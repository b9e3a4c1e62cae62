"""What the tests of the ops on a GPU share: cases, random operands, and how exact is exact enough."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from losia_pro import dispatch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda"


class Case(NamedTuple):
    tokens: int
    out: int  # columns of dy; the gather's x has as many
    n_out: int
    n_in: int

    def __str__(self) -> str:
        return f"T{self.tokens}-{self.n_out}of{self.out}-x{self.n_in}"


CASES = [
    Case(256, 512, 64, 128),  # aligned
    Case(8192, 4096, 512, 512),  # one of LLaMA-2 7B
    Case(4096, 11008, 1376, 512),
    Case(1000, 777, 97, 203),  # odd
    Case(37, 1030, 1030, 5),  # all, more than a block
    Case(1, 1, 1, 1),
    Case(33, 64, 64, 1),
    Case(0, 16, 4, 4),  # empty
    Case(8, 16, 0, 4),
    Case(8, 16, 4, 0),
]


def usable(op: str, impl: str) -> str:
    """``impl``, if it can run ``op``; else the test is skipped and says why."""
    (why,) = (reason for name, _, reason in dispatch.explain(op, DEVICE) if name == impl)
    if why:
        pytest.skip(why)
    return impl


def randn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, device=DEVICE).to(dtype)


def choose(n: int, k: int) -> Tensor:
    return torch.randperm(n, device=DEVICE)[:k].sort().values


def choose_runs(n: int, k: int, group: int) -> Tensor:
    """``k`` of ``n`` runs of ``group``."""
    return (choose(n, k)[:, None] * group + torch.arange(group, device=DEVICE)).flatten()


def gather(x: Tensor, idx: Tensor, impl: str | None, group: int = 1) -> Tensor:
    return torch.ops.losia_pro.gather_columns(x, idx, group=group, impl=impl)


def grad(
    dy: Tensor, x_sub: Tensor, idx: Tensor, impl: str | None, out_dtype=None, group: int = 1
) -> Tensor:
    return torch.ops.losia_pro.subnet_grad(
        dy, x_sub, idx, group=group, out_dtype=out_dtype, impl=impl
    )


def relative(a: Tensor, truth: Tensor) -> float:
    assert a.shape == truth.shape
    return float((a.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def as_exact_as_pytorch(ours: Tensor, dy: Tensor, x_sub: Tensor, idx: Tensor) -> None:
    """The error is at most twice that of PyTorch's own product of these operands, and a wider result was
    never rounded to their dtype on the way."""
    truth = dy.index_select(1, idx).double().T @ x_sub.double()
    peer = (dy.index_select(1, idx).T @ x_sub).to(ours.dtype)
    assert relative(ours, truth) <= 2 * relative(peer, truth)
    if ours.dtype == torch.float32 != dy.dtype:
        assert relative(ours, truth) <= relative(truth.to(dy.dtype), truth) / 2
