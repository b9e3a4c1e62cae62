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
    implementations,
    judged,
    sum_allowed,
    unequal,
)
from .shapes import MODELS, SELECTIONS, Selection
from .timing import Call
from .traffic import Traffic

BETA = 0.85
VARIANT = "taylor"

Chosen = tuple[list[Tensor], list[Tensor], list[Tensor]]  # each layer's subnet, rows, columns


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
    for selection in SELECTIONS:
        idx, group, row = s.choose(selection, into, selection.in_factor)
        if not idx.numel():
            continue
        truth = x[0][:, idx]
        calls: dict[str, Call] = {LIBRARY: functools.partial(library, idx=idx)}
        for name, impl in implementations("gather_columns", s.device):
            calls[name] = functools.partial(ours, idx=idx, group=group, impl=impl)
        candidates = {}
        for name, call in calls.items():
            check = functools.partial(unequal, call, truth)
            candidates[name] = judged(call, check, 0.0)
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
    for selection in SELECTIONS:
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
        for name, impl in implementations("subnet_grad", s.device):
            call = functools.partial(ours, x_sub=x_sub, idx=idx, group=group, impl=impl)
            candidates[name] = judged(call, functools.partial(error_of, call, truth), allowed)
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
    for name, impl in implementations("importance_update_", s.device):
        # Squaring g doubles its error, and the second term of the importance may outweigh the first.
        allowed = 4 * sum_allowed(tokens, score) if impl == "torch" else 2 * own
        call = functools.partial(ours, impl=impl)
        candidates[name] = judged(call, functools.partial(update_error, impl), allowed)
    key = _key("importance_update_", None, into, out, tokens, into, out)
    least = traffic.importance_update(tokens, out, into, element, score.itemsize)
    return Point(sets, [Case(key, "dense dy^T x alone", least, candidates)])


def write_back_(s: Setting, model: str, layers: int) -> Point:
    """All linears of ``layers`` decoder layers at once."""
    shapes = MODELS[model].linears() * layers
    weights = [torch.empty(o, i, device=s.device, dtype=s.dtype) for i, o in shapes]
    marker = -1.0  # no subnet holds it

    def library(_: int, chosen: Chosen) -> None:
        for w, value, r, c in zip(weights, *chosen, strict=True):
            w.index_put_((r[:, None], c), value.to(w.dtype))

    def ours(_: int, chosen: Chosen, impl: str | None) -> None:
        torch.ops.losia_pro.write_back_(weights, *chosen, impl=impl)

    def wrong_entries(call: Call, chosen: Chosen) -> float:
        for w in weights:
            w.fill_(marker)
        call(0)
        wrong = 0
        for w, value, r, c in zip(weights, *chosen, strict=True):
            block = w.index_select(0, r).index_select(1, c)
            wrong += int((block != value.to(w.dtype)).sum())
            wrong += abs(int((w != marker).sum()) - value.numel())
        return float(wrong)

    cases = []
    for selection in SELECTIONS:
        rows, columns, subnets, moved = [], [], [], 0.0
        for into, out in shapes:
            r, _, _ = s.choose(selection, out, selection.out_factor)
            c, _, row = s.choose(selection, into, selection.in_factor)
            rows.append(r)
            columns.append(c)
            subnets.append(torch.rand(len(r), len(c), device=s.device))
            moved += traffic.write_back(row, len(r), len(c), 4).bytes
        chosen = subnets, rows, columns
        calls: dict[str, Call] = {LIBRARY: functools.partial(library, chosen=chosen)}
        for name, impl in implementations("write_back_", s.device):
            calls[name] = functools.partial(ours, chosen=chosen, impl=impl)
        candidates = {}
        for name, call in calls.items():
            check = functools.partial(wrong_entries, call, chosen)
            candidates[name] = judged(call, check, 0.0)
        key = {"op": "write_back_", "selection": selection.name, "model": model, "layers": layers}
        cases.append(Case(key, "index_put_ for each layer", Traffic(moved, 0), candidates))
    return Point(1, cases, graphs=False)


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
