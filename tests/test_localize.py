"""Localization is the best of the three greedy answers, found again here by brute force over the sums."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losia_pro import localize, reference

STRATEGIES = ("rows", "columns", "independent")


def heaviest(sums: list[int], n: int, group: int) -> list[int]:
    """Of all ways to take ``n`` lines in aligned and whole runs, the one of largest sum; the first such in
    lexicographic order."""
    if n == len(sums):
        return list(range(n))
    ways = combinations(range(len(sums) // group), n // group)
    lines = ([r * group + i for r in runs for i in range(group)] for runs in ways)
    return max(lines, key=lambda chosen: sum(sums[i] for i in chosen))


def brute_force(score, n_out, n_in, strategy="best", group=1):
    """``score`` is a list of rows of integers, so that every sum is exact."""
    every_row, every_column = range(len(score)), range(len(score[0]))

    def rows(columns):
        return heaviest([sum(score[i][j] for j in columns) for i in every_row], n_out, group)

    def columns(rows):
        return heaviest([sum(score[i][j] for i in rows) for j in every_column], n_in, group)

    answers = {
        "rows": (rows(every_column), columns(rows(every_column))),
        "columns": (rows(columns(every_row)), columns(every_row)),
        "independent": (rows(every_column), columns(every_row)),
    }
    if strategy != "best":
        return answers[strategy]
    return max(answers.values(), key=lambda a: sum(score[i][j] for i in a[0] for j in a[1]))


def as_lists(answer):
    return tuple(idx.tolist() for idx in answer)


@st.composite
def cases(draw, group=1, largest=3):
    """A small matrix of integers, most of them equal to others, and sizes that fit the group."""
    runs = 6 if group == 1 else 4
    out, into = (draw(st.integers(group, runs * group)) for _ in "oi")
    n_out, n_in = (draw(st.integers(1, size // group)) * group for size in (out, into))
    row = st.lists(st.integers(0, largest), min_size=into, max_size=into)
    return draw(st.lists(row, min_size=out, max_size=out)), n_out, n_in


@given(cases())
def test_small_cases_equal_brute_force(case):
    """Ties are the rule in these; each strategy and the best of them, here and in the reference."""
    score, n_out, n_in = case
    matrix = torch.tensor(score, dtype=torch.float32)
    for strategy in (*STRATEGIES, "best"):
        expected = brute_force(score, n_out, n_in, strategy)
        assert as_lists(localize(matrix, n_out, n_in, strategy)) == expected
    slow = {
        "rows": reference.select_rows_first,
        "columns": reference.select_columns_first,
        "independent": reference.select_independent,
        "best": reference.select_best,
    }
    for strategy, select in slow.items():
        expected = brute_force(score, n_out, n_in, strategy)
        assert as_lists(select(matrix, n_out, n_in)) == expected


@given(cases(largest=10_000))
def test_small_cases_with_few_ties_equal_brute_force(case):
    score, n_out, n_in = case
    matrix = torch.tensor(score, dtype=torch.float64)
    assert as_lists(localize(matrix, n_out, n_in)) == brute_force(score, n_out, n_in)


@given(st.sampled_from([2, 3]).flatmap(lambda g: st.tuples(st.just(g), cases(group=g))))
def test_groups_of_neurons_equal_brute_force_over_aligned_runs(case):
    group, (score, n_out, n_in) = case
    matrix = torch.tensor(score, dtype=torch.float32)
    for strategy in (*STRATEGIES, "best"):
        expected = brute_force(score, n_out, n_in, strategy, group)
        assert as_lists(localize(matrix, n_out, n_in, strategy, group)) == expected


def test_neurons_that_fill_no_run_are_never_chosen():
    score = torch.zeros(7, 8)
    score[6], score[:, 5] = 9, 1
    assert as_lists(localize(score, 3, 3, group=3)) == ([0, 1, 2], [3, 4, 5])
    assert as_lists(localize(score, 1, 1)) == ([6], [0])


WHOLE = {"rows": (5, 8, 5, 4, 4), "columns": (8, 7, 4, 7, 2), "both": (5, 7, 5, 7, 3)}


@pytest.mark.parametrize(("out", "into", "n_out", "n_in", "group"), WHOLE.values(), ids=WHOLE)
def test_a_side_wanted_whole_is_exempt_from_the_group(out, into, n_out, n_in, group):
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(5, (out, into), generator=generator)
    for strategy in (*STRATEGIES, "best"):
        expected = brute_force(score.tolist(), n_out, n_in, strategy, group)
        assert as_lists(localize(score.float(), n_out, n_in, strategy, group)) == expected


CORNERS = [(1, 1), (1, 40), (24, 1), (24, 40), (3, 5), (23, 39)]


@pytest.mark.parametrize(("n_out", "n_in"), CORNERS)
def test_indices_are_sorted_distinct_int64_of_the_sizes_asked(n_out, n_in):
    score = torch.rand(24, 40, generator=torch.Generator().manual_seed(1))
    for strategy in (*STRATEGIES, "best"):
        for idx, n in zip(localize(score, n_out, n_in, strategy), (n_out, n_in), strict=True):
            assert idx.dtype == torch.int64 and idx.shape == (n,)
            assert bool((idx[1:] > idx[:-1]).all())


def layouts(score):
    """The same matrix, differently in memory."""
    yield "transposed", score.t().contiguous().t()
    wide = torch.full((score.shape[0], 3 * score.shape[1] + 1), float("nan"), dtype=score.dtype)
    wide[:, 1::3] = score
    yield "strided", wide[:, 1::3]
    tall = torch.full((2 * score.shape[0], score.shape[1]), float("nan"), dtype=score.dtype)
    tall[::2] = score
    yield "every second row", tall[::2]
    yield "copy", score.clone()


@pytest.mark.parametrize("kind", ["many ties", "one value", "sums that round"])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "best"])
def test_the_answer_does_not_depend_on_memory_layout(kind, strategy):
    generator = torch.Generator().manual_seed(2)
    score = {
        "many ties": torch.randint(3, (48, 80), generator=generator).float(),
        "one value": torch.ones(48, 80),
        # each row and column holds the same entries in another order: only rounding tells the sums apart
        "sums that round": torch.rand(80, generator=generator, dtype=torch.float64).repeat(48, 1),
    }[kind]
    if kind == "sums that round":
        score = torch.stack([row.roll(i) for i, row in enumerate(score)])
    expected = as_lists(localize(score, 6, 10, strategy))
    for name, other in layouts(score):
        assert torch.equal(other, score)
        assert as_lists(localize(other, 6, 10, strategy)) == expected, name


def test_among_equals_the_lowest_indices_win():
    assert as_lists(localize(torch.ones(8, 9), 3, 4)) == ([0, 1, 2], [0, 1, 2, 3])
    assert as_lists(localize(torch.ones(8, 9), 2, 3, group=1)) == ([0, 1], [0, 1, 2])
    assert as_lists(localize(torch.zeros(8, 8), 4, 2, group=2)) == ([0, 1, 2, 3], [0, 1])


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float32, 2.0**24), (torch.bfloat16, 2.0**8)], ids=str
)
def test_small_scores_beside_a_large_one_still_count(dtype, large):
    """In the score's own precision both rows would have the sum ``large``, and the first would win."""
    score = torch.tensor([[large, 0, 0], [large, 1, 0]], dtype=dtype)
    assert localize(score, 1, 1, "rows")[0].tolist() == [1]
    assert localize(score.t(), 1, 1, "columns")[1].tolist() == [1]


