"""The kernels' schemas: ``torch.ops.losia_pro.*``, their fakes, and which implementation answers.

``group`` of ``gather_columns`` and ``subnet_grad`` says that the indices come in aligned runs of that many,
``[k group, (k + 1) group)``; where it is the number of columns, all are chosen, in order. Kernels rely on it.

Every op has the implementations "torch" (``torch_ops``), and, where they exist and can run, "triton"
(``losia_pro.kernels``) and "cuda" (the compiled module ``losia_pro._cuda``). ``impl=None`` takes the
first usable of ``PREFERENCE``; ``impl="..."`` takes that one or raises; the variable ``LOSIA_IMPL`` names
one for the whole process, and where it cannot run a warning says once what runs instead.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference, torch_ops
from .selection import are_runs

OPS = ("gather_columns", "subnet_grad", "importance_update_", "write_back_")
IMPLS = ("torch", "triton", "cuda")

# Which implementation answers on a CUDA device when none is named, by `losia-pro bench kernels`; elsewhere "torch".
# Where Triton and CUDA take the same time on the device, CUDA takes less of the host's.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "gather_columns": ("cuda", "triton", "torch"),
    "subnet_grad": ("cuda", "triton", "torch"),
    "importance_update_": ("triton", "cuda", "torch"),
    "write_back_": ("cuda", "triton", "torch"),
}
RUNS = {"subnet_grad": ("triton", "cuda", "torch")}  # where indices come in aligned runs
PRODUCTS = ("subnet_grad", "importance_update_")  # no kernel of theirs takes fp64; "torch" does

_lib = torch.library.Library("losia_pro", "DEF")
_lib.define("gather_columns(Tensor x, Tensor in_idx, *, int group=1, str? impl=None) -> Tensor")
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
    "str? impl=None) -> ()"
)


def compact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a subnet and of its gradient: fp64 for fp64 weights, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- which implementation -------------------------------------------------------------------------


@functools.cache
def _module(impl: str) -> tuple[object | None, str]:
    """The module that holds an implementation, or None and why not."""
    name = {"triton": "losia_pro.kernels.launch", "cuda": "losia_pro._cuda_ops"}[impl]
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, str(error)


def _why_not(op: str, device: torch.device, impl: str) -> str:
    """Why an implementation cannot answer here; empty if it can."""
    if impl == "torch":
        return ""
    module, missing = _module(impl)
    if module is None:
        return missing
    if not hasattr(module, op):
        return f"there is no {impl} version of {op}"
    return module.why_not(device)  # type: ignore[attr-defined,no-any-return]


def explain(op: str, device: torch.device | str) -> list[tuple[str, bool, str]]:
    """For each implementation: its name, whether it can run ``op`` on ``device``, and why not."""
    device = torch.device(device)
    return [(i, not (why := _why_not(op, device, i)), why) for i in IMPLS]


def resolve(op: str, device: torch.device | str, impl: str | None = None, group: int = 1) -> str:
    """The implementation that answers ``op`` on ``device``; see the module's docstring.

    Raises:
        ValueError: ``impl`` is no implementation's name.
        RuntimeError: ``impl`` cannot run here.
    """
    device = torch.device(device)
    asked = impl or os.environ.get("LOSIA_IMPL") or None
    if asked is None:
        if device.type != "cuda":
            return "torch"
        order = RUNS.get(op, PREFERENCE[op]) if group > 1 else PREFERENCE[op]
        return next(i for i in order if not _why_not(op, device, i))
    if asked not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {asked!r}")
    why = _why_not(op, device, asked)
    if not why:
        return asked
    if impl is not None:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run on {device}: {why}")
    _warn_fallback(op, asked, str(device), why)
    return "torch"


@functools.cache
def _warn_fallback(op: str, asked: str, device: str, why: str) -> None:
    warnings.warn(
        f"losia_pro: LOSIA_IMPL={asked} cannot run {op} on {device} ({why}); using torch",
        RuntimeWarning,
        stacklevel=4,
    )


def _function(
    op: str, device: torch.device, impl: str | None, dtype: torch.dtype, group: int = 1
) -> Callable[..., Tensor]:
    double = impl is None and dtype == torch.float64 and op in PRODUCTS
    everywhere = os.environ.get("LOSIA_IMPL")
    return _chosen(op, device, "torch" if double else impl, min(group, 2), everywhere)


@functools.cache
def _chosen(
    op: str, device: torch.device, impl: str | None, group: int, everywhere: str | None
) -> Callable[..., Tensor]:
    """The function that answers; looked up once, because asking a device what it can do takes its time."""
    chosen = resolve(op, device, impl, group)
    module = torch_ops if chosen == "torch" else _module(chosen)[0]
    return getattr(module, op)  # type: ignore[no-any-return]


# --- the ops: checks at the door, then the chosen implementation ------------------------------------


def _check_index(what: str, idx: Tensor, like: Tensor, size: int, group: int = 1) -> None:
    if idx.dtype != torch.int64 or idx.dim() != 1:
        raise ValueError(f"{what} must be 1-D int64, got {idx.dtype} {tuple(idx.shape)}")
    if idx.device != like.device:
        raise ValueError(f"{what} is on {idx.device}, the data on {like.device}")
    if group < 1 or idx.shape[0] % group:
        raise ValueError(
            f"{what} has {idx.shape[0]} entries, which are not runs of group = {group}"
        )
    if os.environ.get("LOSIA_DEBUG") == "1" and idx.numel():
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
    return _function("gather_columns", x.device, impl, x.dtype)(x, in_idx, group)


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
    return _function("subnet_grad", dy.device, impl, dy.dtype, group)(
        dy, x_sub, out_idx, out_dtype, group
    )


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
    shape = (dy.shape[1], x.shape[1])
    for what, t in (
        ("importance", importance),
        ("uncertainty", uncertainty),
        ("weight", weight),
        ("grad", grad),
    ):
        if t is not None and t.shape != shape:
            raise ValueError(f"{what} must be (out, in) = {shape}, got {tuple(t.shape)}")
    if variant not in reference.VARIANTS:
        raise ValueError(f"variant must be one of {reference.VARIANTS}, got {variant!r}")
    update = _function("importance_update_", weight.device, impl, dy.dtype)
    update(importance, uncertainty, weight, dy, x, grad, beta1, beta2, variant, scale)


def _write_back_(
    weights: list[Tensor],
    subnets: list[Tensor],
    out_idx: list[Tensor],
    in_idx: list[Tensor],
    *,
    impl: str | None = None,
) -> None:
    check = functools.partial(_check_write_back, weights, subnets, out_idx, in_idx)
    if weights:
        function = _function("write_back_", weights[0].device, impl, weights[0].dtype)
        function(weights, subnets, out_idx, in_idx, check)
    else:
        check()


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
        _check_index("out_idx", rows, weight, weight.shape[0])
        _check_index("in_idx", columns, weight, weight.shape[1])
        if subnet.shape != (rows.shape[0], columns.shape[0]):
            raise ValueError(
                f"subnet must be (len(out_idx), len(in_idx)) = ({rows.shape[0]}, {columns.shape[0]}), "
                f"got {tuple(subnet.shape)}"
            )


for _op in OPS:
    _lib.impl(_op, globals()["_" + _op], "CompositeExplicitAutograd")


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


_FAKES: tuple[Callable[..., Any], ...] = (
    _fake_gather_columns,
    _fake_subnet_grad,
    _fake_in_place,
    _fake_in_place,
)
for _op, _fake in zip(OPS, _FAKES, strict=True):
    torch.library.register_fake(f"losia_pro::{_op}", _fake, lib=_lib)
