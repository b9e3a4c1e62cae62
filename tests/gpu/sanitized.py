"""Every kernel of one implementation over small, odd and empty shapes, for NVIDIA's compute-sanitizer:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1          # so that each tensor is an allocation that it watches
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitized.py cuda

The same with racecheck, synccheck and initcheck; with ``triton`` for memcheck. The answers are not judged here:
tests/gpu/test_ops.py does that.
"""

from __future__ import annotations

import itertools
import sys

import torch

import losia_pro.ops  # noqa: F401
from losia_pro import dispatch, torch_ops

DEVICE = "cuda"
OPS = torch.ops.losia_pro
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(64, 48, 16, 8), (37, 131, 33, 5), (130, 96, 96, 96), (1, 1, 1, 1), (0, 16, 4, 4)]
SHAPES += [(1000, 320, 136, 72)]  # in runs, of several splits


def indices(n: int, k: int) -> torch.Tensor:
    return torch.randperm(n, device=DEVICE)[:k].sort().values


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In fp32: what the library's bf16 products write by bulk copies, initcheck takes for never written."""
    return (a.float().T @ b.float()).to(dtype)


def main(impl: str) -> None:
    torch_ops.product = product
    for dtype, (tokens, out, n_out, n_in) in itertools.product(DTYPES, SHAPES):
        dy = torch.randn(tokens, out, device=DEVICE).to(dtype)
        x = torch.randn(tokens, 2 * n_in, device=DEVICE).to(dtype)
        out_idx, in_idx = indices(out, n_out), indices(2 * n_in, n_in)
        x_sub = OPS.gather_columns(x, in_idx, impl=impl)
        OPS.subnet_grad(dy, x_sub, out_idx, impl=impl)
        OPS.subnet_grad(dy, x_sub, torch.arange(out, device=DEVICE), group=out, impl=impl)
        if n_out % 8 == 0 and out % 8 == 0:
            runs = indices(out // 8, n_out // 8)
            runs = (runs[:, None] * 8 + torch.arange(8, device=DEVICE)).flatten()
            OPS.gather_columns(dy, runs, group=8, impl=impl)
            OPS.gather_columns(dy[:, 1:], runs[:-8], group=1, impl=impl)  # rows not aligned
            OPS.subnet_grad(dy, x_sub, runs, group=8, impl=impl)
        weight = torch.randn(out, 2 * n_in, device=DEVICE).to(dtype)
        for kept in (torch.float32, torch.bfloat16):
            importance = torch.zeros(weight.shape, device=DEVICE, dtype=kept)
            uncertainty = torch.zeros_like(importance)
            for grad in (None, torch.zeros(weight.shape, device=DEVICE)):
                OPS.importance_update_(
                    importance, uncertainty, weight, dy, x, grad, 0.85, 0.85, "second", impl=impl
                )
        subnet = torch.randn(n_out, n_in, device=DEVICE)
        layers = [weight, weight.clone()], [subnet] * 2, [out_idx] * 2, [in_idx] * 2
        for seed in (None, 1) if dtype == torch.bfloat16 else (None,):
            OPS.write_back_(*layers, seed=seed, impl=impl)
    adamw = dispatch.function("adamw_", torch.zeros(1, device=DEVICE), impl)
    kinds = [
        [torch.rand(n + 1, device=DEVICE).bfloat16()[n % 2 :] for n in (0, 1, 64, 4097)]
        for _ in range(4)
    ]
    constants = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1}
    adamw(*kinds, [1, 2, 3, 4], [5, 6, 7, 8], maximize=False, **constants)
    lerp = dispatch.function("lerp_", torch.zeros(1, device=DEVICE), impl)
    for weight in (0.1, torch.full((), 0.9, device=DEVICE)):
        lerp(*kinds[:2], weight, 5)
        wide = [torch.rand(n + 1, device=DEVICE)[n % 2 :] for n in (0, 1, 64, 4097)]
        for dtype in DTYPES:
            lerp(wide, [t.to(dtype, copy=True) for t in wide], weight, 5)
    torch.cuda.synchronize()
    print(f"{impl}: every kernel ran")


if __name__ == "__main__":
    main(sys.argv[1])
