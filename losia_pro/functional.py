"""The layer as a differentiable function: a dense forward, a compact gradient."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, torch_ops
from .saved import Hooks, SavedEarly, keeps_nothing, saved_tensors_hooks
from .shared import SharedInputs


class GradientSink(Protocol):
    """Takes a profiled layer's operands: its full gradient is ``dy^T x``, formed when it is needed. Under a
    compiler, the gradient of ``full`` ``(out, in)`` is."""

    full: Tensor

    def add(self, dy: Tensor, x: Tensor) -> None: ...

    def follow(self) -> None: ...


def subnet_linear(
    x: Tensor,
    weight: Tensor,
    subnet: Tensor,
    out_idx: Tensor,
    in_idx: Tensor,
    bias: Tensor | None = None,
    *,
    impl: str | None = None,
    mode: str = "pro",
    profile: GradientSink | None = None,
    groups: tuple[int, int] = (1, 1),
    shared: SharedInputs | None = None,
) -> Tensor:
    """A linear layer whose trainable part is the block ``weight[out_idx][:, in_idx]``.

        y        = x W^T + b
        dx       = dy W
        d subnet = dy[:, Y_S]^T x[:, X_S]        (paper: *LoSiA-Pro*)

    The forward reads ``weight`` alone, so ``subnet`` must hold the same values as its block there
    (``SubnetLinear`` sees to that). Of ``x``, only ``x[:, X_S]`` is kept for the backward; each gradient
    is computed, and what it needs is kept, only if it is asked for.

    Args:
        x: ``(..., in)``; any number of leading dimensions, empty ones too.
        weight: ``(out, in)``. If it requires grad, it gets its full gradient ``dy^T x``.
        subnet: ``(n_out, n_in)``, fp32 or any other float dtype; its gradient has its dtype.
        out_idx, in_idx: ``(n_out,)`` and ``(n_in,)``, int64, distinct, on ``x``'s device.
        bias: ``(out,)`` or None.
        impl: which kernels: "torch", "triton", "cuda" or None for the best available.
        mode: "pro", or "dense": form the full gradient and slice it (plain LoSiA).
        profile: receives ``dy`` and ``x`` in the backward; ``x`` is then kept whole.
        groups: ``out_idx`` and ``in_idx`` come in aligned runs of this many, which kernels rely on; the number
            of outputs or inputs itself where all of them are chosen, in order.
        shared: gathers ``x[:, X_S]`` once for linears with this ``in_idx`` that are given the same ``x``.

    Returns:
        ``(..., out)``, bit for bit ``F.linear(x, weight, bias)``; autocast is honoured.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: in the backward, if the indices or the weight changed since the forward; when its
            gradients are differentiated again.
    """
    if mode not in ("pro", "dense"):
        raise ValueError(f'mode must be "pro" or "dense", got {mode!r}')
    for what, idx in (("out_idx", out_idx), ("in_idx", in_idx)):
        if idx.dim() != 1 or idx.dtype != torch.int64 or idx.device != x.device:
            raise ValueError(
                f"{what} must be 1-D int64 on x's {x.device}, "
                f"got {idx.dtype} {tuple(idx.shape)} on {idx.device}"
            )
    if subnet.shape != (out_idx.shape[0], in_idx.shape[0]):
        raise ValueError(
            f"subnet must be (len(out_idx), len(in_idx)) = ({out_idx.shape[0]}, {in_idx.shape[0]}), "
            f"got {tuple(subnet.shape)}"
        )
    if weight.dim() != 2:
        raise ValueError(f"weight must be (out, in), got {tuple(weight.shape)}")
    return checked(x, weight, subnet, out_idx, in_idx, bias, impl, mode, profile, groups, shared)


def checked(
    x: Tensor,
    weight: Tensor,
    subnet: Tensor,
    out_idx: Tensor,
    in_idx: Tensor,
    bias: Tensor | None,
    impl: str | None,
    mode: str,
    profile: GradientSink | None,
    groups: tuple[int, int],
    shared: SharedInputs | None,
) -> Tensor:
    """``subnet_linear`` for a layer, whose indices, subnet and weight are known to fit together."""
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., {weight.shape[1]}), got {tuple(x.shape)}")
    given = x
    if torch_ops.autocasts(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))

    eager = dispatch.eager()
    wants_subnet = torch.is_grad_enabled() and _wants_grad(subnet, eager)
    wants_weight = torch.is_grad_enabled() and _wants_grad(weight, eager)
    if not (wants_subnet or wants_weight or profile is not None):
        return F.linear(x, weight, bias)

    if not (eager or torch.compiler.is_compiling()):
        _refuse_nested_grad()
    flat = _rows(x.detach())
    x_sub = x_whole = None
    hooks = saved_tensors_hooks() if eager else None
    if wants_subnet and mode == "pro":
        x_sub = _columns(given, flat, in_idx, groups[1], impl, shared, hooks)
    if wants_weight or profile is not None or mode == "dense":
        x_whole = flat
    full = None
    if profile is not None and torch.compiler.is_compiling():
        full, profile = profile.full, None
    early = None
    if hooks is not None:
        kept = weight if x.requires_grad else None
        early = SavedEarly(kept, out_idx, in_idx, x_sub, x_whole, hooks)
    inputs = (
        x, weight, subnet, bias, full, out_idx, in_idx, x_sub, x_whole, impl, groups[0], profile, early
    )  # fmt: skip
    return (_apply if eager else _SubnetLinear.apply)(*inputs)  # type: ignore[no-any-return]


def _columns(
    x: Tensor,
    flat: Tensor,
    in_idx: Tensor,
    group: int,
    impl: str | None,
    shared: SharedInputs | None,
    hooks: Hooks | None,
) -> Tensor:
    """``x[:, X_S]`` of ``flat``, which is ``x`` as ``(T, in)``; ``x`` itself where all inputs are chosen."""
    if group == in_idx.shape[0] == flat.shape[1]:
        return flat
    if hooks is not None and keeps_nothing(hooks[0]):
        return flat.new_empty(()).expand(flat.shape[0], in_idx.shape[0])  # nobody reads it

    if shared is None or torch.compiler.is_compiling():  # a compiler makes equal gathers one
        return _gather(flat, in_idx, group, impl)
    return shared.columns(x, flat, lambda flat: _gather(flat, in_idx, group, impl))


def _gather(flat: Tensor, in_idx: Tensor, group: int, impl: str | None) -> Tensor:
    if dispatch.plain(flat):
        return dispatch.function("gather_columns", flat, impl)(flat, in_idx, group)
    if dispatch.left_to_compiler(impl, group):
        return torch_ops.gather_columns(flat, in_idx)
    return torch.ops.losia_pro.gather_columns(flat, in_idx, group=group, impl=impl)  # type: ignore[no-any-return]


def _rows(t: Tensor) -> Tensor:
    """``(..., columns)`` as ``(T, columns)``."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _wants_grad(t: Tensor, eager: bool) -> bool:
    """Whether ``t`` requires grad, at whatever level of ``torch.func``'s transforms: inside a ``vmap``,
    a tensor does not say that what it wraps does."""
    if not (eager or torch.compiler.is_compiling()):
        while not t.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(t):
            t = torch._C._functorch.get_unwrapped(t)
    return t.requires_grad


