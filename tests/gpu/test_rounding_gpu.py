"""Stochastic rounding on a CUDA device: the bits that PyTorch computes on the CPU, with each implementation."""

from __future__ import annotations

import lerps
import pytest
import torch
from adamw_steps import CONSTANTS, compare
from ops_tools import choose, randn, usable
from torch import nn

from losia_pro import dispatch, optim, torch_ops


@pytest.mark.parametrize("seed", [0, -3, 2**63 - 1])
def test_write_back_rounds_stochastically_to_the_bits_of_the_cpu(impl, seed):
    usable("write_back_", impl)
    shapes = [(400, 560), (7, 10000), (1, 1), (640, 64)]
    weights = [torch.zeros(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
    weights[0] = torch.zeros(560, 400, device="cuda", dtype=torch.bfloat16).T
    rows, columns = ([choose(s[k], -(-s[k] // 4)) for s in shapes] for k in (0, 1))
    subnets = [randn(len(r), len(c)) for r, c in zip(rows, columns, strict=True)]
    subnets[0][0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.39e38])
    layers = weights, subnets, rows, columns
    on_cpu = [[t.cpu() for t in part] for part in layers]
    torch.ops.losia_pro.write_back_(*on_cpu, seed=seed, impl="torch")
    for _ in range(2):
        torch.ops.losia_pro.write_back_(*layers, seed=seed, impl=impl)
        for ours, expected in zip(weights, on_cpu[0], strict=True):
            torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_a_new_seed_compiles_nothing_anew():
    """Kernels are chosen by an argument's type and divisibility, and a seed is neither."""
    usable("write_back_", "triton")
    from losia_pro.kernels.write_back import write_back_kernel

    idx, weight = choose(64, 8), torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    layer = [weight], [randn(8, 8)], [idx], [idx]
    torch.ops.losia_pro.write_back_(*layer, seed=0, impl="triton")
    compiled = sum(len(c[0]) for c in write_back_kernel.device_caches.values())
    for seed in range(1, 40):
        torch.ops.losia_pro.write_back_(*layer, seed=seed, impl="triton")
    assert sum(len(c[0]) for c in write_back_kernel.device_caches.values()) == compiled


def test_bf16_subnets_are_written_as_they_are(impl):
    usable("write_back_", impl)
    idx, weight = choose(64, 8), torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    subnet = randn(8, 8, dtype=torch.bfloat16)
    torch.ops.losia_pro.write_back_([weight], [subnet], [idx], [idx], impl=impl)
    assert torch.equal(weight[idx][:, idx], subnet)
    assert int((weight != 0).sum()) == int((subnet != 0).sum())


SHAPES = [(512, 1376), (512, 512), (1, 1), (4097,), (0, 4)]


@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_is_pytorchs_step_with_the_same_random_bits(impl, maximize):
    usable("adamw_", impl)
    like = torch.zeros(1, device="cuda", dtype=torch.bfloat16)
    compare(dispatch.function("adamw_", like, impl), SHAPES, "cuda", maximize)


def test_adamw_takes_tensors_that_begin_anywhere(impl):
    """A view that begins at an odd entry is not at a multiple of 4 bytes."""
    usable("adamw_", impl)
    like = torch.zeros(1, device="cuda", dtype=torch.bfloat16)
    adamw = dispatch.function("adamw_", like, impl)
    whole = [randn(4098, dtype=torch.bfloat16) for _ in range(3)]
    whole.append(whole[1].square())
    views, copies = [[t[1:]] for t in whole], [[t[1:].clone()] for t in whole]
    for kinds in (views, copies):
        adamw(*kinds, [3], [2**62 + 5], maximize=False, **CONSTANTS)
    for (view,), (copy,) in zip(views, copies, strict=True):
        assert torch.equal(view, copy)


def test_lerp_has_the_bits_of_the_cpu(impl):
    """Of tensors that begin anywhere, and with a weight that is on the device or not."""
    usable("lerp_", impl)
    like = torch.zeros(1, device="cuda", dtype=torch.bfloat16)
    lerp = dispatch.function("lerp_", like, impl)
    lerps.compare(lerp, "cuda")
    big, other = (
        torch.randn(2**22).bfloat16() for _ in range(2)
    )  # a product not rounded shows in 2^-15
    mine = big.cuda()
    lerp([mine], [other.cuda()], 0.3, 2**62)
    torch_ops.lerp_([big], [other], 0.3, 2**62)
    assert torch.equal(mine.cpu(), big)


@pytest.mark.parametrize("other", lerps.OTHERS)
def test_lerp_in_fp32_rounds_product_and_sum_one_by_one(impl, other):
    """PyTorch's own may contract them."""
    usable("lerp_", impl)
    lerp = dispatch.function("lerp_", torch.zeros(1, device="cuda"), impl)
    lerps.compare_fp32(lerp, "cuda", other)


def test_lerp_waits_for_nothing_and_a_new_weight_compiles_nothing_anew(impl):
    usable("lerp_", impl)
    lerp = dispatch.function("lerp_", torch.zeros(1, device="cuda", dtype=torch.bfloat16), impl)
    tensors, others = lerps.operands("cuda")
    weights = [0.1, torch.tensor(0.2, device="cuda"), 0.3]
    lerp(tensors, others, 0.1, 2**62)
    compiled = compiled_lerps() if impl == "triton" else 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k, weight in enumerate(weights):
            lerp(tensors, others, weight, 2**62 + k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if impl == "triton":
        assert compiled_lerps() == compiled


def compiled_lerps() -> int:
    from losia_pro.kernels.lerp import lerp_kernel

    return sum(len(c[0]) for c in lerp_kernel.device_caches.values())


def test_lerp_of_more_entries_than_32_bits_count(impl):
    """Numbers are taken modulo 2^32, by every implementation."""
    usable("lerp_", impl)
    if impl == "torch":
        pytest.skip("takes 70 GiB; test_rounding.py has its numbers")
    lerp = dispatch.function("lerp_", torch.zeros(1, device="cuda", dtype=torch.bfloat16), impl)
    one, two = (
        torch.zeros(2**31 + 5000, device="cuda", dtype=torch.bfloat16),
        randn(4099).bfloat16(),
    )
    other, mine = torch.randn_like(two), [two.clone(), two.clone()]
    lerp([one, one, mine[0]], [one, one, other], 0.3, 2**62 + 5)
    lerp([one[:10000], mine[1]], [one[:10000], other], 0.3, 2**62 + 5)  # 2 (2^31 + 5000) - 2^32
    assert torch.equal(*mine) and not torch.equal(mine[0], two) and not bool(one.any())


def test_adamw_steps_resume_and_move_nothing_to_the_host(monkeypatch):
    """Two optimizers, of which one goes on from a checkpoint; once its step waits for the device, it fails."""
    torch.manual_seed(0)
    start = [randn(*s, dtype=torch.bfloat16) for s in SHAPES]
    grads = [[randn(*s, dtype=torch.bfloat16) for s in SHAPES] for _ in range(4)]

    def go(optimizer, params, steps):
        for k in steps:
            for p, g in zip(params, grads[k], strict=True):
                p.grad = g.clone()
            torch.cuda.set_sync_debug_mode("error" if k % 2 else "default")
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")

    whole, first = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    go(optim.AdamW(whole, lr=1e-3), whole, range(4))
    stopped = optim.AdamW(first, lr=1e-3)
    go(stopped, first, range(2))
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = optim.AdamW(second, lr=1e-3)
    resumed.load_state_dict(stopped.state_dict())
    go(resumed, second, range(2, 4))
    assert all(map(torch.equal, whole, second))
    assert not any(torch.equal(a, b) for a, b in zip(whole, start, strict=True) if a.numel() > 1)
