"""Tensors some way towards others, many in one launch, bf16 ones rounded stochastically and fp32 ones to nearest:

    t = t + weight (other - t)                  for |weight| < 1/2
    t = other + (weight - 1) (other - t)        from there on, so that both ends are exact

Bytes: 6 an entry of bf16 tensors, 10 of fp32 ones with others in bf16: two tensors read and one written. For LLaMA-2
7B with `LosiaConfig()`, 606 M entries: 3.6 GB, 0.85 ms at 4.3 TB/s, and 6.1 GB, 1.4 ms. In bf16 about
30 operations an entry, most of them the random bits; in fp32 a few. Sums and products are rounded one by one, so that
this and CUDA's give the same bits, and in bf16 PyTorch's too.

The shape: a program takes BLOCK neighbouring entries of one tensor; tables in device memory say which, and hold what
the launch is about: 40 bytes a tensor. To change the shape, change BLOCK: any power of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tables import lerp_tables
from .rounding import noise, to_bf16

BLOCK = 1024


@triton.jit
def lerp_kernel(
    tensors_ptr,  # (tensors, 5) int64: addresses of t and other, entries, entries before, key
    weight_ptr,  # fp32
    parts_ptr,  # (programs, 2) int32: tensor, and which block of it
    like,  # any tensor of t's dtype
    like_other,  # and of other's
    BLOCK: tl.constexpr,
):
    tensor = tensors_ptr + tl.load(parts_ptr + 2 * tl.program_id(0)) * 5
    n = tl.load(parts_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < tl.load(tensor + 2)
    t_ptr = tl.load(tensor + 0).to(like.dtype) + n
    near = tl.load(t_ptr, mask=mask).to(tl.float32)
    far = tl.load(tl.load(tensor + 1).to(like_other.dtype) + n, mask=mask).to(tl.float32)
    weight = tl.load(weight_ptr)
    small = tl.abs(weight) < 0.5
    value = tl.where(small, near, far) + (far - near) * tl.where(small, weight, weight - 1)
    if like.dtype.element_ty == tl.bfloat16:
        value = to_bf16(value, noise(tl.load(tensor + 3) + n, tl.load(tensor + 4)))
    tl.store(t_ptr, value, mask=mask)


def lerp_(
    tensors: Sequence[Tensor], others: Sequence[Tensor], weight: float | Tensor, key: int
) -> None:
    """See ``torch_ops.lerp_``; all tensors are contiguous and on one device.

    Raises:
        ValueError: a tensor that is not contiguous, and pairs of two sizes.
        TypeError: dtypes that it does not take, or several.
    """
    rows, factor, parts = lerp_tables(tensors, others, weight, key, BLOCK)
    n_parts = parts.shape[0]
    if n_parts:
        with torch.cuda.device_of(parts):
            lerp_kernel[(n_parts,)](
                rows, factor, parts, tensors[0], others[0],
                BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
