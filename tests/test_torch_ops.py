"""The ops' plain PyTorch versions against the reference, their schemas, and which version answers."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import lerps
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from losia_pro import dispatch, ops, reference, subnet_linear, torch_ops
from losia_pro.dispatch import resolve

OPS = torch.ops.losia_pro
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def integers(*size: int, seed: int, dtype: torch.dtype, step: float = 1) -> Tensor:
    """-1, 0 or 1 times ``step``: small enough for every sum and product here to be exact in fp32."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(-1, 2, size, generator=g) * step).to(dtype)


@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens, n_out, n_in", [(9, 3, 5), (9, 7, 8), (0, 3, 5), (1, 1, 1), (9, 0, 0)]
)
def test_gather_and_gradient_are_those_of_the_reference(tokens, n_out, n_in, dtype, strided):
    torch.manual_seed(0)
    x, dy = integers(tokens, 8, seed=1, dtype=dtype), integers(tokens, 7, seed=2, dtype=dtype)
    if strided:
        x, dy = x.T.contiguous().T, torch.stack([dy, dy], -1)[..., 0]
    out_idx, in_idx = torch.randperm(7)[:n_out], torch.randperm(8)[:n_in]
    weight = torch.zeros(7, 8, dtype=torch.float64)
    _, want, _ = reference.backward(dy.double(), x.double(), weight, out_idx, in_idx)
    x_sub = OPS.gather_columns(x, in_idx)
    assert x_sub.dtype == dtype and torch.equal(x_sub, x[:, in_idx])
    for out_dtype in (None, *DTYPES):
        got = OPS.subnet_grad(dy, x_sub, out_idx, out_dtype=out_dtype)
        assert got.dtype == (out_dtype or torch.promote_types(dtype, torch.float32))
        assert torch.equal(got.double(), want)


def test_none_chosen_of_one_is_none_and_not_all():
    """There, a group of one is as long as the side: by its length alone, it would say that all are chosen."""
    column, none = torch.ones(9, 1), torch.empty(0, dtype=torch.int64)
    assert OPS.gather_columns(column, none).shape == (9, 0)
    assert OPS.subnet_grad(column, torch.ones(9, 5), none).shape == (0, 5)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("op", ["subnet_grad", "importance_update_"])
