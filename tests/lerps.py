"""An interpolation of tensors by two implementations: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from losia_pro import rounding, torch_ops

SHAPES = [(64, 80), (5,), (1, 1), (0, 4), (33, 65), (2, 4100)]
WEIGHTS = [0.0, 2**-12, 0.3, 0.5, 0.98, 1.0, torch.tensor(0.1), torch.tensor([0.7]).double()]
OTHERS = [torch.float32, torch.bfloat16, torch.float16]  # of fp32 tensors


def operands(
    device: str,
    tiny: float = 1e-40,
    dtype: torch.dtype = torch.bfloat16,
    other: torch.dtype = torch.bfloat16,
) -> tuple[list[Tensor], list[Tensor]]:
    """Some pairs, equal ones, far ones and numbers that are none among them; the last lies within a
    longer one, and begins at an odd entry."""
    tensors, others = ([torch.randn(s).to(d) for s in SHAPES] for d in (dtype, other))
    tensors[0][:32] = others[0][:32]
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


def compare_fp32(
    lerp: Callable[..., Any],
    device: str,
    other: torch.dtype,
    tiny: float = 1e-40,
) -> None:
    """``lerp`` on ``device``, and the equation on the CPU, each operation rounded to fp32: the same bits."""
    for k, weight in enumerate(WEIGHTS):
        ours, others = operands(device, tiny, torch.float32, other)
        before, around = [t.cpu().clone() for t in ours], whole(ours[-1])[[0, -1]]
        kept = [t.clone() for t in others]
        lerp(ours, others, weight.to(device) if isinstance(weight, Tensor) else weight, k)
        assert torch.equal(whole(ours[-1])[[0, -1]], around) and all(map(same, others, kept))
        w = torch.as_tensor(weight, dtype=torch.float32)
        for mine, near, read in zip(ours, before, others, strict=True):
            far = read.cpu().float()
            product = (far - near) * (w if w < 0.5 else w - 1)
            true = (near if w < 0.5 else far) + product
            assert same(mine, true)
            if w in (0, 1):
                end, finite = (near, far)[int(w)], true.isfinite()
                assert torch.equal(true[finite], end[finite])
        assert torch.equal(ours[0][:32].cpu(), others[0][:32].cpu().float())


def refuses(lerp: Callable[..., Any], device: str) -> None:
    t = torch.zeros(4, 6, device=device).bfloat16()
    for pair, error, message in [
        (([t.T], [t.T.contiguous()]), ValueError, "tensor must be contiguous"),
        (([t.T.contiguous()], [t.T]), ValueError, "other must be contiguous"),
        (([t], [t[:3]]), ValueError, r"other must be \(4, 6\) as its tensor is, got \(3, 6\)"),
        (([t], [t.float()]), TypeError, "in bf16 .* got torch.bfloat16 and torch.float32"),
        (([t.half()], [t]), TypeError, "in bf16 .* got torch.float16 and torch.bfloat16"),
        (([t.float()], [t.double()]), TypeError, "in bf16 .* got torch.float32 and torch.float64"),
        (([t, t.float()], [t, t]), TypeError, "as the first is, got torch.float32 and torch.bf"),
        (([t.float()] * 2, [t, t.half()]), TypeError, "as the first is, got .* torch.float16"),
    ]:
        with pytest.raises(error, match=message):
            lerp(*pair, 0.5, 1)
