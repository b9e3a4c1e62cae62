"""Which implementation of an op answers.

Every op has the implementations "torch" (``torch_ops``), and, where they exist and can run, "triton"
(``losia_pro.kernels``) and "cuda" (the compiled module ``losia_pro._cuda``). ``impl=None`` takes the
first usable of ``PREFERENCE``, or of ``SPECIAL`` for the operands that it names; ``impl="..."`` takes that one or
raises; the variable ``LOSIA_IMPL``, read at import, names one for the whole process, and where it cannot run a warning
says once what runs instead.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import torch_ops
from .gathering import SHORT

IMPLS = ("torch", "triton", "cuda")

# Which implementation answers on a CUDA device when none is named, by `losia-pro bench kernels`; elsewhere "torch".
# Where Triton and CUDA take the same time on the device, CUDA takes less of the host's.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "gather_columns": ("cuda", "triton", "torch"),
    "subnet_grad": ("cuda", "triton", "torch"),
    "importance_update_": ("triton", "cuda", "torch"),
    "write_back_": ("cuda", "triton", "torch"),
    "adamw_": ("cuda", "triton", "torch"),  # no op of torch.ops: an optimizer's step is not traced
    "lerp_": ("cuda", "triton", "torch"),  # nor is what follows it
}
SMALL = 2**20
# Which answers instead, and of what. A small weight is too few large tiles for Triton: on an H200, 2048 x 256 takes it
# 40.8 us and CUDA 21.9 for 8192 tokens, 8.7 and 7.6 for 512, and 4096 x 1024 takes them 99 and 103 for 8192; SMALL
# lies between the two.
SPECIAL: dict[str, tuple[str, tuple[str, ...]]] = {
    "subnet_grad": (f"aligned runs, more than {SHORT} tokens", ("triton", "cuda", "torch")),
    "importance_update_": (f"weights of at most {SMALL} entries", ("cuda", "triton", "torch")),
}
# No kernel of theirs takes fp64; "torch" does.
NOT_IN_FP64 = ("subnet_grad", "importance_update_", "lerp_")

IMPL = os.environ.get("LOSIA_IMPL") or None
DEBUG = os.environ.get("LOSIA_DEBUG") == "1"


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


def resolve(
    op: str, device: torch.device | str, impl: str | None = None, special: bool = False
) -> str:
    """The implementation that answers ``op`` on ``device``, for operands of SPECIAL or not; see the module's
    docstring.

    Raises:
        ValueError: ``impl`` is no implementation's name.
        RuntimeError: ``impl`` cannot run here.
    """
    device = torch.device(device)
    asked = impl or IMPL
    if asked is None:
        if device.type != "cuda":
            return "torch"
        order = SPECIAL[op][1] if special and op in SPECIAL else PREFERENCE[op]
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


def resolve_special(op: str, device: torch.device | str) -> tuple[str, str] | None:
    """Which other implementation answers ``op`` on ``device`` for some operands, and for which; None where one answers
    all."""
    other = resolve(op, device, special=True)
    return None if other == resolve(op, device) else (other, SPECIAL[op][0])


@functools.cache
def _warn_fallback(op: str, asked: str, device: str, why: str) -> None:
    warnings.warn(
        f"losia_pro: LOSIA_IMPL={asked} cannot run {op} on {device} ({why}); using torch",
        RuntimeWarning,
        stacklevel=4,
    )


def function(
    op: str,
    like: Tensor,
    impl: str | None,
    group: int = 1,
    entries: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Callable[..., Tensor]:
    """The function that answers for operands like ``like``, of its device, dtype and number of tokens: for runs of
    ``group`` and a result in ``out_dtype``, or for a weight of so many ``entries``."""
    special = group > 1 and like.shape[0] > SHORT if entries is None else entries <= SMALL
    double = torch.float64 in (like.dtype, out_dtype)
    return _chosen(op, like.device, impl, double, special, IMPL)


@functools.cache
def _chosen(
    op: str,
    device: torch.device,
    impl: str | None,
    double: bool,
    special: bool,
    everywhere: str | None,
) -> Callable[..., Tensor]:
    """Looked up once, because asking a device what it can do takes its time."""
    if double and impl is None and op in NOT_IN_FP64:
        impl = "torch"
    chosen = resolve(op, device, impl, special)
    module = torch_ops if chosen == "torch" else _module(chosen)[0]
    return getattr(module, op)  # type: ignore[no-any-return]


def eager() -> bool:
    """Whether neither a compiler traces nor one of ``torch.func``'s transforms is at work."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def plain(t: Tensor) -> bool:
    """Whether an op may be called as the Python function that answers, its operands being checked: nothing is
    there to see it go by, and the dispatcher would take time for nothing."""
    return eager() and not (DEBUG or torch._C._len_torch_dispatch_stack() or type(t) is not Tensor)


def left_to_compiler(impl: str | None, group: int) -> bool:
    """Whether the compiler makes the kernels of the graph that it traces: of single neurons, where no
    implementation was asked for.

    It sees what it may fuse, drop or recompute, and recomputes a gather whose ``x`` it keeps for another's sake: a
    compiled step of LLaMA-2 7B took an H200 414 ms and 42.5 GB so, 416 ms and 44.6 GB with the ops (results/tried/).
    """
    return impl is None and IMPL is None and group == 1 and torch.compiler.is_compiling()
