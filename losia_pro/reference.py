"""The equations of LoSiA and LoSiA-Pro in plain PyTorch: the oracle that every other version is judged by.

One function per equation, in the order in which the paper (Wang et al., *LoSiA: Efficient High-Rank
Fine-Tuning via Subnet Localization and Optimization*, EMNLP 2025, arXiv:2507.04487) needs them. Nothing
here is made for speed.

Notation: a linear layer ``y = x W^T + b`` with ``W`` of shape ``(out, in)``; its subnet is the block
``W[out_idx][:, in_idx]``, ``out_idx`` being the paper's ``Y_S`` and ``in_idx`` its ``X_S``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANTS = ("taylor", "first", "second")
SCORES = ("iu", "i", "u")


def importance(grad: Tensor, weight: Tensor, variant: str = "taylor") -> Tensor:
    """Importance of each weight: the change of the loss if it were zero (paper: *importance*).

        I = | g w - 1/2 (g w)^2 |     "taylor", the Hessian's diagonal taken as the Fisher's, g^2
        I = | g w |                   "first"
        I = (g w)^2                   "second"

    ``grad`` and ``weight`` have one shape; so has the result, in their promoted dtype.
    """
    gw = grad * weight
    if variant == "taylor":
        return (gw - 0.5 * gw * gw).abs()
    if variant == "first":
        return gw.abs()
    if variant == "second":
        return gw * gw
    raise ValueError(f"importance variant {variant!r} is unknown; use one of {VARIANTS}")


def smooth(previous: Tensor, current: Tensor, beta1: float = 0.85) -> Tensor:
    """Smoothed importance ``I_i = b1 I_{i-1} + (1 - b1) I`` (``I_{-1} = 0``)."""
    return beta1 * previous + (1 - beta1) * current


def uncertainty(previous: Tensor, current: Tensor, smoothed: Tensor, beta2: float = 0.85) -> Tensor:
    """Uncertainty ``U_i = b2 U_{i-1} + (1 - b2) | I - I_i |``, ``I_i`` being this step's smoothed value."""
    return beta2 * previous + (1 - beta2) * (current - smoothed).abs()


def score(smoothed: Tensor, uncertain: Tensor, kind: str = "iu") -> Tensor:
    """Score of each weight, ``s = I_i U_i`` ("iu", the paper's); "i" and "u" are either factor alone."""
    if kind == "iu":
        return smoothed * uncertain
    if kind == "i":
        return smoothed
    if kind == "u":
        return uncertain
    raise ValueError(f"score kind {kind!r} is unknown; use one of {SCORES}")


def _top(sums: Tensor, k: int) -> Tensor:
    """Ascending indices of the ``k`` largest values; among equals the lowest index wins."""
    return torch.sort(sums, descending=True, stable=True).indices[:k].sort().values


def select_rows_first(score: Tensor, n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
    """Rows by their sums, then columns by their sums over the chosen rows (paper: *localization*)."""
    out_idx = _top(score.sum(1), n_out)
    return out_idx, _top(score[out_idx].sum(0), n_in)


def select_columns_first(score: Tensor, n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
    """Columns by their sums, then rows by their sums over the chosen columns."""
    in_idx = _top(score.sum(0), n_in)
    return _top(score[:, in_idx].sum(1), n_out), in_idx


def select_independent(score: Tensor, n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, each by the sums over the whole matrix."""
    return _top(score.sum(1), n_out), _top(score.sum(0), n_in)


def kept(score: Tensor, out_idx: Tensor, in_idx: Tensor) -> Tensor:
    """What localization maximises: ``sum s[out_idx][:, in_idx]``, a scalar."""
    return score[out_idx][:, in_idx].sum()


def select_best(score: Tensor, n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
    """The best of the three greedy answers; the exact maximum is NP-hard.

    Ties go to rows first, then columns first, then independent.
    """
    answers = [
        select(score, n_out, n_in)
        for select in (select_rows_first, select_columns_first, select_independent)
    ]
    return max(answers, key=lambda answer: float(kept(score, *answer)))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer: ``y = x W^T + b``. ``x`` ``(..., in)``, result ``(..., out)``."""
    return F.linear(x, weight, bias)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, out_idx: Tensor, in_idx: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """LoSiA-Pro's gradients ``(dx, d subnet, db)`` (paper: *faster implementation, LoSiA-Pro*).

        dx        = dy W
        d subnet  = dy[:, Y_S]^T x[:, X_S]
        db        = sum over tokens of dy

    ``dy`` is ``(T, out)``, ``x`` is ``(T, in)``.
    """
    return dy @ weight, dy[:, out_idx].T @ x[:, in_idx], dy.sum(0)


def dense_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The full gradient ``dL/dW = dy^T x`` that plain LoSiA forms and LoSiA-Pro does not."""
    return dy.T @ x


def mask(weight: Tensor, out_idx: Tensor, in_idx: Tensor) -> Tensor:
    """1 at the subnet's entries, 0 elsewhere; shape and dtype of ``weight``."""
    m = torch.zeros_like(weight)
    m[out_idx.unsqueeze(1), in_idx] = 1
    return m


def masked_dense_step(
    weights: Iterable[Tensor], masks: Iterable[Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """One step of masked dense training: what a step on compact subnets must equal.

    Each gradient is multiplied by its mask; whatever the optimizer does besides following gradients
    (momentum of entries that left the subnet, weight decay) is undone outside the mask.
    """
    weights, masks = list(weights), list(masks)
    before = [w.detach().clone() for w in weights]
    for w, m in zip(weights, masks, strict=True):
        assert w.grad is not None
        w.grad.mul_(m)
    optimizer.step()
    with torch.no_grad():
        for w, m, old in zip(weights, masks, before, strict=True):
            w.copy_(torch.where(m.bool(), w, old))


def rewarm_factor(t: int, t0: int, period: int) -> float:
    """Factor on the learning rate after a re-selection: ``(t - t0) / T``, held within [0, 1].

    ``t`` counts optimizer steps from 1 and ``t0`` is the step after which the group was re-selected, so
    that the first ``T`` steps on the new subnet run at ``1/T, 2/T, ..., 1`` of the learning rate
    (paper: *asynchronous periodic localization*).
    """
    return min(max((t - t0) / period, 0.0), 1.0)


def error_bound(lr: float, grad: Tensor, trained: Tensor, x: Tensor) -> Tensor:
    """The paper's bound on what one SGD step loses by training only some entries of ``W``.

        1/M || (W_full - W_subnet) x ||_F^2  <=  lr^2 / M * || 1_{not trained} * grad ||_F^2 * || x ||_F^2

    ``W_full`` is ``W`` after the step on all entries, ``W_subnet`` after the step on the trained ones, and
    ``M`` the number of tokens. ``grad`` is the full gradient ``(out, in)``, ``trained`` a 0/1 mask of its
    shape, ``x`` ``(M, in)``.
    """
    missed = ((1 - trained) * grad).square().sum()
    return lr**2 / x.shape[0] * missed * x.square().sum()
