"""The reference's equations against formulations that share nothing with them: scalars, closed forms,
autograd, exact arithmetic."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from losia_pro import reference as ref

EPS = 2.0**-52
reals = st.floats(-8, 8, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-3)


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(g=reals, w=reals)
def test_importance_is_the_scalar_formula(g, w):
    """The quadratic model of the loss around ``w``, ``q(d) = g d + 1/2 g^2 d^2``, at ``d = -w``."""
    change = g * -w + 0.5 * g * g * (-w) ** 2
    expected = {"taylor": abs(change), "first": abs(g * w), "second": g * g * w * w}
    for variant, value in expected.items():
        result = ref.importance(f64([[g]]), f64([[w]]), variant)
        # six roundings, each of a term that is at most |gw| + (gw)^2
        assert abs(result.item() - value) <= 6 * EPS * (abs(g * w) + (g * w) ** 2), variant


def test_importance_keeps_shape_and_promoted_dtype():
    g, w = torch.randn(3, 5), torch.randn(3, 5).bfloat16()
    for variant in ref.VARIANTS:
        result = ref.importance(g, w, variant)
        assert result.shape == (3, 5) and result.dtype == torch.float32
        assert bool((result >= 0).all())


histories = st.lists(st.floats(0, 10), min_size=1, max_size=12)
betas = st.floats(0, 0.99)


@given(importances=histories, beta1=betas, beta2=betas)
def test_smoothing_and_uncertainty_are_weighted_sums_of_the_past(importances, beta1, beta2):
    """Unrolled: the value ``k`` steps ago weighs ``(1 - b) b^k``."""

    def weighted(values, beta):
        n = len(values)
        return math.fsum((1 - beta) * beta ** (n - 1 - k) * v for k, v in enumerate(values))

    smoothed = uncertain = f64(0.0)
    deviations = []
    for n, current in enumerate(importances, 1):
        smoothed = ref.smooth(smoothed, f64(current), beta1)
        uncertain = ref.uncertainty(uncertain, f64(current), smoothed, beta2)
        expected = weighted(importances[:n], beta1)
        deviations.append(abs(current - expected))
        # each of the n steps rounds a few times a value of at most 10
        assert abs(float(smoothed) - expected) <= 100 * n * EPS
        assert abs(float(uncertain) - weighted(deviations, beta2)) <= 200 * n * EPS


def test_the_papers_smoothing_factors_are_the_defaults():
    one = f64(1.0)
    assert float(ref.smooth(one * 0, one)) == pytest.approx(0.15)
    assert float(ref.smooth(one, one * 0)) == pytest.approx(0.85)
    assert float(ref.uncertainty(one * 0, one, one * 0)) == pytest.approx(0.15)
    assert float(ref.uncertainty(one, one, one)) == pytest.approx(0.85)


def test_score_is_the_product_or_a_factor():
    i, u = f64([[1.0, 2.0], [0.0, 4.0]]), f64([[3.0, 0.5], [7.0, 0.0]])
    assert ref.score(i, u).tolist() == [[3.0, 1.0], [0.0, 0.0]]
    assert ref.score(i, u, "iu").tolist() == [[3.0, 1.0], [0.0, 0.0]]
    assert ref.score(i, u, "i").tolist() == i.tolist()
    assert ref.score(i, u, "u").tolist() == u.tolist()


def test_unknown_variants_and_scores_are_refused():
    one = f64([[1.0]])
    with pytest.raises(ValueError, match="variant 'third' is unknown; use one of .*taylor"):
        ref.importance(one, one, "third")
    with pytest.raises(ValueError, match="kind 'ui' is unknown; use one of .*iu"):
        ref.score(one, one, "ui")


def test_the_greedy_answers_of_a_matrix_worked_by_hand():
    score = f64(
        [
            [5, 0, 1],  # 6
            [0, 4, 3],  # 7
            [5, 0, 0],  # 5
        ]
        # 10 4 4
    )

    def lists(answer):
        return tuple(idx.tolist() for idx in answer)

    assert lists(ref.select_rows_first(score, 1, 1)) == ([1], [1])  # row 1, its largest: 4
    assert lists(ref.select_columns_first(score, 1, 1)) == ([0], [0])  # column 0, the first 5
    assert lists(ref.select_independent(score, 1, 1)) == ([1], [0])  # keeps 0
    assert lists(ref.select_best(score, 1, 1)) == ([0], [0])
    assert float(ref.kept(score, f64([0, 2]).long(), f64([0, 2]).long())) == 11.0


@st.composite
def layers(draw):
    """Integers in fp64, so that every product and sum is exact."""
    tokens, out, into = (draw(st.integers(1, 4)) for _ in range(3))
    small = st.integers(-4, 4)

    def matrix(rows, columns):
        row = st.lists(small, min_size=columns, max_size=columns)
        return f64(draw(st.lists(row, min_size=rows, max_size=rows)))

    def subset(n):
        return torch.tensor(sorted(draw(st.sets(st.integers(0, n - 1), min_size=1))))

    return matrix(tokens, into), matrix(tokens, out), matrix(out, into), subset(out), subset(into)


@given(layers())
def test_forward_and_backward_are_sums_over_tokens_and_autograds(case):
    x, dy, weight, out_idx, in_idx = case
    tokens, (out, into) = range(len(x)), map(range, weight.shape)
    bias = torch.arange(weight.shape[0], dtype=torch.float64)
    y = ref.forward(x, weight, bias)
    for t, o in itertools.product(tokens, out):
        assert float(y[t, o]) == float(bias[o]) + sum(float(x[t, i] * weight[o, i]) for i in into)

    leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, bias)]
    nn.functional.linear(*leaves).backward(dy)
    dx, d_subnet, db = ref.backward(dy, x, weight, out_idx, in_idx)
    assert torch.equal(dx, leaves[0].grad) and torch.equal(db, leaves[2].grad)
    assert torch.equal(ref.dense_gradient(dy, x), leaves[1].grad)
    for a, o in enumerate(out_idx):
        for b, i in enumerate(in_idx):
            assert float(d_subnet[a, b]) == sum(float(dy[t, o] * x[t, i]) for t in tokens)


@given(layers())
def test_a_mask_marks_the_block_and_nothing_else(case):
    _, _, weight, out_idx, in_idx = case
    mask = ref.mask(weight.bfloat16(), out_idx, in_idx)
    assert mask.dtype == torch.bfloat16 and mask.shape == weight.shape
    for o, i in itertools.product(*map(range, weight.shape)):
        assert float(mask[o, i]) == (o in out_idx.tolist() and i in in_idx.tolist())


@given(case=layers(), power=st.integers(0, 4))
def test_error_bound_holds_for_a_real_step_on_part_of_the_entries(case, power):
    """In exact arithmetic: integers, a rate of ``2^-power``; so the inequality is tested without slack."""
    x, dy, weight, out_idx, in_idx = case
    lr = 2.0**-power
    part = ref.mask(weight, out_idx, in_idx)

    def stepped(mask):
        w = nn.Parameter(weight.clone())
        nn.functional.linear(x, w).backward(dy)
        optimizer = torch.optim.SGD([w], lr=lr)
        ref.masked_dense_step([w], [mask], optimizer)
        return w.detach()

    lost = x @ (stepped(torch.ones_like(weight)) - stepped(part)).T
    measured = float(lost.square().sum()) / len(x)
    grad = ref.dense_gradient(dy, x)
    bound = float(ref.error_bound(lr, grad, part, x))
    # The mean over tokens is rounded on each side, once and twice.
    assert measured <= bound * (1 + 4 * EPS)
    missed = float(((1 - part) * grad).square().sum())
    assert bound == pytest.approx(lr**2 * missed * float(x.square().sum()) / len(x), rel=1e-15)


def test_error_bound_is_reached_by_a_single_token():
    """One token: what was missed of each row is parallel to ``x`` if whole rows are left out."""
    x, grad = f64([[3.0, 4.0]]), f64([[3.0, 4.0], [6.0, 8.0], [1.0, 2.0]])
    trained = ref.mask(grad, torch.tensor([2]), torch.tensor([0, 1]))
    lost = 0.5 * ((1 - trained) * grad) @ x.T
    assert float(ref.error_bound(0.5, grad, trained, x)) == float(lost.square().sum()) > 0
    everything = torch.ones_like(grad)
    assert float(ref.error_bound(0.5, grad, everything, x)) == 0.0


def test_masked_dense_step_moves_the_masked_entries_as_the_optimizer_would_and_no_others():
    """With momentum and decay, and a mask that moves: what left the mask stands still, momentum and all."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    buffer = torch.zeros_like(weight)
    first = ref.mask(weight.detach(), torch.tensor([0, 1]), torch.tensor([0, 1, 2]))
    second = ref.mask(weight.detach(), torch.tensor([1, 3]), torch.tensor([2, 5]))
    for mask in (first, first, second, second):
        grad = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        before, weight.grad = weight.detach().clone(), grad.clone()
        ref.masked_dense_step([weight], [mask], optimizer)
        buffer = 0.9 * buffer + grad * mask + 0.1 * before  # SGD's own equations, entry by entry
        inside = mask.bool()
        expected = before - 0.1 * buffer
        torch.testing.assert_close(weight[inside], expected[inside], rtol=1e-14, atol=1e-15)
        assert torch.equal(weight[~inside], before[~inside])
        assert not torch.equal(weight[inside], before[inside])


def test_rewarming_goes_from_one_period_th_to_one_and_stays_within_bounds():
    assert [ref.rewarm_factor(t, 8, 4) for t in range(6, 16)] == [
        0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1,
    ]  # fmt: skip
    assert ref.rewarm_factor(9, 8, 1) == 1.0
