"""The Triton kernels without a GPU. Triton decides at import whether it interprets, so: another process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("file", "at_least"),
    [
        ("interpreted_kernels.py", 50),
        ("interpreted_splits.py", 10),
        ("interpreted_tiles.py", 4),
        ("interpreted_writes.py", 14),
    ],
)
def test_kernels_are_right_in_the_interpreter(file, at_least):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= at_least and "skipped" not in result.stdout, result.stdout
