"""The CUDA kernels of ``csrc/``, as the functions behind ``impl="cuda"``: buffers, pointers and streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor

from . import reference, torch_ops
from .tables import adamw_tables, check_contiguous, lerp_tables, tables

try:
    _cuda = import_module("losia_pro._cuda")
except ModuleNotFoundError as error:
    raise ImportError(
        "not built: reinstall losia-pro with nvcc on PATH and LOSIA_BUILD_CUDA=1"
    ) from error
except ImportError as error:
    raise ImportError(f"losia_pro._cuda does not load: {error}") from error

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # csrc/losia.h

# Entries of a product at a time: 32 MiB in fp32, half of an H200's L2, so that they are still there when they are read.
# Of few rows the library's product is slow.
_CHUNK, _LEAST_ROWS = 2**23, 256


def archs() -> str:
    """What the module was built for, as CMake names it: ``80-real`` machine code, ``120`` with PTX too."""
    return str(_cuda.ARCHS)


def why_not(device: torch.device) -> str:
    """Why the CUDA kernels cannot run on ``device``; empty if they can."""
    if device.type != "cuda":
        return f"CUDA kernels run on CUDA devices, not on {device.type}"
    if torch.version.hip is not None:
        return "not built for ROCm"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if not runs_on(archs(), major * 10 + minor):
        return f"built for {archs()}, {device} has compute capability {major}.{minor}"
    return ""


def runs_on(built: str, capability: int) -> bool:
    """Whether a build runs on a device: machine code of its major version, no newer, or older PTX."""
    for arch in built.split(","):
        number, _, kind = arch.partition("-")
        same_major = int(number) // 10 == capability // 10
        if int(number) <= capability and ((same_major and kind != "virtual") or kind != "real"):
            return True
    return False


def gather_columns(x: Tensor, in_idx: Tensor, group: int = 1) -> Tensor:
    """``x[:, X_S]``: ``x`` ``(T, in)`` of any strides, ``in_idx`` ``(n_in,)`` int64, in aligned runs of
    ``group``; result ``(T, n_in)``."""
    in_idx = in_idx.contiguous()
    (tokens, _), n_in, element = x.shape, in_idx.shape[0], x.element_size()
    out = x.new_empty(tokens, n_in)
    if tokens and n_in:
        stride_t, stride_c = (stride * element for stride in x.stride())
        step = _step(group, element) if stride_c == element else 1
        if (stride_t | n_in * element | x.data_ptr()) % (step * element):
            step = 1
        _launch(
            _cuda.gather_columns,
            x.device,
            x.data_ptr(),
            in_idx.data_ptr(),
            out.data_ptr(),
            tokens,
            n_in,
            stride_t,
            stride_c,
            step * element,
            step,
        )
    return out


def _step(group: int, element: int) -> int:
    """How many elements of a run of ``group`` are moved at once: as many as 16 bytes hold, if runs are made of
    such units."""
    step = 16 // element
    return step if group % step == 0 else 1


def subnet_grad(
    dy: Tensor, x_sub: Tensor, out_idx: Tensor, out_dtype: torch.dtype, group: int = 1
) -> Tensor:
    """``dy[:, Y_S]^T x_S`` with fp32 accumulation: this module's gather, and the library's product.

    ``dy`` ``(T, out)``, ``x_sub`` ``(T, n_in)``, ``out_idx`` ``(n_out,)`` int64, in aligned runs of ``group``;
    where that is the number of ``dy``'s columns, all are chosen, in order. Result ``(n_out, n_in)`` in
    ``out_dtype``. Both operands may have any strides.

    Raises:
        TypeError: a dtype other than fp32, bf16 or fp16, or operands of two dtypes.
    """
    torch_ops.check_operands("cuda", dy, x_sub, out_dtype)
    whole = group == out_idx.shape[0] == dy.shape[1]
    chosen = dy if whole else gather_columns(dy, out_idx, group)
    return torch_ops.product(chosen, x_sub, out_dtype)


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
    """One step of smoothed importance and uncertainty, in place: the library's product of some rows at a time,
    and this module's update of those rows.

    ``importance`` and ``uncertainty`` are ``(out, in)`` in fp32 or bf16, ``grad`` is so in fp32, all contiguous;
    ``weight`` is ``(out, in)``, and ``dy`` ``(T, out)`` and ``x`` ``(T, in)`` are of one dtype, with any strides.

    Raises:
        TypeError: a dtype that the kernel does not take.
        ValueError: ``importance``, ``uncertainty`` or ``grad`` is not contiguous.
    """
    kept = importance.dtype
    if weight.dtype not in torch_ops.PRODUCT_DTYPES or kept not in (torch.float32, torch.bfloat16):
        raise TypeError(
            "the cuda importance_update_ takes fp32, bf16 or fp16 weights and fp32 or bf16 importance; "
            f"got {weight.dtype} and {kept}; use impl='torch'"
        )
    if uncertainty.dtype != kept or (grad is not None and grad.dtype != torch.float32):
        raise TypeError(
            f"uncertainty must be {kept} and grad fp32, got {uncertainty.dtype} and "
            f"{None if grad is None else grad.dtype}"
        )
    check_contiguous(importance=[importance], uncertainty=[uncertainty], grad=[grad])
    rows, columns = weight.shape
    at_once = max(_LEAST_ROWS, _CHUNK // max(1, columns) // 128 * 128)
    for first in range(0, rows, at_once):
        part = slice(first, first + at_once)
        product = torch_ops.product(dy[:, part], x, torch.float32)
        _launch(
            _cuda.importance_update,
            weight.device,
            importance[part].data_ptr(),
            uncertainty[part].data_ptr(),
            weight[part].data_ptr(),
            product.data_ptr(),
            0 if grad is None else grad[part].data_ptr(),
            *product.shape,
            *weight.stride(),
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            scale,
            reference.VARIANTS.index(variant),
            DTYPES[weight.dtype],
            DTYPES[kept],
        )
        del product  # so that the next one takes its place, in memory and in L2


def write_back_(
    weights: Sequence[Tensor],
    subnets: Sequence[Tensor],
    out_idx: Sequence[Tensor],
    in_idx: Sequence[Tensor],
    check: Callable[[], None],
    key: int | None = None,
) -> None:
    """``W[Y_S][:, X_S] = subnet`` for each of several layers, rounded to nearest in the weight's dtype; with a
    ``key``, fp32 stochastically to bf16.

    Weights may have any strides; subnets and indices are contiguous. One launch for each pair of dtypes. ``check``
    judges layers that were not written before.

    Raises:
        ValueError: a subnet or an index that is not contiguous.
        RuntimeError: subnets that are neither fp32 nor bf16 or fp64 as their weights are.
    """
    for table in tables(weights, subnets, out_idx, in_idx, int(_cuda.PART), check):
        _launch(
            _cuda.write_back,
            table.layers.device,
            table.layers.data_ptr(),
            table.parts.data_ptr(),
            table.parts.shape[0],
            table.columns.bit_length() - 1,
            DTYPES[table.weight.dtype],
            DTYPES[table.subnet.dtype],
            key or 0,
        )


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    keys: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """See ``torch_ops.adamw_``; all tensors are contiguous. One launch.

    Raises:
        ValueError: a tensor that is not contiguous.
    """
    tables = adamw_tables(
        (params, grads, exp_avgs, exp_avg_sqs),
        steps,
        keys,
        lr,
        (beta1, beta2),
        int(_cuda.ADAMW_PART),
    )
    _launch(
        _cuda.adamw,
        params[0].device,
        *(t.data_ptr() for t in tables),
        tables[-1].shape[0],
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        -1.0 if maximize else 1.0,
    )


def lerp_(
    tensors: Sequence[Tensor], others: Sequence[Tensor], weight: float | Tensor, key: int
) -> None:
    """See ``torch_ops.lerp_``; all tensors are contiguous and on one device. One launch.

    Raises:
        ValueError: a tensor that is not contiguous, and pairs of two sizes.
        TypeError: dtypes that it does not take, or several.
    """
    made = lerp_tables(tensors, others, weight, key, int(_cuda.LERP_PART))
    _launch(
        _cuda.lerp,
        tensors[0].device,
        *(t.data_ptr() for t in made),
        made[-1].shape[0],
        DTYPES[tensors[0].dtype],
        DTYPES[others[0].dtype],
    )


def _launch(kernel: Callable[..., None], device: torch.device, *arguments: object) -> None:
    """A kernel on a device and its current stream. The module makes that device the thread's current one, PyTorch's
    too, so where it was another it is put back."""
    index = device.index
    assert index is not None
    stream = torch._C._cuda_getCurrentRawStream(index)  # sooner than current_stream
    if torch._C._cuda_getDevice() == index:
        kernel(*arguments, index, stream)
    else:
        with torch.cuda.device(index):
            kernel(*arguments, index, stream)
