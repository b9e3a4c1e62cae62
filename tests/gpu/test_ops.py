"""Every op and implementation on a CUDA device, against an fp64 truth, from outputs poisoned with NaN."""

from __future__ import annotations

import pytest
import torch
from ops_tools import (
    CASES,
    DEVICE,
    DTYPES,
    as_exact_as_pytorch,
    choose,
    choose_runs,
    gather,
    grad,
    randn,
    relative,
    usable,
)  # fmt: skip
from torch import Tensor

from losia_pro import reference, subnet_linear
from losia_pro.profile import importance_dtype


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_columns_moves_the_bits(impl, case, dtype):
    usable("gather_columns", impl)
    x, idx = randn(case.tokens, case.out, dtype=dtype), choose(case.out, case.n_out)
    y = gather(x, idx, impl)
    assert y.is_contiguous() and torch.equal(y, x[:, idx])


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_subnet_grad_is_as_exact_as_pytorch(impl, case, dtype, out_dtype):
    usable("subnet_grad", impl)
    dy, idx = randn(case.tokens, case.out, dtype=dtype), choose(case.out, case.n_out)
    x_sub = randn(case.tokens, case.n_in, dtype=dtype)
    ours = grad(dy, x_sub, idx, impl, out_dtype)
    assert ours.dtype == out_dtype and ours.shape == (case.n_out, case.n_in)
    if not case.tokens:
        assert not ours.any()
    as_exact_as_pytorch(ours, dy, x_sub, idx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [{"fused": True}, {"fused": False}], ids=str)
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_each_way_of_the_triton_product_is_as_exact(case, dtype, way):
    usable("subnet_grad", "triton")
    from losia_pro.kernels.launch import subnet_grad

    dy, idx = randn(case.tokens, case.out, dtype=dtype), choose(case.out, case.n_out)
    x_sub = randn(case.tokens, case.n_in, dtype=dtype)
    as_exact_as_pytorch(subnet_grad(dy, x_sub, idx, torch.float32, **way), dy, x_sub, idx)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T.contiguous().T,
        lambda t: torch.stack([t, t], 2)[:, :, 0],
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        lambda t: t[:1].expand(t.shape),
    ],
    ids=["transposed", "every other", "row-padded", "expanded"],
)
def test_any_strides(impl, view):
    usable("subnet_grad", impl)
    dy, x = view(randn(300, 200, dtype=torch.bfloat16)), view(randn(300, 200, dtype=torch.bfloat16))
    idx = choose(200, 50)
    assert torch.equal(gather(x, idx, impl), x[:, idx])
    as_exact_as_pytorch(grad(dy, x, idx, impl), dy, x, idx)
    strided_idx = torch.stack([idx, idx], 1)[:, 0]
    assert torch.equal(gather(x, strided_idx, impl), x[:, idx])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_columns_that_are_not_chosen_do_not_leak(impl, bad):
    usable("subnet_grad", impl)
    dy, idx, x_sub = randn(400, 300), torch.tensor([0, 7, 8, 298], device=DEVICE), randn(400, 70)
    dirty = torch.full_like(dy, bad)
    dirty[:, idx] = dy[:, idx]
    assert torch.equal(gather(dirty, idx, impl), dy[:, idx])
    assert torch.equal(grad(dirty, x_sub, idx, impl), grad(dy, x_sub, idx, impl))


