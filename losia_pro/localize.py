"""From scores to indices: which rows and columns of a weight form its subnet."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    (out_idx,), in_idx = localize_together([score], [n_out], n_in, strategy, group)
    return out_idx, in_idx


def localize_together(
    scores: Sequence[Tensor],
    n_out: Sequence[int],
    n_in: int,
    strategy: str = "best",
    group: int = 1,
) -> tuple[list[Tensor], Tensor]:
    """The same for linears that share their inputs: rows for each, one set of columns for all of them.

    It is ``localize`` on the scores one below the other, with so many rows from each.
    """
    if group < 1:
        raise ValueError(f"group must be >= 1, got {group!r}")
    for score, n in zip(scores, n_out, strict=True):
        if score.dim() != 2 or not score.is_floating_point():
            raise ValueError(
                f"score must be a floating-point matrix (out, in), got {score.dtype} {tuple(score.shape)}"
            )
        _check_size("n_out", n, score.shape[0], group)
        _check_size("n_in", n_in, score.shape[1], group)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is unknown; use one of {STRATEGIES}")

    exact = [score.double().contiguous() for score in scores]

    def rows(sums: Sequence[Tensor]) -> list[Tensor]:
        return [_top(s, n, group if n < len(s) else 1) for s, n in zip(sums, n_out, strict=True)]

    def columns(parts: Sequence[Tensor]) -> Tensor:
        sums = torch.stack([s.sum(0) for s in parts]).sum(0)
        return _top(sums, n_in, group if n_in < len(sums) else 1)

    row_sums = [s.sum(1) for s in exact]
    out_idx, in_idx = rows(row_sums), columns(exact)
    answers = []
    if strategy in ("rows", "best"):
        answers.append((out_idx, columns([s[o] for s, o in zip(exact, out_idx, strict=True)])))
    if strategy in ("columns", "best"):
        answers.append((rows([s[:, in_idx].sum(1) for s in exact]), in_idx))
    if strategy in ("independent", "best"):
        answers.append((out_idx, in_idx))

    def kept(out_idx: Sequence[Tensor], in_idx: Tensor) -> Tensor:
        parts = [s[o][:, in_idx].sum() for s, o in zip(exact, out_idx, strict=True)]
        return torch.stack(parts).sum()

    everything = torch.cat(row_sums).sum()
    total, *shares = torch.stack([everything, *(kept(*answer) for answer in answers)]).tolist()
    if not math.isfinite(total):
        raise ValueError(
            "score has entries that are not finite: did the loss overflow while profiling?"
        )
    return answers[shares.index(max(shares))]


def _check_size(what: str, n: int, size: int, group: int) -> None:
    if not 1 <= n <= size:
        raise ValueError(f"{what} must be between 1 and {size}, got {n}")
    if n < size and n % group:
        raise ValueError(f"{what} = {n} of {size} is not a multiple of group = {group}")


def _top(sums: Tensor, n: int, group: int) -> Tensor:
    """Sorted indices of the ``n`` largest of ``sums``, chosen in aligned runs of ``group``."""
    runs = sums[: len(sums) - len(sums) % group].view(-1, group).sum(1)
    chosen = runs.sort(descending=True, stable=True).indices[: n // group].sort().values
    return (chosen[:, None] * group + torch.arange(group, device=sums.device)).flatten()