def test_best_takes_whichever_strategy_keeps_most():
    """One matrix for each: the two others keep less of it."""
    heavy_row_misleads = [[4, 4, 4, 4], [9, 0, 0, 0], [9, 0, 0, 0], [0, 0, 0, 0]]
    heavy_column_misleads = [list(column) for column in zip(*heavy_row_misleads, strict=True)]
    winners = []
    for score in (heavy_row_misleads, heavy_column_misleads):
        matrix = torch.tensor(score, dtype=torch.float32)
        keep = {s: float(reference.kept(matrix, *localize(matrix, 1, 1, s))) for s in STRATEGIES}
        best = float(reference.kept(matrix, *localize(matrix, 1, 1)))
        assert best == max(keep.values()) and min(keep.values()) < best
        winners.append({s for s in STRATEGIES if keep[s] == best})
    assert winners == [{"columns"}, {"rows"}]


@given(cases(largest=9))
def test_no_selection_keeps_more_than_exhaustive_search(case):
    """And what "best" keeps is at least the share that the sizes would give at random."""
    score, n_out, n_in = case
    matrix = torch.tensor(score, dtype=torch.float64)
    best = float(reference.kept(matrix, *localize(matrix, n_out, n_in)))
    exact = max(
        sum(score[i][j] for i in rows for j in columns)
        for rows in combinations(range(len(score)), n_out)
        for columns in combinations(range(len(score[0])), n_in)
    )
    at_random = matrix.sum() * n_out * n_in / matrix.numel()
    assert float(at_random) * (1 - 1e-12) <= best <= exact


BAD = {
    "three-dimensional": ((torch.ones(2, 3, 4), 1, 1), r"matrix \(out, in\), got torch.float32 \(2, 3, 4\)"),
    "vector": ((torch.ones(3), 1, 1), r"matrix \(out, in\)"),
    "integers": ((torch.ones(3, 3, dtype=torch.int64), 1, 1), "floating-point matrix .* got torch.int64"),
    "no rows": ((torch.ones(3, 4), 0, 1), "n_out must be between 1 and 3, got 0"),
    "too many rows": ((torch.ones(3, 4), 4, 1), "n_out must be between 1 and 3, got 4"),
    "no columns": ((torch.ones(3, 4), 1, 0), "n_in must be between 1 and 4, got 0"),
    "negative columns": ((torch.ones(3, 4), 1, -2), "n_in must be between 1 and 4, got -2"),
    "empty": ((torch.ones(0, 4), 1, 1), "n_out must be between 1 and 0, got 1"),
    "strategy": ((torch.ones(3, 4), 1, 1, "greedy"), "strategy 'greedy' is unknown; use one of"),
    "group 0": ((torch.ones(4, 4), 2, 2, "best", 0), "group must be >= 1, got 0"),
    "rows off group": ((torch.ones(4, 4), 3, 2, "best", 2), "n_out = 3 of 4 is not a multiple of group = 2"),
    "columns off group": ((torch.ones(4, 6), 2, 3, "best", 2), "n_in = 3 of 6 is not a multiple"),
    "off group and odd": ((torch.ones(5, 4), 3, 2, "best", 2), "n_out = 3 of 5 is not a multiple"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        localize(*arguments)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "inf -inf"])
@pytest.mark.parametrize("at", [(0, 0), (2, 5), (3, 2)])
def test_a_score_that_is_not_finite_is_refused_wherever_it_is(value, at):
    score = torch.rand(4, 6, generator=torch.Generator().manual_seed(3))
    for k, v in enumerate(value.split()):
        score[at[0], (at[1] + k) % 6] = float(v)
    for strategy in (*STRATEGIES, "best"):
        with pytest.raises(ValueError, match="not finite: did the loss overflow"):
            localize(score, 1, 1, strategy)