def test_gradients_of_bf16_are_neither_summed_nor_rounded_in_bf16(op, autocast):
    """1 + 301 times 2^-9 has ten bits, bf16 eight; and summed in bf16, 1 would stay as it is."""
    dy = torch.full((302, 1), 2**-9, dtype=torch.bfloat16)
    dy[0] = 1
    ones = torch.ones(302, 1, dtype=torch.bfloat16)
    importance, uncertainty = torch.zeros(2, 1, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if op == "subnet_grad":
            got = OPS.subnet_grad(dy, ones, torch.tensor([0]), out_dtype=torch.float32)
        else:
            OPS.importance_update_(
                importance, uncertainty, ones[:1], dy, ones, None, 0.0, 0.0, "first"
            )
            got = importance
    assert float(got) == 1 + 301 * 2**-9


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("earlier", [False, True], ids=["", "earlier gradients"])
@pytest.mark.parametrize("variant", reference.VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_importance_follows_the_reference_bit_for_bit(dtype, variant, earlier, scale):
    """Two steps, in numbers of which fp32 rounds none."""
    wide = torch.promote_types(dtype, torch.float32)
    weight = integers(5, 6, seed=0, dtype=dtype, step=0.25)
    importance, uncertainty = torch.zeros(2, 5, 6, dtype=wide)
    smoothed, uncertain = torch.zeros(2, 5, 6, dtype=torch.float64)
    for step in (1, 2):
        dy = integers(4, 5, seed=10 * step, dtype=dtype)
        x = integers(4, 6, seed=10 * step + 1, dtype=dtype)
        grad = integers(5, 6, seed=10 * step + 2, dtype=wide) if earlier else None
        kept = None if grad is None else grad.clone()
        OPS.importance_update_(
            importance, uncertainty, weight, dy, x, grad, 0.5, 0.75, variant, scale=scale
        )
        assert grad is None or torch.equal(grad, kept)

        g = reference.dense_gradient(dy.double(), x.double())
        g = scale * (g if grad is None else g + grad)
        now = reference.importance(g, weight.double(), variant)
        smoothed = reference.smooth(smoothed, now, 0.5)
        uncertain = reference.uncertainty(uncertain, now, smoothed, 0.75)
    assert smoothed.any() and uncertain.any()
    assert torch.equal(importance.double(), smoothed)
    assert torch.equal(uncertainty.double(), uncertain)


@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_importance_follows_the_reference_with_ordinary_numbers(variant):
    torch.manual_seed(0)
    weight, dy, x = (
        torch.randn(5, 6).double(),
        torch.randn(9, 5).double(),
        torch.randn(9, 6).double(),
    )
    smoothed, uncertain = torch.rand(2, 5, 6).double()
    importance, uncertainty = smoothed.clone(), uncertain.clone()
    OPS.importance_update_(importance, uncertainty, weight, dy, x, None, 0.85, 0.9, variant)
    now = reference.importance(reference.dense_gradient(dy, x), weight, variant)
    smoothed = reference.smooth(smoothed, now, 0.85)
    torch.testing.assert_close(importance, smoothed)
    torch.testing.assert_close(uncertainty, reference.uncertainty(uncertain, now, smoothed, 0.9))


def test_write_back_puts_each_subnet_into_its_weight_and_nothing_else():
    torch.manual_seed(0)
    weights = [torch.randn(7, 8).to(dtype) for dtype in DTYPES]
    subnets = [
        torch.randn(3, n, dtype=ops.compact_dtype(w.dtype)) for n, w in enumerate(weights, 1)
    ]
    out_idx = [torch.randperm(7)[:3] for _ in weights]
    in_idx = [torch.randperm(8)[: s.shape[1]] for s in subnets]
    before = [w.clone() for w in weights]
    for _ in range(2):
        OPS.write_back_(weights, subnets, out_idx, in_idx)
        for w, old, subnet, rows, columns in zip(
            weights, before, subnets, out_idx, in_idx, strict=True
        ):
            mask = reference.mask(w, rows, columns).bool()
            assert torch.equal(w[rows][:, columns], subnet.to(w.dtype))
            assert torch.equal(w[~mask], old[~mask])
    OPS.write_back_([], [], [], [])


@pytest.mark.parametrize("other", lerps.OTHERS)
def test_interpolation_in_fp32_is_the_equation_to_an_ulp(other):
    lerps.compare_fp32(torch_ops.lerp_, "cpu", other)


def test_interpolation_in_fp64_is_computed_in_it():
    t, other = torch.randn(40, 50).double(), torch.randn(40, 50)
    want = t + 0.1 * (other.double() - t)
    torch_ops.lerp_([t], [other], 0.1, 0)
    torch.testing.assert_close(t, want, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("op", ["subnet_grad", "importance_update_", "lerp_"])
def test_fp64_is_left_to_torch_where_no_kernel_takes_it(op, monkeypatch):
    """Even where they all run."""
    monkeypatch.setattr(dispatch, "_why_not", lambda *_: "")
    monkeypatch.setattr(dispatch, "_module", lambda impl: (SimpleNamespace(**{op: impl}), ""))
    cuda, chosen = torch.device("cuda:0"), dispatch._chosen.__wrapped__
    assert chosen(op, cuda, None, True, False, None) is getattr(torch_ops, op)
    assert chosen(op, cuda, None, False, False, None) == dispatch.PREFERENCE[op][0]


def test_a_gradient_in_fp64_is_left_to_torch_too(monkeypatch):
    """``subnet_linear`` takes subnets of any dtype, and their gradients have it."""
    asked, chosen = [], dispatch._chosen

    def watched(op, device, impl, double, *rest):
        asked.append((op, double))
        return chosen(op, device, impl, double, *rest)

    monkeypatch.setattr(dispatch, "_chosen", watched)
    x, weight, idx = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([1, 2])
    subnet = weight[1:3, 1:3].double().requires_grad_()
    subnet_linear(x, weight, subnet, idx, idx).sum().backward()
    OPS.subnet_grad(x, x, idx, out_dtype=torch.float64)
    assert asked == [("gather_columns", False), *[("subnet_grad", True)] * 2]


def subnet_grad_of(tokens: int, group: int) -> None:
    dy = torch.randn(tokens, 4)
    OPS.subnet_grad(dy, dy, torch.tensor([2, 3]), group=group)


def importance_update_of(out: int, into: int) -> None:
    kept = torch.zeros(out, into)
    dy, x = torch.randn(3, out), torch.randn(3, into)
    OPS.importance_update_(kept, kept.clone(), kept.clone(), dy, x, None, 0.8, 0.8, "first")


@pytest.mark.parametrize(
    ("call", "size", "impl"),
    [
        (subnet_grad_of, (2049, 2), "triton"),
        (subnet_grad_of, (2048, 2), "cuda"),
        (subnet_grad_of, (2049, 1), "cuda"),
        (importance_update_of, (256, 2048), "cuda"),
        (importance_update_of, (1024, 1024), "cuda"),
        (importance_update_of, (1024, 4096), "triton"),
    ],
)
def test_sizes_decide_what_answers_by_default_on_a_gpu(call, size, impl, monkeypatch):
    """Where both can run: of many tokens of runs Triton, of a small weight CUDA."""
    answered, chosen = [], dispatch._chosen.__wrapped__

    def module(impl):
        def answer(dy, *rest):
            answered.append(impl)
            return torch.zeros(2, 4)

        return SimpleNamespace(subnet_grad=answer, importance_update_=answer), ""

    def on_a_gpu(op, device, *rest):
        return chosen(op, torch.device("cuda:0"), *rest)

    monkeypatch.setattr(dispatch, "IMPL", None)
    monkeypatch.setattr(dispatch, "_why_not", lambda *_: "")
    monkeypatch.setattr(dispatch, "_module", module)
    monkeypatch.setattr(dispatch, "_chosen", on_a_gpu)
    call(*size)
    assert answered == [impl]


def arguments(op: str) -> tuple[object, ...]:
    idx = torch.tensor([0, 2])
    weight, dy, x = torch.randn(5, 6), torch.randn(4, 5), torch.randn(4, 6)
    buffers = torch.rand(2, 5, 6).unbind()
    return {
        "gather_columns": (x, idx),
        "subnet_grad": (dy, x[:, :2].contiguous(), idx),
        "importance_update_": (*buffers, weight, dy, x, torch.randn(5, 6), 0.85, 0.85, "taylor"),
        "write_back_": ([weight, x], [torch.randn(2, 2)] * 2, [idx] * 2, [idx] * 2),
    }[op]


@pytest.mark.parametrize("op", ops.OPS)
def test_schema_fake_and_compilation_of_each_op_are_sound(op):
    overload = getattr(OPS, op).default
    torch.library.opcheck(overload, arguments(op), {"impl": "torch"})
    more = {"subnet_grad": {"out_dtype": torch.bfloat16}, "write_back_": {"seed": 3}}
    for optional in ({}, more.get(op, {})):
        torch.library.opcheck(overload, arguments(op), optional)


@pytest.mark.parametrize("op", ops.OPS)
def test_off_a_gpu_torch_answers(op, monkeypatch):
    monkeypatch.setattr(dispatch, "IMPL", None)
    assert resolve(op, "cpu") == resolve(op, "cpu", "torch") == "torch"
    usable = {name: (can, why) for name, can, why in dispatch.explain(op, "cpu")}
    assert usable.keys() == set(dispatch.IMPLS)
    assert usable["torch"] == (True, "")
    assert not usable["cuda"][0] and usable["cuda"][1]


@pytest.mark.parametrize("op", ops.OPS)
def test_an_unknown_or_unusable_implementation_is_refused(op, monkeypatch):
    with pytest.raises(ValueError, match="impl must be one of"):
        getattr(OPS, op)(*arguments(op), impl="fastest")
    with pytest.raises(RuntimeError, match=f"{op}: impl='cuda' cannot run on cpu"):
        getattr(OPS, op)(*arguments(op), impl="cuda")
    monkeypatch.setattr(dispatch, "IMPL", "fastest")
    with pytest.raises(ValueError, match="got 'fastest'"):
        getattr(OPS, op)(*arguments(op))


def test_an_implementation_set_for_the_process_falls_back_and_says_so_once(monkeypatch):
    monkeypatch.setattr(dispatch, "IMPL", "cuda")
    dispatch._warn_fallback.cache_clear()
    dispatch._chosen.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for op in ops.OPS:
                getattr(OPS, op)(*arguments(op))
    assert [w.category for w in caught] == [RuntimeWarning] * len(ops.OPS)
    for op, warning in zip(ops.OPS, caught, strict=True):
        assert f"LOSIA_IMPL=cuda cannot run {op} on cpu" in str(warning.message)
    dispatch._warn_fallback.cache_clear()
    dispatch._chosen.cache_clear()


def test_the_process_wide_choice_yields_to_the_calls_own(monkeypatch):
    monkeypatch.setattr(dispatch, "IMPL", "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OPS.gather_columns(*arguments("gather_columns"), impl="torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interpolation_sends_a_number_nowhere(dtype):
    """A decay of every step: a tensor of its rate on the device would wait for it, and a graph being captured refuses
    what is copied from the host."""
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            made.append({t.device.type for t in (*args, found) if isinstance(t, torch.Tensor)})
            return found

    tensors, others = ([torch.empty(3, dtype=dtype, device="meta")] * 2 for _ in range(2))
    with Made():
        torch_ops.lerp_(tensors, others, 0.25, 1)
    assert {"meta"} in made and all(len(devices) < 2 for devices in made)


def test_what_another_implementation_answers_is_told(monkeypatch):
    monkeypatch.setattr(dispatch, "IMPL", None)
    assert dispatch.resolve_special("subnet_grad", "cpu") is None
    monkeypatch.setattr(dispatch, "_why_not", lambda op, device, impl: "")
    assert dispatch.resolve_special("gather_columns", "cuda") is None
    assert dispatch.resolve("subnet_grad", "cuda") == "cuda"
    other = "triton", "aligned runs, more than 2048 tokens"
    assert dispatch.resolve_special("subnet_grad", "cuda") == other
    monkeypatch.setattr(dispatch, "IMPL", "cuda")  # then it answers all
    assert dispatch.resolve_special("subnet_grad", "cuda") is None
