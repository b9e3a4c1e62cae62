"""An interpolation of bf16 tensors by two implementations: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from losia_pro import rounding, torch_ops

SHAPES = [(64, 80), (5,), (1, 1), (0, 4), (33, 65), (2, 4100)]
WEIGHTS = [0.0, 2**-12, 0.3, 0.5, 0.98, 1.0, torch.tensor(0.1), torch.tensor([0.7]).double()]


def operands(device: str, tiny: float = 1e-40) -> tuple[list[Tensor], list[Tensor]]:
    """Some pairs, equal ones, far ones and numbers that are none among them; the last lies within a
    longer one, and begins at an odd entry."""
    tensors, others = ([torch.randn(s).bfloat16() for s in SHAPES] for _ in range(2))
    others[0][:32] = tensors[0][:32]
    others[4] *= 2**-20
    bad = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.38e38, tiny])
    tensors[1].copy_(bad)
    others[-1][0, : len(bad)] = bad
    both = [[t.to(device) for t in kind] for kind in (tensors, others)]
    for kind in both:
        kind[-1] = torch.cat([kind[-1].flatten(), kind[-1][0, -2:]])[1:-1]
    return both[0], both[1]


def whole(view: Tensor) -> Tensor:
    base = view._base
    assert base is not None
    return base


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for what a NaN holds."""
    a, b = (t.cpu().float() for t in (a, b))
    return torch.equal(a.nan_to_num(1.25, 1e30, -1e30), b.nan_to_num(1.25, 1e30, -1e30)) and (
        torch.equal(a.isnan(), b.isnan())
    )


def compare(lerp: Callable[..., Any], device: str, tiny: float = 1e-40) -> None:
    """``lerp`` on ``device`` and ``torch_ops.lerp_`` on the CPU."""
    for k, weight in enumerate(WEIGHTS):
        ours, others = operands(device, tiny)
        theirs, read = ([t.cpu().clone() for t in kind] for kind in (ours, others))
        around = whole(ours[-1])[[0, -1]]
        kept = [t.clone() for t in others]
        key = rounding.key_of(k)
        on_device = weight.to(device) if isinstance(weight, Tensor) and k % 2 else weight
        lerp(ours, others, on_device, key)
        torch_ops.lerp_(theirs, read, weight, key)
        assert torch.equal(whole(ours[-1])[[0, -1]], around)
        assert all(map(same, ours, theirs)) and all(map(same, others, kept))


def refuses(lerp: Callable[..., Any], device: str) -> None:
    t = torch.zeros(4, 6, device=device).bfloat16()
    for pair, error, message in [
        (([t.T], [t.T.contiguous()]), ValueError, "tensor must be contiguous"),
        (([t.T.contiguous()], [t.T]), ValueError, "other must be contiguous"),
        (([t], [t[:3]]), ValueError, r"other must be \(4, 6\) as its tensor is, got \(3, 6\)"),
        (([t], [t.float()]), TypeError, "in bf16, got torch.bfloat16 and torch.float32"),
        (([t.half()], [t]), TypeError, "in bf16, got torch.float16 and torch.bfloat16"),
    ]:
        with pytest.raises(error, match=message):
            lerp(*pair, 0.5, 1)
