"""Operations on all layers of a model at once, as points: inputs, candidates, truth and least traffic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from losia_pro import dispatch, rounding

from . import traffic
from .points import LIBRARY, Candidate, Case, Point, Setting, judged
from .shapes import MODELS, SELECTIONS
from .timing import Call
from .traffic import Traffic

SEED = 5
DECAY = 1e-3  # a learning rate times a base_decay

Chosen = tuple[list[Tensor], list[Tensor], list[Tensor]]  # each layer's subnet, rows, columns


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


def lerp_(s: Setting, model: str, layers: int) -> Point:
    """A decay of the subnets of ``layers`` decoder layers at once, in bf16 and in fp32, towards a base in bf16."""
    whole = SELECTIONS[0]
    shapes = [(whole.n_out(o), whole.n_in(i)) for i, o in MODELS[model].linears() * layers]
    short, base = ([s.randn(*shape).to(torch.bfloat16) for shape in shapes] for _ in range(2))
    wide, towards = ([t.float() for t in kind] for kind in (short, base))
    expected = _stochastic([t + DECAY * (o - t) for t, o in zip(wide, towards, strict=True)])
    full = [torch.randn(*shape, device=s.device) for shape in shapes]

    def together(_: int) -> None:
        torch._foreach_lerp_(wide, towards, DECAY)

    def one_by_one(_: int) -> None:
        for t, o in zip(wide, base, strict=True):
            t.lerp_(o.float(), DECAY)

    def pull(_: int, on: list[Tensor], function: Callable[..., Any]) -> None:
        function(on, base, DECAY, rounding.key_of(SEED))

    def wrong_entries(function: Callable[..., Any]) -> float:
        mine = [t.clone() for t in short]
        pull(0, mine, function)
        return float(sum(int((t != e).sum()) for t, e in zip(mine, expected, strict=True)))

    def largest_error(function: Callable[..., Any]) -> float:
        """In units of what roundings to a part in 2^24 may add up to, so at most 1: of weight, difference and
        product, each of the product's size, with one more for what they do to each other, and of the sum."""
        mine = [t.clone() for t in full]
        pull(0, mine, function)
        worst = []
        for t, start, o in zip(mine, full, base, strict=True):
            product = DECAY * (o.double() - start.double())
            true = start + product
            unit = 2**-24 * (true.abs() + 4 * product.abs())
            worst.append(((t - true).abs() / unit).max())
        return float(torch.stack(worst).max())

    cases = []
    entries = sum(t.numel() for t in short)
    for name, start, library, what, check, allowed in (
        (whole.name, short, together, "lerp in fp32", wrong_entries, 0.0),
        (f"{whole.name}, fp32", full, one_by_one, "lerp_ of each, to its base in fp32", largest_error, 1.0),
    ):  # fmt: skip
        candidates = {LIBRARY: Candidate(library, 0.0)}
        for way in s.ways("lerp_", s.device):
            function = dispatch.function("lerp_", start[0], way.impl)
            call = functools.partial(pull, on=[t.clone() for t in start], function=function)
            candidates[way.name] = way.judged(call, functools.partial(check, function), allowed)
        key = {"op": "lerp_", "selection": name, "model": model, "layers": layers}
        least = traffic.lerp(entries, start[0].element_size(), base[0].element_size())
        cases.append(Case(key, what, least, candidates))
    return Point(1, cases, graphs=False)


POINTS: dict[str, Callable[[Setting, str, int], Point]] = {
    "write_back_": write_back_,
    "adamw_": adamw_,
    "lerp_": lerp_,
}
