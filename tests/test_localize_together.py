"""Localization of linears that share their inputs."""

from __future__ import annotations

import pytest
import torch

from losia_pro.localize import localize_together


@pytest.mark.parametrize("strategy", ["best", "rows", "columns", "independent"])
@pytest.mark.parametrize("group", [1, 2])
def test_localizing_together_keeps_the_best_columns_for_all(strategy, group):
    """By the definition, written out: quotas of rows, columns by the sums over all scores."""
    g = torch.Generator().manual_seed(3)
    scores = [torch.rand(n, 8, generator=g) for n in (6, 4, 10)]
    n_out, n_in = [2, 4, 4], 4

    def top(sums, n):
        runs = sums.view(-1, group).sum(1)
        best = sorted(range(len(runs)), key=lambda i: (-float(runs[i]), i))[: n // group]
        return sorted(i * group + j for i in best for j in range(group))

    every = [list(range(len(s))) for s in scores]
    wide = list(range(8))
    d = [s.double() for s in scores]

    def rows(columns):
        return [
            top(s[:, columns].sum(1), n) if n < len(s) else list(range(n))
            for s, n in zip(d, n_out, strict=True)
        ]

    def columns(rows):
        return top(torch.stack([s[r].sum(0) for s, r in zip(d, rows, strict=True)]).sum(0), n_in)

    answers = {
        "rows": (rows(wide), columns(rows(wide))),
        "columns": (rows(columns(every)), columns(every)),
        "independent": (rows(wide), columns(every)),
    }
    kept = {
        k: sum(float(s[r][:, c].sum()) for s, r in zip(d, rs, strict=True))
        for k, (rs, c) in answers.items()
    }
    expected = answers[max(kept, key=kept.get) if strategy == "best" else strategy]
    out_idx, in_idx = localize_together(scores, n_out, n_in, strategy, group)
    assert ([o.tolist() for o in out_idx], in_idx.tolist()) == expected
