"""The operations as points: inputs, candidates, truth and least traffic at one shape and number of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from losia_pro import reference
from losia_pro.profile import importance_dtype

from . import traffic
from .points import (
    LIBRARY,
    Case,
    Point,
    Setting,
    error,
    error_of,
    judged,
    sum_allowed,
    unequal,
)
from .shapes import Selection

BETA = 0.85
VARIANT = "taylor"


def gather_columns(s: Setting, into: int, _: int, tokens: int) -> Point:
    element = s.dtype.itemsize
    sets = s.sets(tokens * into * element)
    x = s.randn(sets, tokens, into)

    def library(i: int, idx: Tensor) -> Tensor:
        return x[i].index_select(1, idx)

    def ours(i: int, idx: Tensor, group: int, impl: str | None) -> Tensor:
        result: Tensor = torch.ops.losia_pro.gather_columns(x[i], idx, group=group, impl=impl)
        return result

    cases = []
    for selection in s.selections:
        idx, group, row = s.choose(selection, into, selection.in_factor)
        if not idx.numel():
            continue
        truth = x[0][:, idx]
        plain = functools.partial(library, idx=idx)
        candidates = {LIBRARY: judged(plain, functools.partial(unequal, plain, truth), 0.0)}
        for way in s.ways("gather_columns", s.device):
            call = functools.partial(ours, idx=idx, group=group, impl=way.impl)
            candidates[way.name] = way.judged(call, functools.partial(unequal, call, truth), 0.0)
        key = _key("gather_columns", selection, into, None, tokens, idx.numel(), None)
        least = traffic.gather_columns(tokens, row, idx.numel(), element)
        cases.append(Case(key, "index_select", least, candidates))
    return Point(sets, cases)


def subnet_grad(s: Setting, into: int, out: int, tokens: int) -> Point:
    element = s.dtype.itemsize
    sets = s.sets(tokens * out * element)
    dy = s.randn(sets, tokens, out)

    def library(i: int, x_sub: Tensor, idx: Tensor) -> Tensor:
        chosen = dy[i] if len(idx) == out else dy[i].index_select(1, idx)
        return chosen.T @ x_sub[i]

    def ours(i: int, x_sub: Tensor, idx: Tensor, group: int, impl: str | None) -> Tensor:
        result: Tensor = torch.ops.losia_pro.subnet_grad(
            dy[i], x_sub[i], idx, group=group, impl=impl
        )
        return result

    cases = []
    for selection in s.selections:
        idx, group, row = s.choose(selection, out, selection.out_factor)
        n_in, n_out = selection.n_in(into), idx.numel()
        if not n_in or not n_out:
            continue
        x_sub = s.randn(sets, tokens, n_in)
        truth = dy[0][:, idx].double().T @ x_sub[0].double()
        plain = functools.partial(library, x_sub=x_sub, idx=idx)
        check = functools.partial(error_of, plain, truth)
        candidates = {LIBRARY: judged(plain, check, sum_allowed(tokens, s.dtype))}
        # At most twice PyTorch's own error, and in fp32 never rounded to the operands' dtype on the way.
        rounding = error(truth.to(s.dtype), truth)
        allowed = 2 * error(plain(0), truth) if s.dtype == torch.float32 else rounding / 2
        for way in s.ways("subnet_grad", s.device):
            call = functools.partial(ours, x_sub=x_sub, idx=idx, group=group, impl=way.impl)
            check = functools.partial(error_of, call, truth)
            candidates[way.name] = way.judged(call, check, allowed)
        key = _key("subnet_grad", selection, into, out, tokens, n_in, n_out)
        least = traffic.subnet_grad(tokens, row, n_out, n_in, element)
        plain_name = "matmul" if n_out == out else "index_select + matmul"
        cases.append(Case(key, plain_name, least, candidates))
    return Point(sets, cases)


def importance_update_(s: Setting, into: int, out: int, tokens: int) -> Point:
    element, score = s.dtype.itemsize, importance_dtype(s.dtype)
    sets = s.sets(tokens * (out + into) * element + out * into * (element + 2 * score.itemsize))
    dy, x = s.randn(sets, tokens, out), s.randn(sets, tokens, into)
    weight = 0.02 * s.randn(sets, out, into)
    importance, uncertainty = (
        torch.rand(sets, out, into, device=s.device, dtype=score) for _ in range(2)
    )

    def library(i: int) -> Tensor:
        return dy[i].T @ x[i]

    def update(i: int, impl: str | None, to: tuple[Tensor, Tensor]) -> None:
        torch.ops.losia_pro.importance_update_(
            *to, weight[i], dy[i], x[i], None, BETA, BETA, VARIANT, impl=impl
        )

    def ours(i: int, impl: str | None) -> None:
        update(i, impl, (importance[i], uncertainty[i]))

    gradient = dy[0].double().T @ x[0].double()
    check = functools.partial(error_of, library, gradient)
    candidates = {LIBRARY: judged(library, check, sum_allowed(tokens, s.dtype))}
    current = reference.importance(gradient, weight[0].double(), VARIANT)
    del gradient
    true_i = BETA * importance[0].double() + (1 - BETA) * current
    true_u = BETA * uncertainty[0].double() + (1 - BETA) * (current - true_i).abs()
    del current

    def update_error(impl: str | None) -> float:
        to = importance[0].clone(), uncertainty[0].clone()
        update(0, impl, to)
        return max(error(to[0], true_i), error(to[1], true_u))

    own = update_error("torch")
    for way in s.ways("importance_update_", s.device):
        # Squaring g doubles its error, and the second term of the importance may outweigh the first.
        allowed = 4 * sum_allowed(tokens, score) if way.impl == "torch" else 2 * own
        call = functools.partial(ours, impl=way.impl)
        check = functools.partial(update_error, way.impl)
        candidates[way.name] = way.judged(call, check, allowed)
    key = _key("importance_update_", None, into, out, tokens, into, out)
    least = traffic.importance_update(tokens, out, into, element, score.itemsize)
    return Point(sets, [Case(key, "dense dy^T x alone", least, candidates)])


POINTS: dict[str, Callable[[Setting, int, int, int], Point]] = {
    "gather_columns": gather_columns,
    "subnet_grad": subnet_grad,
    "importance_update_": importance_update_,
}


def shapes_of(op: str, linears: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The ``(in, out)`` at which an operation differs: a gather knows nothing of the outputs."""
    seen = set()
    for into, out in linears:
        key = into if op == "gather_columns" else (into, out)
        if key not in seen:
            seen.add(key)
            yield into, out


def _key(
    op: str, selection: Selection | None, into: int, out: int | None, tokens: int, n_in: int, n_out: int | None
) -> dict[str, Any]:  # fmt: skip
    name = selection.name if selection else "whole"
    return {
        "op": op, "selection": name, "in": into, "out": out, "tokens": tokens, "n_in": n_in, "n_out": n_out,
    }  # fmt: skip
