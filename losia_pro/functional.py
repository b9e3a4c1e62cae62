"""The layer as a differentiable function: a dense forward, a compact gradient."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops


class GradientSink(Protocol):
    """Takes a profiled layer's operands: its full gradient is ``dy^T x``, formed when it is needed."""

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

    Returns:
        ``(..., out)``, bit for bit ``F.linear(x, weight, bias)``; autocast is honoured.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: in the backward, if the indices or the weight changed since the forward.
    """
    if subnet.shape != (out_idx.shape[0], in_idx.shape[0]):
        raise ValueError(
            f"subnet must be (len(out_idx), len(in_idx)) = ({out_idx.shape[0]}, {in_idx.shape[0]}), "
            f"got {tuple(subnet.shape)}"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., {weight.shape[1]}), got {tuple(x.shape)}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))

    wants_subnet = subnet.requires_grad and torch.is_grad_enabled()
    wants_weight = weight.requires_grad and torch.is_grad_enabled()
    if not (wants_subnet or wants_weight or profile is not None):
        return F.linear(x, weight, bias)

    whole = wants_weight or profile is not None or mode == "dense"
    flat = x.detach().reshape(-1, x.shape[-1])
    x_sub = None
    if wants_subnet and mode == "pro":
        x_sub = torch.ops.losia_pro.gather_columns(flat, in_idx, impl=impl)
    return _SubnetLinear.apply(  # type: ignore[no-any-return]
        x,
        weight,
        subnet,
        bias,
        out_idx,
        in_idx,
        x_sub,
        flat if whole else None,
        impl,
        profile,
    )


class _SubnetLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        subnet: Tensor,
        bias: Tensor | None,
        out_idx: Tensor,
        in_idx: Tensor,
        x_sub: Tensor | None,
        x_whole: Tensor | None,
        impl: str | None,
        profile: GradientSink | None,
    ) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, subnet, bias, out_idx, in_idx, x_sub, x_whole, impl, profile = inputs
        ctx.save_for_backward(weight if x.requires_grad else None, out_idx, in_idx, x_sub, x_whole)
        ctx.weight_dtype, ctx.subnet_dtype = weight.dtype, subnet.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.impl, ctx.profile = impl, profile

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, out_idx, in_idx, x_sub, x_whole = ctx.saved_tensors
        wants_x, wants_weight, wants_subnet, wants_bias = ctx.needs_input_grad[:4]
        dx = d_weight = d_subnet = d_bias = None
        flat = dy.reshape(-1, dy.shape[-1])
        if wants_x:
            dx = dy @ weight.to(dy.dtype)
        if wants_subnet and x_sub is not None:
            d_subnet = torch.ops.losia_pro.subnet_grad(
                flat, x_sub, out_idx, out_dtype=ctx.subnet_dtype, impl=ctx.impl
            )
        elif wants_subnet:
            dense = ops._product(flat, x_whole, ctx.subnet_dtype)
            d_subnet = dense.index_select(0, out_idx).index_select(1, in_idx)
        if wants_weight:
            d_weight = ops._product(flat, x_whole, ctx.weight_dtype)
        if wants_bias:
            d_bias = flat.sum(0, dtype=ctx.bias_dtype)
        if ctx.profile is not None:
            ctx.profile.add(flat, x_whole)
        return dx, d_weight, d_subnet, d_bias, None, None, None, None, None, None
