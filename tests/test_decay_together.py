"""Decay of many subnets at once: which go in one call, towards what, and in which dtype."""

from __future__ import annotations

import pytest
import torch
import toys

import losia_pro
from losia_pro import LosiaConfig, decay, dispatch, optim, rewarm
from losia_pro.tables import LERPS

DECAY = 0.5
WIDE = LosiaConfig(rank_factor=1 / 4, output_factor=1 / 2, base_decay=DECAY)
SHORT = LosiaConfig(**{**WIDE.to_dict(), "subnet_dtype": "bfloat16"})
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def one_away(config, was=torch.bfloat16, now=torch.bfloat16):
    """A model in one dtype, cast to another, whose subnets are 1 away from their base; gradients are 0; and its
    optimizer, of two rates."""
    model = toys.stack(was)
    losia = losia_pro.attach(model, config)
    model.to(now)
    first, *middle, last = (m.subnet for m in losia.modules.values())
    rates = {0.03: [last, first], 0.1: middle}
    optimizer = optim.AdamW([{"params": ps, "lr": lr} for lr, ps in rates.items()], weight_decay=0)
    losia.bind(optimizer)
    with torch.no_grad():
        for p in losia.parameters():
            p.grad = torch.zeros_like(p)
            p.add_(1)
    return losia, optimizer


def decayed_in_double(losia, optimizer):
    """Each at its group's own rate, and those without a gradient not at all."""
    ends = {}
    for name, m in losia.modules.items():
        lr = next(
            g["lr"] for g in optimizer.param_groups if any(p is m.subnet for p in g["params"])
        )
        start = m.subnet.detach().double()
        pulled = lr * DECAY * (start - losia._anchors.of(m).double())
        ends[name] = start - (pulled if m.subnet.grad is not None else 0)
    return ends


def calls_of_lerp(monkeypatch):
    """The tensors of each call, from here on."""
    calls, chosen = [], dispatch._chosen

    def counted(op, *rest):
        if op == "lerp_":
            return lambda ts, os, *more: (calls.append((ts, os)), chosen(op, *rest)(ts, os, *more))
        return chosen(op, *rest)

    monkeypatch.setattr(dispatch, "_chosen", counted)
    return calls


@pytest.mark.parametrize("config", [SHORT, WIDE], ids=["bf16", "fp32"])
def test_subnets_of_one_group_of_the_optimizer_decay_in_one_call(config, monkeypatch):
    """Towards the base's values as they are kept, in bf16: nobody makes a copy of them all in fp32."""
    losia, optimizer = one_away(config)
    without = list(losia.modules.values())[2]
    without.subnet.grad = None
    want = decayed_in_double(losia, optimizer)
    calls = calls_of_lerp(monkeypatch)
    optimizer.step()
    assert sorted(len(tensors) for tensors, _ in calls) == [2, len(losia.modules) - 3]
    kept = {losia._anchors.of(m).data_ptr() for m in losia.modules.values() if m is not without}
    assert {o.data_ptr() for _, others in calls for o in others} == kept
    for name, m in losia.modules.items():
        off = m.subnet.detach().double() - want[name]
        if config is WIDE:
            # roundings of a sum below 4, and of its terms
            assert float(off.abs().max()) <= 2**-22 + 2**-23
            continue
        off /= 2.0**-8  # in units at 1..2
        assert float(off.abs().max()) <= 2.0  # one unit, of numbers below 4
        # roundings are independent, of 1 unit at most 2 wide
        assert abs(float(off.mean())) <= 6 / off.numel() ** 0.5


@pytest.mark.parametrize("now", DTYPES)
@pytest.mark.parametrize(("was", "config"), [(DTYPES[0], SHORT), *((was, WIDE) for was in DTYPES)])
def test_a_model_that_is_cast_decays_to_its_base_in_its_own_dtype(was, now, config, monkeypatch):
    """In pairs that kernels take, but for fp64."""
    losia, optimizer = one_away(config, was, now)
    want = decayed_in_double(losia, optimizer)
    calls = calls_of_lerp(monkeypatch)
    optimizer.step()
    for tensors, others in calls:
        ((dtype, other),) = {(t.dtype, o.dtype) for t, o in zip(tensors, others, strict=True)}
        assert dtype == torch.float64 or other in LERPS[dtype]
    for name, m in losia.modules.items():
        unit = 4 * torch.finfo(m.subnet.dtype).eps
        torch.testing.assert_close(m.subnet.detach().double(), want[name], rtol=unit, atol=unit)


def test_subnets_of_several_dtypes_are_a_call_for_each(monkeypatch):
    """As of a block whose linears are not all in bf16."""
    start = [torch.ones(4, dtype=d) for d in (*DTYPES, DTYPES[0])]
    others = [torch.zeros_like(t) for t in start]
    calls = calls_of_lerp(monkeypatch)
    decay.lerp_(start, others, 1.0, 1, 2, 3)
    assert [len(tensors) for tensors, _ in calls] == [2, *[1] * (len(DTYPES) - 1)]
    assert all(len({t.dtype for t in tensors}) == 1 for tensors, _ in calls)
    assert all(torch.equal(t, o) for t, o in zip(start, others, strict=True))


@pytest.mark.parametrize("capturing", [False, True])
def test_while_a_graph_is_captured_the_kernels_tables_are_not_asked_for(capturing, monkeypatch):
    """They come from the host's memory."""
    asked, real = [], decay.function
    monkeypatch.setattr(
        decay, "function", lambda op, like, impl: asked.append(impl) or real(op, like, impl)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    decay.lerp_([torch.ones(4)], [torch.zeros(4)], 1.0, 1, 2, 3)
    assert asked == ["torch" if capturing else None]


def test_a_block_on_two_devices_is_rewarmed_on_each_by_itself(monkeypatch):
    launched = []
    monkeypatch.setattr(decay, "function", lambda *_: lambda *args: launched.append(args))
    losia = losia_pro.attach(toys.stack(), LosiaConfig(rank_factor=1 / 4, period=4))
    losia.step = next(n for n in range(40) if losia.schedule.rewarm(n, 0) < 1)
    first, *rest = losia.group_modules(0).values()
    first.subnet = torch.nn.Parameter(torch.empty_like(first.subnet, device="meta"))
    rewarm.after(losia, rewarm.before(losia))
    assert [len(own) for own, *_ in launched] == [1, len(rest)]
    for own, towards, *_ in launched:
        assert len({t.device for t in (*own, *towards)}) == 1
    assert len({key for *_, key in launched}) == 2  # and by random bits of its own
