"""From scores to indices: which rows and columns of a weight form its subnet."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STRATEGIES = ("best", "rows", "columns", "independent")


def localize(
    score: Tensor, n_out: int, n_in: int, strategy: str = "best", group: int = 1
) -> tuple[Tensor, Tensor]:
    """Rows and columns that keep a large part of a score matrix: greedy maximisation of
    ``sum score[out_idx][:, in_idx]``.

    Exact maximisation is NP-hard (paper: *localization*). Three greedy answers are known: "rows" by their
    sums, then columns by the sums over those rows; "columns" first, then rows; "independent", both by the
    full sums. "best" takes the one that keeps most, the first of equals. Sums run in fp64, and among equal
    sums the lowest index wins, so that the answer does not depend on the device or the memory layout.

    Args:
        score: ``(out, in)``, floating point, finite; meant to be non-negative.
        n_out, n_in: how many rows and columns, ``1 <= n_out <= out``, ``1 <= n_in <= in``.
        group: neurons are chosen in aligned runs ``[k group, (k + 1) group)``, by the sum of their scores;
            ``n_out`` and ``n_in`` must be multiples of it, and neurons that do not fill a last run are
            never chosen. A side that is wanted whole is exempt.

    Returns:
        ``(out_idx, in_idx)``: sorted int64 indices on ``score``'s device.

    Raises:
        ValueError: for a size, strategy or group that does not fit, or a score that is not finite.
    """
    if score.dim() != 2 or not score.is_floating_point():
        raise ValueError(
            f"score must be a floating-point matrix (out, in), got {score.dtype} {tuple(score.shape)}"
        )
    if group < 1:
        raise ValueError(f"group must be >= 1, got {group!r}")
    for what, n, size in (
        ("n_out", n_out, score.shape[0]),
        ("n_in", n_in, score.shape[1]),
    ):
        if not 1 <= n <= size:
            raise ValueError(f"{what} must be between 1 and {size}, got {n}")
        if n < size and n % group:
            raise ValueError(f"{what} = {n} of {size} is not a multiple of group = {group}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is unknown; use one of {STRATEGIES}")

    score = score.double().contiguous()
    group_out = group if n_out < score.shape[0] else 1
    group_in = group if n_in < score.shape[1] else 1

    def rows(s: Tensor) -> Tensor:
        return _top(s.sum(1), n_out, group_out)

    def columns(s: Tensor) -> Tensor:
        return _top(s.sum(0), n_in, group_in)

    answers = []
    if strategy in ("rows", "best"):
        out_idx = rows(score)
        answers.append((out_idx, columns(score[out_idx])))
    if strategy in ("columns", "best"):
        in_idx = columns(score)
        answers.append((rows(score[:, in_idx]), in_idx))
    if strategy in ("independent", "best"):
        answers.append((rows(score), columns(score)))

    total, *kept = torch.stack([score.sum(), *(score[o][:, i].sum() for o, i in answers)]).tolist()
    if not math.isfinite(total):
        raise ValueError(
            "score has entries that are not finite: did the loss overflow while profiling?"
        )
    return answers[kept.index(max(kept))]


def _top(sums: Tensor, n: int, group: int) -> Tensor:
    """Sorted indices of the ``n`` largest of ``sums``, chosen in aligned runs of ``group``."""
    runs = sums[: len(sums) - len(sums) % group].view(-1, group).sum(1)
    chosen = runs.sort(descending=True, stable=True).indices[: n // group].sort().values
    if group == 1:
        return chosen
    return (chosen[:, None] * group + torch.arange(group, device=sums.device)).flatten()
