"""What is installed, how, and that the folder kernels/ harms nobody."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import losia_pro

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE")
SOURCES += ("losia_pro", "kernels", "csrc")
KERNELS = {f"losia_pro/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}


def python(code: str, cwd: Path, *flags: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **env},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip() + result.stderr.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build reads, and a `torch` that cannot be imported: builds must not try."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
        elif source.exists():
            shutil.copy(source, copy)
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison" / "torch.py").write_text("raise RuntimeError('the build imported torch')")
    return copy


def build(checkout: Path, kind: str, **env: str) -> tuple[Path, str]:
    """Run the build backend as pip does; returns the wheel, unpacked, and what was printed."""
    out = checkout.parent / kind
    out.mkdir()
    printed = python(
        f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})",
        checkout,
        PYTHONPATH=str(checkout.parent / "poison"),
        **env,
    )
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return wheel, printed


def fake_nvcc(folder: Path) -> str:
    script = folder / "nvcc"
    script.write_text("#!/bin/sh\necho a broken toolkit >&2\nexit 1\n")
    script.chmod(0o755)
    return str(script)


def test_a_wheel_holds_the_kernels_and_nothing_else_of_the_repository(checkout):
    (checkout / "kernels" / "tiles-sm_00.json").write_text("{}")
    wheel, _ = build(checkout, "wheel", LOSIA_BUILD_CUDA="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    site = wheel.parent / "site"
    files = {str(p.relative_to(site)) for p in site.rglob("*") if p.is_file()}
    assert files >= KERNELS | {"losia_pro/kernels/tiles-sm_00.json"}
    assert {"losia_pro/cli/__init__.py", "losia_pro/integrations/__init__.py"} <= files
    assert {"losia_pro/py.typed", "losia_pro/cli/recipes/metamathqa.yaml"} <= files
    assert {f.split("/")[0].split("-")[0] for f in files} == {"losia_pro"}
    where = "import losia_pro.kernels.launch as k; print(k.__file__)"
    found = python(where, checkout.parent, PYTHONPATH=str(site))
    assert Path(found) == site / "losia_pro" / "kernels" / "launch.py"


def test_an_editable_install_finds_the_kernels_and_exposes_no_package_of_that_name(checkout):
    wheel, _ = build(checkout, "editable", LOSIA_BUILD_CUDA="0")
    # -S: without what this Python has installed by .pth files, among it perhaps this package from elsewhere.
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    found = python(
        f"import site, sys; site.addsitedir({str(wheel.parent / 'site')!r})\n"
        f"sys.path += {sorted(packages)!r}\n"
        "import importlib.util, losia_pro, losia_pro.kernels.launch as k\n"
        "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "print(losia_pro.__file__, k.__file__, importlib.util.find_spec('kernels') is None, end='')",
        checkout.parent,
        "-S",
    )
    package, launch, no_kernels = found.split(" ")
    assert Path(package) == checkout / "losia_pro" / "__init__.py"
    assert Path(launch).resolve() == checkout / "kernels" / "launch.py"
    assert no_kernels == "True"


def test_a_checkout_on_the_path_finds_the_kernels(tmp_path):
    found = python("import losia_pro.kernels.launch as k; print(k)", tmp_path, PYTHONPATH=str(ROOT))
    assert "losia_pro.kernels.launch" in found


def test_importing_the_package_loads_no_kernel_and_prints_nothing(tmp_path):
    code = "import sys, losia_pro; assert not any('losia_pro.kernels' in m for m in sys.modules)"
    assert python(code, tmp_path, PYTHONPATH=str(ROOT)) == ""


def test_transformers_from_the_repository_root_is_unharmed():
    """Hugging Face publishes a package `kernels`, and transformers uses whichever it finds."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    installed = "__import__('importlib.metadata').metadata.version('kernels')"
    python(
        "import transformers, peft, accelerate\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        f"try: {installed}\n"
        "except Exception: assert not is_kernels_available()\n"
        "import sys; module = sys.modules.get('kernels')\n"
        "assert module is None or getattr(module, '__file__', None) is None, module\n"
        "LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,\n"
        "    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))",
        ROOT,
    )


def test_auto_skips_a_cuda_module_that_cannot_be_built_in_one_line(checkout):
    wheel, printed = build(
        checkout, "wheel", LOSIA_BUILD_CUDA="auto", CUDACXX=fake_nvcc(checkout.parent)
    )
    lines = [line for line in printed.splitlines() if line.startswith("losia-pro:")]
    assert len(lines) == 1 and "without the CUDA module: " in lines[0]
    assert set(zipfile.ZipFile(wheel).namelist()) >= KERNELS
    assert not any(".so" in name for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize(
    ("value", "message"),
    [("1", "the CUDA module failed"), ("yes", "must be auto, 0 or 1, got 'yes'")],
)
def test_a_cuda_module_that_was_asked_for_is_not_skipped(checkout, value, message):
    with pytest.raises(AssertionError, match=message):
        build(checkout, "wheel", LOSIA_BUILD_CUDA=value, CUDACXX=fake_nvcc(checkout.parent))


@pytest.mark.parametrize("archs", ["native", "90a", "90-real,120"])
def test_architectures_that_could_not_be_read_again_are_refused(checkout, archs):
    """Once built, every question where the module runs would fail."""
    with pytest.raises(AssertionError, match=f"numbers as in 90-real;120, got '{archs}'"):
        build(checkout, "wheel", LOSIA_BUILD_CUDA="0", LOSIA_CUDA_ARCHS=archs)


def test_architectures_are_chosen_by_number(checkout):
    build(checkout, "wheel", LOSIA_BUILD_CUDA="0", LOSIA_CUDA_ARCHS="80-real;90-virtual;120")


def test_the_version_is_said_once():
    (written,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert written == losia_pro.__version__
