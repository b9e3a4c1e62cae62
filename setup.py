"""What pyproject.toml cannot say: where the packages lie, and the CUDA module, which CMake builds.

``LOSIA_BUILD_CUDA``: ``0`` leaves the CUDA module out; ``1`` fails where it cannot be built; ``auto`` (the
default) builds it where there is a CUDA compiler and else says in one line why not. No GPU is needed.
``LOSIA_CUDA_ARCHS`` overrides the architectures (in CMake's notation, by number: ``90-real;120``).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
WANTED = os.environ.get("LOSIA_BUILD_CUDA", "auto")
if WANTED not in ("auto", "0", "1"):
    raise SystemExit(f"LOSIA_BUILD_CUDA must be auto, 0 or 1, got {WANTED!r}")
ARCHS = os.environ.get("LOSIA_CUDA_ARCHS", "")  # losia_pro/_cuda_ops.py reads them again
if ARCHS and not re.fullmatch(r"\d+(-real|-virtual)?(;\d+(-real|-virtual)?)*", ARCHS):
    raise SystemExit(f"LOSIA_CUDA_ARCHS must be numbers as in 90-real;120, got {ARCHS!r}")


def find_nvcc() -> str | None:
    """The CUDA compiler: $CUDACXX, then $CUDA_HOME, then PATH, then the usual folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [
        os.environ.get("CUDACXX"),
        home and os.path.join(home, "bin", "nvcc"),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


class CMakeBuild(build_ext):
    """Builds ``losia_pro._cuda`` with CMake and ninja; a failure is one line unless it was asked for."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._cmake(target)
        except (ImportError, OSError, RuntimeError) as error:
            target.unlink(missing_ok=True)  # rather none than one of older sources
            if WANTED == "1":
                raise CompileError(
                    f"LOSIA_BUILD_CUDA=1, but the CUDA module failed:\n{error}"
                ) from error
            last = [line for line in str(error).splitlines() if line.strip()][-1:]
            say(f"without the CUDA module: {''.join(last)} (LOSIA_BUILD_CUDA=1 shows all)")

    def _cmake(self, target: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / "cuda"
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_COMPILER": find_nvcc(),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "LOSIA_MODULE": target.name,
            "LOSIA_CUDA_ARCHS": ARCHS,
        }
        defines = [f"-D{key}={value}" for key, value in options.items()]
        run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--fresh", *defines])
        run(["cmake", "--build", str(build)])


def run(command: list[str]) -> None:
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}")


def say(line: str) -> None:
    print(f"losia-pro: {line}", file=sys.stderr)


modules = []
if WANTED == "1" or (WANTED == "auto" and find_nvcc()):
    modules = [Extension("losia_pro._cuda", sources=[], optional=WANTED == "auto")]
elif WANTED == "auto":
    say("without the CUDA module: no nvcc found (LOSIA_BUILD_CUDA=1 requires it)")

setup(
    # kernels/ has no __init__.py, so that it is never a package `kernels` to others (Hugging Face publishes
    # one of that name). The link losia_pro/kernels makes it losia_pro.kernels inside a checkout as well.
    packages=[*find_packages(include=["losia_pro", "losia_pro.*"]), "losia_pro.kernels"],
    package_dir={"losia_pro.kernels": "kernels"},
    package_data={
        "losia_pro": ["py.typed", "cli/recipes/*.yaml"],
        "losia_pro.kernels": ["tiles-*.json"],
    },
    ext_modules=modules,
    cmdclass={"build_ext": CMakeBuild},
)