class _SubnetLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        subnet: Tensor,
        bias: Tensor | None,
        full: Tensor | None,
        out_idx: Tensor,
        in_idx: Tensor,
        x_sub: Tensor | None,
        x_whole: Tensor | None,
        impl: str | None,
        out_group: int,
        profile: GradientSink | None,
        early: SavedEarly | None,
    ) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, subnet, bias, full, out_idx, in_idx, x_sub, x_whole = inputs[:9]
        ctx.impl, ctx.out_group, ctx.profile, ctx.early = inputs[9:]
        eager = dispatch.eager()
        if ctx.early is None:
            kept_weight = weight if _wants_grad(x, eager) else None
            ctx.save_for_backward(kept_weight, out_idx, in_idx, x_sub, x_whole)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs[1:5]]
        ctx.trained = (weight, subnet) if eager else None

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors if ctx.early is None else ctx.early.tensors()
        weight, out_idx, in_idx, x_sub, x_whole = saved
        wants_x, wants_weight, wants_subnet, wants_bias, wants_full = ctx.needs_input_grad[:5]
        dx = d_weight = d_subnet = d_bias = d_full = None
        weight_dtype, subnet_dtype, bias_dtype, full_dtype = ctx.dtypes
        flat = _rows(dy)
        if wants_x:
            dx = dy @ (weight if weight.dtype == dy.dtype else weight.to(dy.dtype))
        if wants_subnet and x_sub is not None:
            d_subnet = _subnet_grad(flat, x_sub, out_idx, ctx.out_group, subnet_dtype, ctx.impl)
        elif wants_subnet:
            dense = torch_ops.product(flat, x_whole, subnet_dtype)
            d_subnet = dense.index_select(0, out_idx).index_select(1, in_idx)
        if wants_weight:
            d_weight = torch_ops.product(flat, x_whole, weight_dtype)
        if wants_bias:
            d_bias = flat.sum(0, dtype=bias_dtype)
        if wants_full:
            d_full = torch_ops.product(flat, x_whole, full_dtype)
        if ctx.profile is not None and _asks_for_subnet(ctx):
            ctx.profile.add(flat, x_whole)
        grads = dx, d_weight, d_subnet, d_bias, d_full
        if torch.is_grad_enabled() and ctx.trained is not None:
            grads = _Once.apply(*ctx.trained, dy, *grads)
        return *grads, *[None] * 8


