"""``losia_pro.optim.AdamW``: PyTorch's AdamW but for bf16, where nothing is lost on the mean."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from losia_pro import optim

N = 2**16
UNIT = 2**-8  # of bf16 just below 1
ONE_IN_A_BILLION = math.log(2e9)


def drift(steps: int, unit: float = UNIT, n: int = N) -> float:
    """How far the mean of n entries may be off after so many roundings, but for a chance of 1e-9.

    Each rounding's error has expectation 0 given those before it and lies in an interval of length ``unit``: the
    bound of Azuma and Hoeffding for the sum over all entries.
    """
    return unit * math.sqrt(steps * ONE_IN_A_BILLION / (2 * n))


def descend(make, steps, dtype=torch.bfloat16, n=N, grads=None, **settings):
    """``steps`` steps on ``n`` weights of 1; all gradients are 1 unless given."""
    p = nn.Parameter(torch.ones(64, n // 64, dtype=dtype))
    optimizer = make([p], **settings)
    for k in range(steps):
        p.grad = torch.full_like(p, 1.0 if grads is None else grads[k])
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("lr", [1e-5, 1e-4])
def test_small_updates_arrive_on_the_mean_where_nearest_loses_all(lr):
    """Without moments each step is ``lr`` exactly: at 1e-5, a 400th of a unit."""
    steps, settings = 100, {"lr": lr, "betas": (0.0, 0.0), "eps": 0, "weight_decay": 0}
    p, _ = descend(optim.AdamW, steps, **settings)
    rounded_fp32 = steps * 2**-25
    assert abs(float(p.double().mean()) - (1 - steps * lr)) <= drift(steps) + rounded_fp32
    assert drift(steps) < steps * lr
    nearest, _ = descend(torch.optim.AdamW, steps, **settings)
    assert bool((nearest == 1).all())


def test_weight_decay_arrives_on_the_mean():
    p, _ = descend(optim.AdamW, 50, grads=[0.0] * 50, lr=1e-2, weight_decay=1e-2, betas=(0.0, 0.0))
    assert abs(float(p.double().mean()) - (1 - 1e-4) ** 50) <= drift(50) + 50 * 2**-25


def test_the_second_moment_falls_as_it_does_in_fp32():
    """0.999 of a bf16 number rounds to itself."""
    grads, n = [1.0] + [0.0] * 400, 2**12
    _, ours = descend(optim.AdamW, len(grads), n=n, grads=grads, lr=0.0)
    _, nearest = descend(torch.optim.AdamW, len(grads), n=n, grads=grads, lr=0.0)
    assert ours["exp_avg_sq"].dtype == ours["exp_avg"].dtype == torch.bfloat16
    expected = 1e-3 * 0.999**400
    off = abs(float(ours["exp_avg_sq"].double().mean()) - expected)
    assert (
        off <= drift(len(grads), 2**-17, n) + 1e-3 * 400 * 2**-23
    )  # 2^-10 < v < 2^-9 in units of 2^-17
    assert float(nearest["exp_avg_sq"].double().mean()) > 1.4 * expected


def test_it_follows_fp32_with_both_moments():
    """The second moment's own noise, of at most 3 % after 200 steps, moves the mean step by its square, 0.1 %."""
    steps, settings = 200, {"lr": 1e-4, "weight_decay": 0.1}
    p, _ = descend(optim.AdamW, steps, **settings)
    exact, _ = descend(torch.optim.AdamW, steps, torch.float32, **settings)
    path = 1 - float(exact.double().mean())
    off = abs(float(p.double().mean()) - (1 - path))
    assert off <= drift(steps) + 1e-3 * path + steps * 2**-25
    assert off < path / 10


def test_every_entry_is_rounded_by_itself():
    p, state = descend(optim.AdamW, 3, lr=1e-3, betas=(0.5, 0.5))
    assert len(p.unique()) > 1
    for t in (p, state["exp_avg"]):  # neighbours differ about as often as entries far apart do
        near, far = (int((t.flatten() != t.flatten().roll(k)).sum()) for k in (1, N // 2 + 7))
        assert abs(near - far) <= 6 * math.sqrt(N / 2)


def parameters(dtype):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(n, 5).to(dtype)) for n in (3, 7, 2)]


def steps(optimizer, params, n=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "how", [{}, {"foreach": True}, {"fused": True}, {"maximize": True}], ids=str
)
def test_other_dtypes_are_pytorchs_bit_for_bit(how, dtype):
    ends = []
    for make in (optim.AdamW, torch.optim.AdamW):
        params = parameters(dtype)
        options = {"lr": 1e-2, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-3} | how
        optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 1e-3}], **options)
        steps(optimizer, params)
        ends.append([params, [[*s.values()] for s in optimizer.state.values()]])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("maximize", [False, True])
