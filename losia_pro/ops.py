"""The kernels' schemas: ``torch.ops.losia_pro.*``, what they check, and their fakes.

``group`` of ``gather_columns`` and ``subnet_grad`` says that the indices come in aligned runs of that many,
``[k group, (k + 1) group)``; where it is the number of columns, all are chosen, in order. Kernels rely on it.
``seed`` of ``write_back_`` rounds fp32 subnets stochastically into bf16 weights (``rounding``): the same seed writes
the same bits, so that a write-back may run again. None rounds to nearest, as layers and ``Losia`` always do: what a
delta holds is then a function of the subnets alone.
``dispatch`` says which implementation answers. ``LOSIA_DEBUG=1``, read at import, checks what only the device
knows: that indices are in range, and in runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import dispatch, reference, rounding
from .dispatch import function
from .selection import are_runs

_lib = torch.library.Library("losia_pro", "DEF")
_lib.define(
    "gather_columns(Tensor x, Tensor in_idx, *, int group=1, str? impl=None) -> Tensor",
    # Any strides will do: bound to the trace's, Inductor writes x a second time for the op.
    tags=torch.Tag.flexible_layout,
)
_lib.define(
    "subnet_grad(Tensor dy, Tensor x_sub, Tensor out_idx, *, int group=1, "
    "ScalarType? out_dtype=None, str? impl=None) -> Tensor"
)
_lib.define(
    "importance_update_(Tensor(a!) importance, Tensor(b!) uncertainty, Tensor weight, Tensor dy, "
    "Tensor x, Tensor? grad, float beta1, float beta2, str variant, *, float scale=1.0, "
    "str? impl=None) -> ()"
)
_lib.define(
    "write_back_(Tensor(a!)[] weights, Tensor[] subnets, Tensor[] out_idx, Tensor[] in_idx, *, "
    "int? seed=None, str? impl=None) -> ()"
)


def compact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a subnet and of its gradient: fp64 for fp64 weights, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- the ops: checks at the door, then the chosen implementation ------------------------------------


def _check_device(what: str, t: Tensor, like: Tensor) -> None:
    if t.device != like.device:
        raise ValueError(f"{what} is on {t.device}, the data on {like.device}")


def _check_index(what: str, idx: Tensor, like: Tensor, size: int, group: int = 1) -> None:
    if idx.dtype != torch.int64 or idx.dim() != 1:
        raise ValueError(f"{what} must be 1-D int64, got {idx.dtype} {tuple(idx.shape)}")
    _check_device(what, idx, like)
    if group < 1 or idx.shape[0] % group:
        raise ValueError(
            f"{what} has {idx.shape[0]} entries, which are not runs of group = {group}"
        )
    if dispatch.DEBUG and idx.numel():
        low, high = torch.stack(idx.aminmax()).tolist()
        if low < 0 or high >= size:
            raise IndexError(f"{what} must be within [0, {size}), got {low}..{high}")
        if not are_runs(idx, group):
            raise IndexError(f"{what} must come in aligned runs of group = {group}")


def _check_matrix(what: str, t: Tensor) -> None:
    if t.dim() != 2 or not t.is_floating_point():
        raise ValueError(f"{what} must be a floating-point matrix, got {t.dtype} {tuple(t.shape)}")


def _gather_columns(
    x: Tensor, in_idx: Tensor, *, group: int = 1, impl: str | None = None
) -> Tensor:
    _check_matrix("x", x)
    _check_index("in_idx", in_idx, x, x.shape[1], group)
    return function("gather_columns", x, impl)(x, in_idx, group)


def _subnet_grad(
    dy: Tensor,
    x_sub: Tensor,
    out_idx: Tensor,
    *,
    group: int = 1,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    _check_matrix("dy", dy)
    _check_matrix("x_sub", x_sub)
    _check_index("out_idx", out_idx, dy, dy.shape[1], group)
    if dy.shape[0] != x_sub.shape[0] or dy.dtype != x_sub.dtype or dy.device != x_sub.device:
        raise ValueError(
            f"dy {dy.dtype} {tuple(dy.shape)} on {dy.device} and x_sub {x_sub.dtype} "
            f"{tuple(x_sub.shape)} on {x_sub.device} must agree in tokens, dtype and device"
        )
    out_dtype = out_dtype or compact_dtype(dy.dtype)
    product = function("subnet_grad", dy, impl, group, out_dtype=out_dtype)
    return product(dy, x_sub, out_idx, out_dtype, group)


def _importance_update_(
    importance: Tensor,
    uncertainty: Tensor,
    weight: Tensor,
    dy: Tensor,
    x: Tensor,
    grad: Tensor | None,
    beta1: float,
    beta2: float,
    variant: str,
    *,
    scale: float = 1.0,
    impl: str | None = None,
) -> None:
    _check_matrix("dy", dy)
    _check_matrix("x", x)
    if dy.shape[0] != x.shape[0]:
        raise ValueError(f"dy has {dy.shape[0]} tokens, x has {x.shape[0]}; they must agree")
    _check_device("x", x, dy)
    shape = (dy.shape[1], x.shape[1])
    for what, t in (
        ("importance", importance),
        ("uncertainty", uncertainty),
        ("weight", weight),
        ("grad", grad),
    ):
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{what} must be (out, in) = {shape}, got {tuple(t.shape)}")
        _check_device(what, t, dy)
    if variant not in reference.VARIANTS:
        raise ValueError(f"variant must be one of {reference.VARIANTS}, got {variant!r}")
    update = function("importance_update_", dy, impl, entries=weight.numel())
    update(importance, uncertainty, weight, dy, x, grad, beta1, beta2, variant, scale)


def _write_back_(
    weights: list[Tensor],
    subnets: list[Tensor],
    out_idx: list[Tensor],
    in_idx: list[Tensor],
    *,
    seed: int | None = None,
    impl: str | None = None,
) -> None:
    if seed is not None and any(weight.dtype == torch.float16 for weight in weights):
        raise ValueError(
            "weights are rounded stochastically to bf16 alone, got torch.float16; seed=None rounds to nearest"
        )
    key = None if seed is None else rounding.key_of(seed)
    check = functools.partial(_check_write_back, weights, subnets, out_idx, in_idx)
    if dispatch.DEBUG or not weights:
        check()
    if weights:
        like = next((weight for weight in weights if weight.is_cpu), weights[0])
        write = function("write_back_", like, impl)  # kernels write no weight that is on the CPU
        write(weights, subnets, out_idx, in_idx, check, key)
        increment_version(weights)  # kernels do not, and a backward would not see that they changed


def _check_write_back(
    weights: list[Tensor], subnets: list[Tensor], out_idx: list[Tensor], in_idx: list[Tensor]
) -> None:
    if not len(weights) == len(subnets) == len(out_idx) == len(in_idx):
        raise ValueError(
            f"{len(weights)} weights, {len(subnets)} subnets, {len(out_idx)} out_idx and "
            f"{len(in_idx)} in_idx must be equally many"
        )
    for weight, subnet, rows, columns in zip(weights, subnets, out_idx, in_idx, strict=True):
        _check_matrix("weight", weight)
        _check_device("subnet", subnet, weight)
        _check_index("out_idx", rows, weight, weight.shape[0])
        _check_index("in_idx", columns, weight, weight.shape[1])
        if subnet.shape != (rows.shape[0], columns.shape[0]):
            raise ValueError(
                f"subnet must be (len(out_idx), len(in_idx)) = ({rows.shape[0]}, {columns.shape[0]}), "
                f"got {tuple(subnet.shape)}"
            )


def _fake_gather_columns(
    x: Tensor, in_idx: Tensor, *, group: int = 1, impl: str | None = None
) -> Tensor:
    return x.new_empty(x.shape[0], in_idx.shape[0])


def _fake_subnet_grad(
    dy: Tensor,
    x_sub: Tensor,
    out_idx: Tensor,
    *,
    group: int = 1,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    dtype = out_dtype or compact_dtype(dy.dtype)
    return dy.new_empty(out_idx.shape[0], x_sub.shape[1], dtype=dtype)


def _fake_in_place(*args: object, **kwargs: object) -> None:
    return None


OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gather_columns": (_gather_columns, _fake_gather_columns),
    "subnet_grad": (_subnet_grad, _fake_subnet_grad),
    "importance_update_": (_importance_update_, _fake_in_place),
    "write_back_": (_write_back_, _fake_in_place),
}
for _op, (_impl, _fake) in OPS.items():
    _lib.impl(_op, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"losia_pro::{_op}", _fake, lib=_lib)