def _asks_for_subnet(ctx: Any) -> bool:
    """Whether a backward gives the subnet its gradient; ``torch.autograd.grad`` may ask for others' alone.

    Raises:
        RuntimeError: within ``torch.func``, whose gradients are no step's before the loop takes them for one.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "a profiled layer takes the gradients of backward(), not those of torch.func: train with period=None there"
        )
    node = ctx.next_functions[2][0]
    try:
        return node is None or torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it cannot tell of a leaf that torch.autograd.grad itself is asked for
        return True


def _subnet_grad(
    dy: Tensor,
    x_sub: Tensor,
    out_idx: Tensor,
    group: int,
    out_dtype: torch.dtype,
    impl: str | None,
) -> Tensor:
    if dispatch.plain(dy) and dy.dtype == x_sub.dtype:
        product = dispatch.function("subnet_grad", dy, impl, group, out_dtype=out_dtype)
        return product(dy, x_sub, out_idx, out_dtype, group)
    if dispatch.left_to_compiler(impl, 1 if group == dy.shape[1] else group):
        return torch_ops.subnet_grad(dy, x_sub, out_idx, out_dtype, group)
    return torch.ops.losia_pro.subnet_grad(  # type: ignore[no-any-return]
        dy, x_sub, out_idx, group=group, out_dtype=out_dtype, impl=impl
    )


# What Function.apply calls in the end: before, it binds default arguments by inspection.
_apply = super(torch.autograd.Function, _SubnetLinear).apply  # type: ignore[misc]

_ONCE = (
    "subnet_linear can be differentiated once: its gradients have no derivative with respect to the "
    "subnet; for a gradient penalty or a Hessian use F.linear on the dense weight"
)


class _Once(torch.autograd.Function):
    """Passes gradients on whose own backward is an error, so that ``create_graph=True`` can never give
    a derivative that lacks the parts which run through the subnet."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.detach() for g in tensors[-5:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # type: ignore[override]
        raise RuntimeError(_ONCE)


def _refuse_nested_grad() -> None:
    """The same for ``torch.func``, where every backward is differentiable: two levels are refused."""
    levels = [i.key() for i in torch._C._functorch.get_interpreter_stack() or ()]
    if levels.count(torch._C._functorch.TransformType.Grad) > 1:
        raise RuntimeError(_ONCE)