def test_a_chosen_nan_arrives(impl):
    usable("subnet_grad", impl)
    dy, idx, x_sub = randn(400, 300), torch.tensor([3, 7], device=DEVICE), randn(400, 70)
    dy[399, 7] = torch.nan
    result = grad(dy, x_sub, idx, impl)
    assert result[0].isfinite().all() and result[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_run(impl, dtype):
    usable("subnet_grad", impl)
    dy, idx, x_sub = (
        randn(8192, 1024, dtype=dtype),
        choose(1024, 128),
        randn(8192, 128, dtype=dtype),
    )
    first = grad(dy, x_sub, idx, impl)
    assert all(torch.equal(grad(dy, x_sub, idx, impl), first) for _ in range(5))


@pytest.mark.parametrize("group", [1, 16])
def test_offsets_beyond_two_to_the_31(impl, group):
    usable("subnet_grad", impl)
    tokens, out = 2**19 + 8, 4096
    idx = torch.cat(
        [choose_runs(out // group - 1, 15, group), torch.arange(out - group, out, device=DEVICE)]
    )
    dy = torch.randn(tokens, out, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(gather(dy, idx, impl, group), dy.index_select(1, idx))
    x_sub = randn(tokens, 16, dtype=torch.bfloat16)
    as_exact_as_pytorch(grad(dy, x_sub, idx, impl, group=group), dy, x_sub, idx)


def test_an_output_beyond_two_to_the_31(impl):
    usable("gather_columns", impl)
    x = torch.randn(2**20, 2100, device=DEVICE, dtype=torch.bfloat16)
    idx = choose(2100, 2049)
    assert torch.equal(gather(x, idx, impl), x.index_select(1, idx))


def test_capture_in_a_cuda_graph(impl):
    usable("subnet_grad", impl)
    x, dy, idx = randn(512, 256), randn(512, 256), choose(256, 32)

    def work() -> tuple[Tensor, Tensor]:
        x_sub = gather(x, idx, impl)
        return x_sub, grad(dy, x_sub, idx, impl)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for t in (x, dy):
        t.normal_()
    idx.copy_(choose(256, 32))
    graph.replay()
    assert all(map(torch.equal, captured, work()))


def test_two_streams_do_not_wait_for_each_other_or_mix(impl):
    usable("subnet_grad", impl)
    idx = choose(1024, 128)
    work = [(randn(4096, 1024), randn(4096, 64)) for _ in range(2)]
    alone = [(gather(dy, idx, impl), grad(dy, x, idx, impl)) for dy, x in work]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in work]
    together = [None, None]
    for _ in range(4):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000 * (2 - i))
                dy, x = (
                    work[i][0] * 1,
                    work[i][1] * 1,
                )  # made on the stream: another one reads too early
                together[i] = (gather(dy, idx, impl), grad(dy, x, idx, impl))
        torch.cuda.synchronize()
        for one, other in zip(alone, together, strict=True):
            assert all(map(torch.equal, one, other))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_operands_of_another_device_do_not_make_it_the_current_one(impl):
    usable("subnet_grad", impl)
    other, current = (
        torch.device("cuda", torch.cuda.device_count() - 1),
        torch.cuda.current_device(),
    )
    dy, x_sub = (randn(4096, n, dtype=torch.bfloat16).to(other) for n in (1024, 64))
    idx = choose_runs(64, 32, 16).to(other)
    for group in (1, 16):
        assert torch.equal(gather(dy, idx, impl, group), dy[:, idx])
        as_exact_as_pytorch(grad(dy, x_sub, idx, impl, group=group), dy, x_sub, idx)
        assert torch.cuda.current_device() == current != other.index
    weight, subnet = torch.zeros(1024, 1024, device=other), torch.randn(512, 512, device=other)
    torch.ops.losia_pro.write_back_([weight], [subnet], [idx], [idx], impl=impl)
    assert torch.equal(weight[idx][:, idx], subnet) and torch.cuda.current_device() == current


def test_opcheck(impl):
    usable("subnet_grad", impl)
    x, dy, idx = randn(64, 48), randn(64, 48), choose(48, 6)
    library = torch.ops.losia_pro
    torch.library.opcheck(library.gather_columns.default, (x, idx), {"impl": impl})
    torch.library.opcheck(library.subnet_grad.default, (dy, x, idx), {"impl": impl})
    options = {"impl": impl, "out_dtype": torch.bfloat16}
    torch.library.opcheck(library.subnet_grad.default, (dy, x, idx), options)


@pytest.mark.parametrize("impl_name", ["triton", "cuda"])
def test_fp64_products_are_refused_by_name(impl_name):
    usable("subnet_grad", impl_name)
    dy, idx = randn(8, 6, dtype=torch.float64), choose(6, 2)
    with pytest.raises(TypeError, match=r"got dy torch.float64; use impl='torch'"):
        grad(dy, dy, idx, impl_name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_has_the_same_gradient_with_each(impl, dtype):
    usable("subnet_grad", impl)
    x, weight = randn(3, 50, 96, dtype=dtype), randn(80, 96, dtype=dtype)
    out_idx, in_idx = choose(80, 10), choose(96, 12)
    subnet = weight[out_idx][:, in_idx].float().requires_grad_()
    y = subnet_linear(x, weight, subnet, out_idx, in_idx, impl=impl)
    dy = torch.randn_like(y)
    y.backward(dy)
    x_sub = x.flatten(0, 1)[:, in_idx]
    as_exact_as_pytorch(subnet.grad, dy.flatten(0, 1), x_sub, out_idx)


@pytest.mark.parametrize("kept", ["fp32", "importance's own"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, out, into", [(1000, 392, 200), (33, 97, 203), (1, 1, 1)])
def test_importance_update_is_as_exact_as_pytorch(impl, tokens, out, into, dtype, kept):
    usable("importance_update_", impl)
    beta, to = 0.85, torch.float32 if kept == "fp32" else importance_dtype(dtype)
    operands = [randn(*s, dtype=dtype) for s in ((out, into), (tokens, out), (tokens, into))]
    weight, dy, x = operands
    before = [randn(out, into).abs().to(to) for _ in range(2)]
    current = reference.importance(dy.double().T @ x.double(), weight.double(), "taylor")
    truth_i = beta * before[0].double() + (1 - beta) * current
    truth_u = beta * before[1].double() + (1 - beta) * (current - truth_i).abs()
    errors = {}
    for who in ("torch", impl):
        after = [t.clone() for t in before]
        args = (*operands, None, beta, beta, "taylor")
        torch.ops.losia_pro.importance_update_(*after, *args, impl=who)
        errors[who] = [relative(a, t) for a, t in zip(after, (truth_i, truth_u), strict=True)]
    least = torch.finfo(torch.float32).eps  # a single entry may be hit exactly
    for ours, own in zip(errors[impl], errors["torch"], strict=True):
        assert ours <= 2 * max(own, least)


def test_where_a_weight_lies_changes_no_bit_of_its_importance(impl):
    usable("importance_update_", impl)
    dy, x, weight = (randn(*s, dtype=torch.bfloat16) for s in ((64, 392), (64, 200), (392, 200)))
    found = []
    for wide in (weight, torch.cat([weight, weight], 1), torch.cat([weight, weight[:, :1]], 1)):
        kept = torch.zeros(2, 392, 200, device=DEVICE)
        args = (*kept, wide[:, :200], dy, x, None, 0.85, 0.85, "taylor")
        torch.ops.losia_pro.importance_update_(*args, impl=impl)
        found.append(kept)
    assert all(torch.equal(kept, found[0]) for kept in found)


def test_what_a_step_weighs_is_rounded_once(impl):
    """1 - fp32(0.85) is 2.0e-7 of it away from fp32(1 - 0.85)."""
    usable("importance_update_", impl)
    one = torch.ones(1, 1, device=DEVICE)
    for betas in ((0.85, 0.5), (0.5, 0.85)):
        kept = torch.zeros_like(one), torch.zeros_like(one)
        args = (*kept, one, one, one, None, *betas, "first")
        torch.ops.losia_pro.importance_update_(*args, impl=impl)
        which, halved = (kept[0], 1) if betas[0] == 0.85 else (kept[1], 2)
        assert which.item() == torch.tensor(1 - 0.85) / halved


@pytest.mark.parametrize("variant", reference.VARIANTS)
@pytest.mark.parametrize("tokens", [64, 0])
def test_importance_update_follows_its_equation(impl, variant, tokens):
    usable("importance_update_", impl)
    beta = 0.85
    dy, x, weight = randn(tokens, 40), randn(tokens, 56), randn(40, 56)
    smoothed, uncertainty = randn(40, 56).abs(), randn(40, 56).abs()
    grad = randn(40, 56)
    g = dy.double().T @ x.double() + grad.double()
    current = reference.importance(g, weight.double(), variant)
    truth_i = beta * smoothed.double() + (1 - beta) * current
    truth_u = beta * uncertainty.double() + (1 - beta) * (current - truth_i).abs()
    torch.ops.losia_pro.importance_update_(
        smoothed, uncertainty, weight, dy, x, grad, beta, beta, variant, impl=impl
    )
    # g's rounding is at most tokens ulps of its terms' size; squaring doubles it, the rest are few operations.
    bound = 4 * max(tokens, 1) * torch.finfo(torch.float32).eps
    assert relative(smoothed, truth_i) <= bound and relative(uncertainty, truth_u) <= bound


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_write_back_rounds_to_nearest_and_touches_nothing_else(impl, dtype):
    usable("write_back_", impl)
    shapes = [(40, 56), (7, 1000), (64, 64)]
    weights = [randn(*s, dtype=dtype) for s in shapes]
    rows = [choose(m, max(1, m // 8)) for m, _ in shapes]
    columns = [choose(n, n // 8) for _, n in shapes]
    wide = torch.promote_types(dtype, torch.float32)
    subnets = [randn(len(r), len(c), dtype=wide) for r, c in zip(rows, columns, strict=True)]
    expected = [w.clone() for w in weights]
    for w, s, r, c in zip(expected, subnets, rows, columns, strict=True):
        w[r[:, None], c] = s.to(dtype)
    torch.ops.losia_pro.write_back_(weights, subnets, rows, columns, impl=impl)
    assert all(map(torch.equal, weights, expected))
