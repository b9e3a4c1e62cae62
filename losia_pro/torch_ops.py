"""The kernels' operations in plain PyTorch: the implementation "torch", complete on every device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from . import reference, rounding


def gather_columns(x: Tensor, in_idx: Tensor, group: int = 1) -> Tensor:
    """``x[:, X_S]``: ``x`` ``(T, in)``, ``in_idx`` ``(n_in,)`` int64; result ``(T, n_in)`` in ``x``'s dtype.

    Runs of ``group`` gain nothing here.
    """
    return x.index_select(1, in_idx)


def subnet_grad(
    dy: Tensor, x_sub: Tensor, out_idx: Tensor, out_dtype: torch.dtype, group: int = 1
) -> Tensor:
    """``dy[:, Y_S]^T x_S`` with fp32 accumulation (paper: *LoSiA-Pro*).

    ``dy`` ``(T, out)``, ``x_sub`` ``(T, n_in)``, ``out_idx`` ``(n_out,)`` int64; result
    ``(n_out, n_in)`` in ``out_dtype``. Where all outputs are chosen, ``dy`` is read as it lies, and the
    small result put in ``out_idx``'s order unless ``group`` says that it is in order.
    """
    if group == out_idx.shape[0] == dy.shape[1]:
        return product(dy, x_sub, out_dtype)
    if out_idx.numel() == dy.shape[1]:
        return product(dy, x_sub, out_dtype).index_select(0, out_idx)
    return product(dy.index_select(1, out_idx), x_sub, out_dtype)


def importance_update_(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    dy: Tensor,
    x: Tensor,
    grad: Tensor | None,
    beta1: float,
    beta2: float,
    variant: str,
    scale: float = 1.0,
) -> None:
    """One step of smoothed importance and uncertainty, in place, from ``g = scale (dy^T x + grad)``.

        I = importance of (g, W);  I_i = b1 I_i + (1 - b1) I;  U_i = b2 U_i + (1 - b2) |I - I_i|

    ``importance``, ``uncertainty``, ``grad`` and ``weight`` are ``(out, in)``; ``dy`` ``(T, out)`` and
    ``x`` ``(T, in)`` belong to the step's last micro-batch and ``grad`` sums those before it.
    """
    wide = torch.promote_types(importance.dtype, torch.float32)
    g = product(dy, x, wide)
    if grad is not None:
        g += grad
    if scale != 1.0:
        g *= scale
    current = reference.importance(g, weight, variant).to(wide)
    smoothed = importance.to(wide).mul_(beta1).add_(current, alpha=1 - beta1)
    importance.copy_(smoothed)
    current.sub_(smoothed).abs_()
    uncertainty.copy_(uncertainty.to(wide).mul_(beta2).add_(current, alpha=1 - beta2))


def write_back_(
    weights: Sequence[Tensor],
    subnets: Sequence[Tensor],
    out_idx: Sequence[Tensor],
    in_idx: Sequence[Tensor],
    check: Callable[[], None],
    key: int | None = None,
) -> None:
    """``W[Y_S][:, X_S] = subnet`` for each of several layers, rounded to nearest in the weight's dtype.

    With a ``key``, fp32 subnets are rounded stochastically into bf16 weights; entries are numbered through all
    layers.
    """
    check()
    first = 0
    for weight, subnet, rows, columns in zip(weights, subnets, out_idx, in_idx, strict=True):
        if key is not None and (weight.dtype, subnet.dtype) == (torch.bfloat16, torch.float32):
            random = rounding.noise(rounding.numbers_of(subnet, first), key)
            value = rounding.to_bf16(subnet, random)
        else:
            value = subnet.to(weight.dtype)
        weight.index_put_((rows.unsqueeze(1), columns), value)
        first += subnet.numel()


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    keys: Sequence[int],
    **constants: Any,
) -> None:
    """``torch.optim.AdamW``'s step on bf16 tensors, in fp32; results are rounded stochastically.

    All four are of one shape for each parameter; ``steps`` counts this step, from 1. By its key, each entry has 32
    random bits: the parameter is rounded by the lower half, the first moment by the upper one, and the second by the
    lower half of ``mix`` of them.
    """
    for *short, step, key in zip(params, grads, exp_avgs, exp_avg_sqs, steps, keys, strict=True):
        p, g, m, v = ([t.float()] for t in short)
        before = [torch.tensor(step - 1.0)]
        adamw(p, g, m, v, [], before, foreach=False, amsgrad=False, **constants)
        random = rounding.noise(rounding.numbers_of(short[0]), key)
        for k, value, bits in ((0, p, random), (2, m, random >> 16), (3, v, rounding.mix(random))):
            short[k].copy_(rounding.to_bf16(value[0], bits))


def lerp_(
    tensors: Sequence[Tensor], others: Sequence[Tensor], weight: float | Tensor, key: int
) -> None:
    """``t + weight (other - t)`` for each tensor, in place; ``others`` have the same shapes.

    From a ``weight`` of 1/2 on it is computed as ``other + (weight - 1) (other - t)``, so that both ends are exact.
    ``weight`` is a number, or a tensor of one, which is read where it is. All tensors are of one dtype, all others
    of one:

    - bf16, others too: computed in fp32, the product rounded before the sum, and rounded stochastically. By ``key``,
      each entry has random bits of its own: those of all tensors are numbered one after the other.
    - fp32, others fp32, bf16 or fp16; here also fp64: computed in it, the product rounded before the sum, and
      ``key`` is not read.
    """
    if not tensors:
        return
    bf16 = tensors[0].dtype == torch.bfloat16
    w = torch.as_tensor(weight, dtype=torch.float32 if bf16 else tensors[0].dtype)
    number = w.item() if w.is_cpu else None  # one that is on a device is not waited for
    first = 0
    factor: Tensor | float
    for t, other in zip(tensors, others, strict=True):
        near, far = (t.float(), other.float()) if bf16 else (t, other.to(t.dtype))
        if number is None:
            small = w.abs() < 0.5
            start, factor = torch.where(small, near, far), torch.where(small, w, w - 1)
        else:
            start, factor = (near, number) if abs(number) < 0.5 else (far, number - 1)
        value = start + (far - near) * factor
        if bf16:
            value = rounding.to_bf16(value, rounding.noise(rounding.numbers_of(t, first), key))
        t.copy_(value)
        first += t.numel()


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a^T b`` accumulated and returned in ``dtype`` or better, never rounded to less on the way
    (not by an autocast region around the backward either)."""
    if autocasts(a.device):
        with torch.autocast(a.device.type, enabled=False):
            return product(a, b, dtype)
    if a.dtype == b.dtype == dtype:
        return a.T @ b
    if a.is_cuda and dtype == torch.float32 and a.dtype == b.dtype:
        columns = b.shape[1]
        if columns % 8 == 0:
            return torch.mm(a.T, b, out_dtype=dtype)
        # The library is slow where rows are no multiple of 16 bytes: 4096 x 172 takes an H200 70 us, so 39.
        padded = F.pad(b, (0, -columns % 64))
        return torch.mm(a.T, padded, out_dtype=dtype)[:, :columns].contiguous()
    wide = torch.promote_types(dtype, torch.float32)
    return (a.to(wide).T @ b.to(wide)).to(dtype)


