"""The map of the house: imports go one way, foreign packages stay in their rooms, importing does nothing."""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "losia_pro"

# From the bottom up: a room imports rooms of lower floors only.
FLOORS: list[tuple[str, ...]] = [
    (
        "config",
        "gathering",
        "localize",
        "reference",
        "rounding",
        "saved",
        "schedule",
        "sharded",
        "shared",
        "tables",
    ),
    ("base", "guard", "selection"),
    ("entries", "torch_ops"),
    ("_cuda", "kernels"),
    ("_cuda_ops",),
    ("dispatch",),
    ("ops",),
    ("functional", "optim"),
    ("optimizer", "profile"),
    ("linear",),
    ("views",),
    ("kinds",),
    ("convert", "delta", "discover"),
    ("distributed", "inputs", "reselect", "switch"),
    ("calibrate", "checkpoint", "decay"),
    ("rewarm",),
    ("controller",),
    ("__init__",),
    ("integrations",),
    ("cli", "peft"),
    ("__main__",),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# What a room imports only when it is asked for.
LATER = {("__init__", "peft")}

# What a room may import that is not ours and not in the standard library; None: anything.
FOREIGN: dict[str, set[str] | None] = {
    "delta": {"torch", "safetensors"},
    "kernels": {"torch", "triton"},
    "integrations": {"torch", "transformers", "peft", "accelerate"},
    "cli": None,
}
CORE = {"torch"}


def rooms() -> dict[str, list[Path]]:
    """Every room and its files."""
    found = {p.stem: [p] for p in PACKAGE.glob("*.py")}
    for folder in ("cli", "integrations"):
        found[folder] = sorted((PACKAGE / folder).rglob("*.py"))
    found["kernels"] = sorted((ROOT / "kernels").glob("*.py"))
    return found


def package_of(path: Path) -> str:
    """The package that a file's relative imports start from."""
    if path.parent == ROOT / "kernels":
        return "losia_pro.kernels"
    return ".".join(path.parent.relative_to(ROOT).parts)


def imports(source: str, package: str) -> Iterator[str]:
    """Absolute names of all that a file imports, wherever in it: also by ``import_module`` of a name that it
    spells out, but not under ``if TYPE_CHECKING``."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else None
            yield from (".".join(filter(None, (base, node.module, a.name))) for a in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"losia_pro(\.\w+)+", str(node.value)):
            yield node.value


def room_of(name: str) -> str | None:
    """The room that an imported name is from; None if it is not ours."""
    first, *rest = name.split(".")
    if first != "losia_pro":
        return None
    return rest[0] if rest and rest[0] in FLOOR else "__init__"


def test_the_map_holds_every_room():
    assert set(rooms()) | {"_cuda"} == set(FLOOR)


@pytest.mark.parametrize("room", sorted(set(FLOOR) - {"_cuda"}))
def test_imports_go_down(room):
    for path in rooms()[room]:
        for name in imports(path.read_text(), package_of(path)):
            other = room_of(name)
            if other is not None and other != room and (room, other) not in LATER:
                assert FLOOR[other] < FLOOR[room], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", sorted(set(FLOOR) - {"_cuda"}))
def test_foreign_packages_stay_in_their_rooms(room):
    allowed = FOREIGN.get(room, CORE)
    for path in rooms()[room]:
        for name in imports(path.read_text(), package_of(path)):
            top = name.split(".")[0]
            if allowed is not None and top not in sys.stdlib_module_names | {"losia_pro"}:
                assert top in allowed, f"{path.relative_to(ROOT)} imports {name}"


SNIPPETS = {
    "from . import ops, reference": {"losia_pro.ops", "losia_pro.reference"},
    "from .ops import resolve": {"losia_pro.ops.resolve"},
    "def f():\n    from .cli.data import read": {"losia_pro.cli.data.read"},
    "import losia_pro.delta as d, torch": {"losia_pro.delta", "torch"},
    "from losia_pro import attach": {"losia_pro.attach"},
    "try:\n    import triton\nexcept ImportError: pass": {"triton"},
    "importlib.import_module('losia_pro._cuda')": {"losia_pro._cuda"},
    "if TYPE_CHECKING:\n    from .linear import SubnetLinear": set(),
    "if TYPE_CHECKING:\n    import a\nelse:\n    import b": {"b"},
    "'''See losia_pro.ops.'''": set(),
}


@pytest.mark.parametrize(("source", "names"), SNIPPETS.items(), ids=range(len(SNIPPETS)))
def test_imports_are_read_from_any_place_in_a_file(source, names):
    assert set(imports(source, "losia_pro")) == names


def test_relative_imports_are_read_from_a_folder_within():
    found = set(imports("from ..controller import Losia\nfrom .data import x", "losia_pro.cli"))
    assert found == {"losia_pro.controller.Losia", "losia_pro.cli.data.x"}
    assert [room_of(n) for n in sorted(found)] == ["cli", "controller"]


# Devices are asked nothing, no process is started, and what is slow to load is not loaded.
IMPORT = """
import json, logging, sys, time, warnings
import torch

def asked(*args, **kwargs):
    raise AssertionError("a device was asked for")

for module in (torch.cuda, torch.accelerator, torch.xpu, torch.mps):
    for name in ("is_available", "device_count", "current_device", "get_device_properties",
                 "get_device_capability", "get_device_name", "init", "_lazy_init", "synchronize"):
        if hasattr(module, name):
            setattr(module, name, asked)
events = []
WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen",
           "socket.connect")
def watch(event, args):
    if event in WATCHED or event == "open" and str(args[0]).startswith("/dev/"):
        events.append(event)
sys.addaudithook(watch)
before, handlers = set(sys.modules), list(logging.root.handlers)
start = time.perf_counter()
import losia_pro
seconds = time.perf_counter() - start
new = sorted({m.split(".")[0] for m in set(sys.modules) - before} - sys.stdlib_module_names)
heavy = [m for m in set(sys.modules) - before if m.startswith(("torch._dynamo", "torch._inductor"))]
print(json.dumps([seconds, events, new, heavy, handlers == logging.root.handlers,
                  torch.cuda.is_initialized()]))
"""


def test_importing_is_quick_and_touches_nothing():
    """Three fresh processes; seconds beyond those that torch takes."""
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-W", "error::UserWarning:losia_pro", "-c", IMPORT],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True, capture_output=True, check=True,
        )  # fmt: skip
        took, events, new, heavy, same_handlers, initialized = json.loads(done.stdout)
        assert events == [] and heavy == [] and same_handlers and not initialized
        assert new == ["losia_pro"]
        assert done.stderr == ""
        seconds.append(took)
    assert statistics.median(seconds) < 0.3


SUFFIXES = {".py", ".cu", ".cuh", ".cpp", ".h"}
LIMIT = 320


def test_every_file_fits_in_the_head():
    folders = ("losia_pro", "kernels", "csrc", "tests", "benchmarks", "examples")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in SUFFIXES]
    lengths = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines())
        for p in [*files, ROOT / "setup.py"]
    }
    assert len(lengths) > 60
    assert {name: n for name, n in lengths.items() if n > LIMIT} == {}
