"""NVIDIA's multi-process service, so that several processes' kernels run on a GPU at the same time."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

PROBE = "import torch; x = torch.ones(8, device='cuda'); assert float(x.sum()) == 8"


@contextlib.contextmanager
def service(wanted: bool) -> Iterator[str]:
    """For the length of a ``with`` block, before this process has used the GPU; says what is in force."""
    control = shutil.which("nvidia-cuda-mps-control")
    if not wanted or control is None:
        yield "time slicing" + (": no nvidia-cuda-mps-control here" if wanted else "")
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        ours = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        os.environ.update(ours)
        try:
            subprocess.run([control, "-d"], check=True, timeout=30, capture_output=True)
            subprocess.run(
                [sys.executable, "-c", PROBE], check=True, timeout=90, capture_output=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            _quit(control)
            for name in ours:
                del os.environ[name]
            yield f"time slicing: MPS did not work here ({type(error).__name__})"
            return
        try:
            yield "MPS"
        finally:
            _quit(control)


def _quit(control: str) -> None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run([control], input=b"quit\n", timeout=30, capture_output=True)
