"""A step of AdamW on bf16 tensors by two implementations, and how far apart they may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from losia_pro import rounding, torch_ops

CONSTANTS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def operands(shapes: list[tuple[int, ...]], device: str) -> list[list[Tensor]]:
    """Parameters, gradients and moments, as after some steps."""
    kinds = [[torch.randn(s, device=device) for s in shapes] for _ in range(3)]
    kinds.append([torch.rand(s, device=device) * 1e-2 for s in shapes])
    return [[t.bfloat16() for t in kind] for kind in kinds]


def compare(
    step: Callable[..., Any], shapes: list[tuple[int, ...]], device: str, maximize: bool
) -> None:
    """``step`` and ``torch_ops.adamw_`` take the same random bits.

    Their results in fp32 differ by the rounding of a dozen operations, 16 units of 2^-24 of the largest term, which
    is a 2^-12th of bf16's own unit where terms do not cancel: so large a share of the entries may be rounded to the
    other neighbour, and none further.
    """
    ours = operands(shapes, device)
    theirs = [[t.clone() for t in kind] for kind in ours]
    before = [torch.cat([t.flatten() for t in kind]).float() for kind in ours]
    steps = [3 + k for k in range(len(shapes))]
    keys = [rounding.key_of(5, k) for k in steps]
    for function, kinds in ((step, ours), (torch_ops.adamw_, theirs)):
        function(*kinds, steps, keys, maximize=maximize, **CONSTANTS)
    n = sum(t.numel() for t in ours[0])
    for mine, others, last in zip(ours, theirs, before, strict=True):
        a, b = (torch.cat([t.flatten() for t in kind]).float() for kind in (mine, others))
        unit = torch.maximum(a.abs(), b.abs()).frexp().exponent.float().sub(8).exp2()
        terms = (
            last.abs() + before[1].abs() + b.abs()
        )  # an update is no larger than before and after
        assert bool(((a - b).abs() <= unit + 16 * 2**-24 * terms).all())
        assert int((a != b).sum()) <= n * 2**-12 + 6 * math.sqrt(n * 2**-12) + 6