def test_a_bf16_step_is_pytorchs_fp32_step_rounded_up_or_down(maximize):
    options = {
        "lr": 0.1,
        "weight_decay": 0.3,
        "betas": (0.8, 0.9),
        "eps": 1e-3,
        "maximize": maximize,
    }
    short, wide = parameters(torch.bfloat16), parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in wide]
    ours, theirs = optim.AdamW(short, **options), torch.optim.AdamW(wide, **options)
    for k in range(3):
        steps(ours, short, 1, seed=k)
        for p, q in zip(short, wide, strict=True):
            q.grad = p.grad.float()
        theirs.step()
        for p, q in zip(short, wide, strict=True):
            s, t = ours.state[p], theirs.state[q]
            assert float(s["step"]) == float(t["step"]) == k + 1
            for a, b in ((p, q), (s["exp_avg"], t["exp_avg"]), (s["exp_avg_sq"], t["exp_avg_sq"])):
                low, high = (a.float().nextafter(torch.tensor(e)) for e in (-torch.inf, torch.inf))
                step = a.abs().float().frexp().exponent.float().sub(8).exp2()
                assert bool(((b > low - step) & (b < high + step)).all())
                b.data.copy_(a)  # the next step from the same numbers


def test_the_step_is_a_function_of_seed_place_and_step_alone():
    """Not of the global generator, which it leaves alone: ranks agree, whatever they have drawn."""
    ends = []
    for seed, number in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(number)
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        q = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer, before = optim.AdamW([p, q], lr=1e-3, seed=seed), torch.get_rng_state()
        seen = []
        for _ in range(2):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(p)
            optimizer.step()
            seen += [p.detach().clone(), q.detach().clone()]
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(seen)
    assert all(map(torch.equal, ends[0], ends[1]))
    assert not any(map(torch.equal, ends[0], ends[2]))
    assert not torch.equal(*ends[0][:2])  # each parameter has its own
    first, second = ends[0][0] != 1, ends[0][2] != ends[0][0]
    assert not torch.equal(first, second)  # and each step


def resumed(optimizer, params):
    new = [nn.Parameter(p.detach().clone()) for p in params]
    other = optim.AdamW(new, lr=1e-2, seed=99)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, new


def test_a_checkpoint_brings_everything_its_seed_too():
    params = parameters(torch.bfloat16)
    optimizer = optim.AdamW(params, lr=1e-2, seed=5)
    steps(optimizer, params)
    other, new = resumed(optimizer, params)
    pickled = pickle.loads(pickle.dumps(optimizer))
    steps(optimizer, params, seed=2)
    steps(other, new, seed=2)
    held = pickled.param_groups[0]["params"]
    steps(pickled, held, seed=2)
    for mine, others in ((params, new), (params, held)):
        assert all(map(torch.equal, mine, others))


def test_a_checkpoint_of_pytorchs_adamw_is_taken():
    params = parameters(torch.bfloat16)
    theirs = torch.optim.AdamW(params, lr=1e-2)
    steps(theirs, params)
    other, new = resumed(theirs, params)
    steps(other, new)
    assert all(float(other.state[p]["step"]) == 8 for p in new)


def test_a_parameter_without_a_gradient_stays():
    p, q = parameters(torch.bfloat16)[:2]
    optimizer, before = optim.AdamW([p, q], lr=1.0), p.detach().clone()
    q.grad = torch.ones_like(q)
    optimizer.step()
    assert torch.equal(p, before) and p not in optimizer.state


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    p = parameters(torch.bfloat16)[0]
    optimizer = optim.AdamW([p], lr=1e-2)

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad and p.grad is not None


@pytest.mark.parametrize("name", ["amsgrad", "capturable", "differentiable"])
def test_what_it_lacks_is_refused_by_name(name):
    group = {"params": parameters(torch.bfloat16), name: True}
    with pytest.raises(ValueError, match=f"has no {name}; torch.optim.AdamW has"):
        optim.AdamW([group])
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optim.AdamW(group["params"], lr=-1)


@pytest.mark.parametrize("name", ["amsgrad", "capturable", "differentiable"])
def test_a_checkpoint_of_what_it_lacks_is_refused_and_changes_nothing(name):
    params = parameters(torch.bfloat16)
    theirs, ours = (kind(params, lr=1e-2) for kind in (torch.optim.AdamW, optim.AdamW))
    steps(theirs, params)
    state, before = theirs.state_dict(), copy.deepcopy(ours.state_dict())
    state["param_groups"][0][name] = True
    with pytest.raises(ValueError, match=f"has no {name}; torch.optim.AdamW has"):
        ours.load_state_dict(state)
    assert ours.state_dict() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_grad_scaler_unscales_and_skips_overflows(dtype):
    """Also with ``fused``, whose kernel in PyTorch does both by itself."""
    ends = []
    for scale in (1.0, 2.0**10):
        p = parameters(dtype)[0]
        optimizer = optim.AdamW([p], lr=1e-2, eps=1.0, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        for value in (0.25, torch.inf, 0.5):
            p.grad = torch.full_like(p, value) * float(scaler.scale(torch.ones(())))
            scaler.step(optimizer)
            scaler.update()
        assert float(optimizer.state[p]["step"]) == 2
        ends.append(p.detach())
    assert torch.equal(*ends)