def autocasts(device: torch.device) -> bool:
    """Whether an autocast region is in force for ``device``; for meta there is none."""
    return (
        torch._C._is_any_autocast_enabled()
        and device.type != "meta"
        and torch.is_autocast_enabled(device.type)
    )


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a^T b``, accumulated in ``total``'s dtype, without a temporary of its size where the library
    can."""
    if a.is_cuda and total.dtype == torch.float32 and a.dtype == b.dtype != torch.float32:
        torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(product(a, b, total.dtype))


PRODUCT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels' products


def check_operands(who: str, dy: Tensor, x_sub: Tensor, out_dtype: torch.dtype) -> None:
    """Raise a TypeError for dtypes that the kernels' ``subnet_grad`` cannot take."""
    if dy.dtype == x_sub.dtype and dy.dtype in PRODUCT_DTYPES and out_dtype in PRODUCT_DTYPES:
        return
    for what, dtype in (("dy", dy.dtype), ("x_sub", x_sub.dtype), ("out_dtype", out_dtype)):
        if dtype not in PRODUCT_DTYPES:
            raise TypeError(
                f"the {who} subnet_grad takes fp32, bf16 and fp16, got {what} {dtype}; use impl='torch'"
            )
    raise TypeError(f"dy is {dy.dtype}, x_sub {x_sub.dtype}: they must be of one dtype")
