"""The CUDA kernels of ``csrc/``, as the functions behind ``impl="cuda"``: buffers, pointers and streams."""

from __future__ import annotations

import functools
from importlib import import_module

import torch
from torch import Tensor

try:
    _cuda = import_module("losia_pro._cuda")
except ModuleNotFoundError as error:
    raise ImportError(
        "not built: reinstall losia-pro with nvcc on PATH and LOSIA_BUILD_CUDA=1"
    ) from error
except ImportError as error:
    raise ImportError(f"losia_pro._cuda does not load: {error}") from error

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/losia.h
_MIN_SPLIT_TOKENS = 256


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
    """``x[:, X_S]``: ``x`` ``(T, in)`` of any strides, ``in_idx`` ``(n_in,)`` int64; result ``(T, n_in)``."""
    in_idx = in_idx.contiguous()
    out = torch.empty(x.shape[0], in_idx.shape[0], dtype=x.dtype, device=x.device)
    if out.numel():
        _cuda.gather_columns(
            x.data_ptr(),
            in_idx.data_ptr(),
            out.data_ptr(),
            *out.shape,
            *x.stride(),
            x.element_size(),
            *_where(x.device),
        )
    return out


def subnet_grad(
    dy: Tensor, x_sub: Tensor, out_idx: Tensor, out_dtype: torch.dtype, group: int = 1
) -> Tensor:
    """``dy[:, Y_S]^T x_S`` with fp32 accumulation, the same bits every run.

    ``dy`` ``(T, out)``, ``x_sub`` ``(T, n_in)``, ``out_idx`` ``(n_out,)`` int64; result ``(n_out, n_in)`` in
    ``out_dtype``. Both operands may have any strides.

    Raises:
        TypeError: a dtype other than fp32, bf16 or fp16, or operands of two dtypes.
    """
    for what, dtype in (("dy", dy.dtype), ("x_sub", x_sub.dtype), ("out_dtype", out_dtype)):
        if dtype not in DTYPES:
            raise TypeError(
                f"the cuda subnet_grad takes fp32, bf16 and fp16, got {what} {dtype}; use impl='torch'"
            )
    if dy.dtype != x_sub.dtype:
        raise TypeError(f"dy is {dy.dtype}, x_sub {x_sub.dtype}: they must be of one dtype")
    tokens, n_out, n_in = dy.shape[0], out_idx.shape[0], x_sub.shape[1]
    if tokens == 0 or n_out == 0 or n_in == 0:
        return torch.zeros(n_out, n_in, dtype=out_dtype, device=dy.device)
    out_idx = out_idx.contiguous()
    out = torch.empty(n_out, n_in, dtype=out_dtype, device=dy.device)
    splits = _splits(tokens, n_out, n_in, _processors(dy.device))
    parts = None
    if splits > 1:
        parts = torch.empty(splits, n_out, n_in, dtype=torch.float32, device=dy.device)
    _cuda.subnet_grad(
        dy.data_ptr(),
        x_sub.data_ptr(),
        out_idx.data_ptr(),
        out.data_ptr(),
        0 if parts is None else parts.data_ptr(),
        tokens,
        n_out,
        n_in,
        *dy.stride(),
        *x_sub.stride(),
        splits,
        DTYPES[dy.dtype],
        DTYPES[out_dtype],
        *_where(dy.device),
    )
    return out


def _splits(tokens: int, n_out: int, n_in: int, processors: int) -> int:
    """Parts to split the tokens into: about four blocks a processor, of at least 256 tokens each."""
    tile = int(_cuda.SUBNET_GRAD_TILE)
    blocks = -(-n_out // tile) * -(-n_in // tile)
    return max(1, min(4 * processors // blocks, tokens // _MIN_SPLIT_TOKENS))


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _where(device: torch.device) -> tuple[int, int]:
    """The device's number and its current stream."""
    assert device.index is not None
    return device.index, torch.cuda.current_stream(device).cuda_stream
