"""What the host needs of the Triton kernels: the functions behind ``impl="triton"`` and where they run."""

from __future__ import annotations

import torch

from .adamw import adamw_
from .gather_columns import gather_columns
from .importance_update import importance_update_
from .indexing import INTERPRETED
from .lerp import lerp_
from .subnet_grad import subnet_grad
from .write_back import write_back_

__all__ = [
    "adamw_",
    "gather_columns",
    "importance_update_",
    "lerp_",
    "subnet_grad",
    "why_not",
    "write_back_",
]


def why_not(device: torch.device) -> str:
    """Why the Triton kernels cannot run on ``device``; empty if they can."""
    if INTERPRETED:
        return ""
    if device.type != "cuda":
        return f"Triton compiles for CUDA devices, not for {device.type}"
    if torch.version.hip is not None:
        return "not tested on ROCm"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"Triton needs compute capability 8.0, {device} has {major}.{minor}"
    return ""
