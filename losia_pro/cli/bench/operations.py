"""The operations as points: inputs, candidates, truth and least traffic at one shape and number of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from losia_pro import dispatch, reference, rounding
from losia_pro.profile import importance_dtype

from . import traffic
from .points import (
    LIBRARY,
    Candidate,
    Case,
    Point,
    Setting,
    error,
    error_of,
    judged,
    sum_allowed,
    unequal,
)
from .shapes import MODELS, SELECTIONS, Selection
from .timing import Call
from .traffic import Traffic

BETA = 0.85
VARIANT = "taylor"
SEED = 5

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


def write_back_(s: Setting, model: str, layers: int) -> Point:
    """All linears of ``layers`` decoder layers at once."""
    shapes = MODELS[model].linears() * layers
    weights = [torch.empty(o, i, device=s.device, dtype=s.dtype) for i, o in shapes]
    marker = -1.0  # no subnet holds it

    def library(_: int, chosen: Chosen) -> None:
        for w, value, r, c in zip(weights, *chosen, strict=True):
            w.index_put_((r[:, None], c), value.to(w.dtype))

    def ours(_: int, chosen: Chosen, impl: str | None, seed: int | None = None) -> None:
        torch.ops.losia_pro.write_back_(weights, *chosen, seed=seed, impl=impl)

    def wrong_entries(call: Call, chosen: Chosen, rounded: list[Tensor]) -> float:
        for w in weights:
            w.fill_(marker)
        call(0)
        wrong = 0
        for w, value, r, c in zip(weights, rounded, *chosen[1:], strict=True):
            block = w.index_select(0, r).index_select(1, c)
            wrong += int((block != value).sum())
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
        nearest = [value.to(s.dtype) for value in subnets]
        ways: list[tuple[str, int | None, list[Tensor]]] = [(selection.name, None, nearest)]
        if selection is SELECTIONS[0] and s.dtype == torch.bfloat16:
            ways.append((f"{selection.name}, stochastic", SEED, _stochastic(subnets)))
        for name, seed, rounded in ways:
            candidates = {}
            if seed is None:
                plain = functools.partial(library, chosen=chosen)
                check = functools.partial(wrong_entries, plain, chosen, rounded)
                candidates[LIBRARY] = judged(plain, check, 0.0)
            for way in s.ways("write_back_", s.device):
                call = functools.partial(ours, chosen=chosen, impl=way.impl, seed=seed)
                check = functools.partial(wrong_entries, call, chosen, rounded)
                candidates[way.name] = way.judged(call, check, 0.0)
            key = {"op": "write_back_", "selection": name, "model": model, "layers": layers}
            cases.append(Case(key, "index_put_ for each layer", Traffic(moved, 0), candidates))
    return Point(1, cases, graphs=False)


def _stochastic(subnets: list[Tensor]) -> list[Tensor]:
    """What a write-back with SEED writes."""
    rounded, first = [], 0
    for value in subnets:
        random = rounding.noise(rounding.numbers_of(value, first), rounding.key_of(SEED))
        rounded.append(rounding.to_bf16(value, random))
        first += value.numel()
    return rounded


def adamw_(s: Setting, model: str, layers: int) -> Point:
    """A step on the bf16 subnets of ``layers`` decoder layers at once; the library's is PyTorch's own on fp32."""
    whole = SELECTIONS[0]
    shapes = [(whole.n_out(o), whole.n_in(i)) for i, o in MODELS[model].linears() * layers]
    constants: dict[str, Any] = {
        "beta1": 0.9,
        "beta2": 0.9,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "maximize": False,
    }
    start = [[s.randn(*shape).to(torch.bfloat16) for shape in shapes] for _ in range(3)]
    start.append([4 * t.square() for t in start[1]])  # so far from rest that every moment moves
    steps, keys = [3] * len(shapes), [rounding.key_of(SEED, k) for k in range(len(shapes))]

    def step(_: int, on: list[list[Tensor]], function: Callable[..., Any]) -> None:
        function(*on, steps, keys, lr=1e-3, **constants)

    def library(_: int) -> None:
        p, g, m, v = wide
        counts = [torch.full((), 2.0, device=s.device) for _ in p]
        adamw(p, g, m, v, [], counts, fused=fused, amsgrad=False, lr=1e-3, **constants)

    fused = s.device.type == "cuda"
    wide = [[t.float() for t in kind] for kind in start]
    library(0)
    truth = [torch.cat([t.flatten() for t in kind]) for kind in wide]
    before = [torch.cat([t.flatten() for t in kind]).float() for kind in start]

    def check(function: Callable[..., Any]) -> float:
        """The largest error, in units of bf16 and 16 units of fp32 of the terms, which may cancel: at most 1."""
        mine = [[t.clone() for t in kind] for kind in start]
        step(0, mine, function)
        worst = []
        grads = before[1].abs()
        for kind, last, true in zip(mine, before, truth, strict=True):
            unit = true.abs().frexp().exponent.float().sub(8).exp2()
            unit += 16 * 2**-24 * (last.abs() + grads + true.abs())
            got = torch.cat([t.flatten() for t in kind]).float()
            worst.append(((got - true).abs() / unit).max())
        return float(torch.stack(worst).max())

    candidates = {LIBRARY: Candidate(library, 0.0)}
    for way in s.ways("adamw_", s.device):
        function = dispatch.function("adamw_", start[0][0], way.impl)
        call = functools.partial(step, on=start, function=function)
        candidates[way.name] = way.judged(call, functools.partial(check, function), 1.0)
    key = {"op": "adamw_", "selection": whole.name, "model": model, "layers": layers}
    least = traffic.adamw(sum(t.numel() for t in start[0]))
    return Point(1, [Case(key, "AdamW in fp32, fused on a GPU", least, candidates)], graphs=False)


MODEL_POINTS: dict[str, Callable[[Setting, str, int], Point]] = {
    "write_back_": write_back_,
    "adamw_": adamw_,
}


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
