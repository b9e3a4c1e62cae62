"""benchmarks/profile_kernels.py: what is profiled, what is read of ncu's page, and what is said where ncu fails."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import profile_kernels
from benchmarks.profile_kernels import Profiled, cases, child, launches, main, profile, short, shown

from losia_pro.cli.bench import device as devices
from losia_pro.cli.bench import operations
from losia_pro.cli.bench.traffic import Limits

LIMITS = Limits(bandwidth=4e12, flops=8e14, sector=32, l2=2**20)
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COLUMNS = {  # unit, and the values of two launches
    "ID": ("", "0", "1"),
    "Kernel Name": (
        "",
        "void losia::<unnamed>::gather_kernel<uint4, 8>(const void *, const long *, int)",
        "nvjet_hsh_128x64_TNN",
    ),
    "Block Size": ("", "(256, 1, 1)", "(384, 1, 1)"),
    "Grid Size": ("", "(8,192, 1, 1)", "(132, 1, 1)"),
    "gpu__time_duration.sum": ("ns", "20,000", "1,234,567"),
    "dram__bytes_read.sum": ("byte", "67,108,864", "n/a"),
    "dram__bytes_write.sum": ("byte", "2,891,136", "0"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "71.5", "12.25"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("%", "0", "48.50"),
    "launch__registers_per_thread": ("register/thread", "40", "168"),
    STALL.format("long_scoreboard"): ("inst", "30.5", "1.0"),
    STALL.format("selected"): ("inst", "100.0", "1.0"),
    STALL.format("barrier"): ("inst", "0", "2.5"),
    STALL.format("lg_throttle"): ("inst", "4.5", "nan"),
    STALL.format("wait"): ("inst", "2.25", "0.5"),
    STALL.format("not_selected"): ("inst", "0.75", "0.25"),
}


def page(columns: dict[str, tuple[str, ...]] = COLUMNS) -> str:
    names = ",".join(f'"{name}"' for name in columns)
    lines = [",".join(f'"{cell}"' for cell in line) for line in zip(*columns.values(), strict=True)]
    before = ["==PROF== Connected to process 7 (/usr/bin/python3)", '"a warning" of the program\'s']
    before += ['{"op": "x"}', "==PROF== Disconnected"]
    return "\n".join([*before, names, "==WARNING== Clocks are free.", *lines]) + "\n"


def test_a_launch_is_read_with_its_units_and_its_main_stalls():
    first, second = launches(page())
    assert first["kernel"] == "losia::gather_kernel" and second["kernel"] == "nvjet_hsh_128x64_TNN"
    assert (first["grid"], second["block"]) == ("(8,192, 1, 1)", "(384, 1, 1)")
    assert first["us"] == pytest.approx(20) and second["us"] == pytest.approx(1234.567)
    assert (first["read_bytes"], first["written_bytes"]) == (67108864, 2891136)
    assert first["gb_per_s"] == pytest.approx(3500)
    assert (first["dram_pct"], second["tensor_pct"], second["registers"]) == (71.5, 48.5, 168)
    assert list(first["stalls"].items()) == [
        ("long_scoreboard", 30.5), ("lg_throttle", 4.5), ("wait", 2.25),
    ]  # fmt: skip
    assert list(second["stalls"]) == ["barrier", "long_scoreboard", "wait"]


def test_what_ncu_did_not_count_is_none():
    second = launches(page())[1]
    assert second["read_bytes"] is None and second["gb_per_s"] is None
    assert second["l2_to_l1_bytes"] is None and second["occupancy_pct"] is None


def test_other_units_are_converted():
    columns = {**COLUMNS, "gpu__time_duration.sum": ("ms", "1.5", "2")}
    columns["dram__bytes_read.sum"] = ("Mbyte", "1,500.5", "2")
    first = launches(page(columns))[0]
    assert first["us"] == 1500 and first["read_bytes"] == 1500.5e6


def test_a_page_without_launches_has_no_rows():
    assert launches("") == launches("==WARNING== No kernels were profiled.\n") == []
    assert launches("\n".join(page().splitlines()[:-2])) == []


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void a::(anonymous namespace)::copy<int>(int *)", "a::copy"),
        ("_grad_kernel", "_grad_kernel"),
        ("void at::vectorized<4, f<g>>(int, h)", "at::vectorized"),
    ],
)
def test_a_kernel_is_named_without_types(kernel, name):
    assert short(kernel) == name


def test_the_cases_are_the_operations_at_the_shapes_of_llama2_7b():
    found = cases()
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    every = {"single", "groups of 16", "1/64 x all"}
    at: dict[tuple, set] = {}
    for case in found:
        where = case.into if case.op == "gather_columns" else (case.out, case.into)
        at.setdefault((case.op, where), set()).add(case.selection)
    linears = [(4096, 4096), (11008, 4096), (4096, 11008)]  # out x in
    assert at == {
        **{("gather_columns", into): every for into in (4096, 11008)},
        **{("subnet_grad", shape): every for shape in linears},
        ("write_back_", (4096, 4096)): every,
        ("importance_update_", (4096, 4096)): {"whole"},
    }
    assert profile_kernels.TOKENS == 8192


@pytest.mark.parametrize(
    "case",
    [
        Profiled("gather_columns", 128, 128, "groups of 16"),
        Profiled("subnet_grad", 128, 256, "1/64 x all"),
        Profiled("write_back_", 128, 128, "single"),
        Profiled("importance_update_", 128, 128, "whole"),
    ],
    ids=lambda case: case.op,
)
def test_one_call_is_profiled_after_it_was_checked_and_warmed_up(case, monkeypatch, capsys):
    monkeypatch.setattr(profile_kernels, "TOKENS", 16)
    monkeypatch.setattr(profile_kernels, "MODEL", "toy")
    monkeypatch.setattr(profile_kernels, "LAYERS", 1)
    events = []

    @contextlib.contextmanager
    def range_():
        events.append("start")
        yield
        events.append("stop")

    real = Profiled.prepare

    def prepare(self, device, limits):
        prepared = real(self, device, limits)
        call = prepared.candidates["default"].call
        prepared.candidates["default"].call = lambda i: (events.append("call"), call(i))
        return prepared

    monkeypatch.setattr(torch.cuda.profiler, "profile", range_)
    monkeypatch.setattr(Profiled, "prepare", prepare)
    child(case, torch.device("cpu"), LIMITS)
    assert events == ["call"] * profile_kernels.WARMUP + ["start", "call", "stop"]
    said = json.loads(capsys.readouterr().out)
    assert (said["op"], said["selection"]) == (case.op, case.selection)
    assert said["least_us"] == 1e6 * max(said["bytes"] / 4e12, said["flops"] / 8e14) > 0


def test_a_wrong_result_is_not_profiled(monkeypatch):
    monkeypatch.setattr(profile_kernels, "TOKENS", 16)
    monkeypatch.setattr(operations, "unequal", lambda call, truth: 1.0)
    with pytest.raises(SystemExit, match="gather_columns 128 single: error"):
        Profiled("gather_columns", 128, 128, "single").prepare(torch.device("cpu"), LIMITS)


def tool(folder: Path, *lines: str) -> str:
    """An ``ncu`` that says its arguments into a file, and then runs ``lines``."""
    file = folder / "ncu"
    head = [f"#!{sys.executable}", "import sys", f"page = {page()!r}"]
    log = f"print(*sys.argv, sep='\\n', end='\\n\\n', file=open({str(folder / 'said')!r}, 'a'))"
    file.write_text("\n".join([*head, log, *lines]) + "\n")
    file.chmod(0o755)
    return str(file)


CASE = cases()[0]
KEY = """print('{"op": "gather_columns", "least_us": 12.5}')"""


def test_each_launch_has_a_row_with_the_least_time_of_its_case(tmp_path):
    rows = profile(tool(tmp_path, KEY, "print(page)"), CASE, "cuda:0", LIMITS)
    assert [(row["launch"], row["launches"], row["us"]) for row in rows] == [
        (1, 2, 20.0), (2, 2, pytest.approx(1234.567)),
    ]  # fmt: skip
    assert all(row["least_us"] == 12.5 and row["case"] == CASE.name for row in rows)
    said = (tmp_path / "said").read_text().split("\n")
    assert said[said.index("--child") + 1] == CASE.name
    assert Limits(**json.loads(said[said.index("--limits") + 1])) == LIMITS
    assert said[said.index("--clock-control") + 1] == "none"
    assert said[said.index("--profile-from-start") + 1] == "off"
    table = shown([*rows, {"case": "another", "status": "failed", "reason": "why"}])
    assert "1/2 losia::gather_kernel" in table and "long_scoreboard 30.5" in table
    assert "failed" in table and "0.067" in table and "3.50" in table


def test_a_metric_that_ncu_does_not_know_is_left_out(tmp_path):
    refuse = "if '--metrics' in sys.argv: sys.exit('==ERROR== Failed to find metric regex:^x$')"
    rows = profile(tool(tmp_path, refuse, KEY, "print(page)"), CASE, "cuda:0", LIMITS)
    assert [row["status"] for row in rows] == ["ok", "ok"]


def test_a_case_that_fails_says_what_ncu_said_last(tmp_path):
    lines = ["print('==PROF== Connected')", KEY, "print('==ERROR== The counters are locked.')"]
    rows = profile(tool(tmp_path, *lines, "sys.exit(9)"), CASE, "cuda:0", LIMITS)
    assert [row["status"] for row in rows] == ["failed"]
    assert rows[0]["reason"].endswith("==ERROR== The counters are locked.")
    assert (tmp_path / "said").read_text().count("--child") == 1


def test_a_case_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(profile_kernels, "CASE_S", 0.5)
    lines = ["import time", "time.sleep(60)"]
    rows = profile(tool(tmp_path, *lines), CASE, "cuda:0", LIMITS)
    assert rows == [{"case": CASE.name, "status": "failed", "reason": "took longer than 0.5 s"}]


def test_the_record_holds_device_versions_and_rows(tmp_path, monkeypatch):
    ncu = tool(
        tmp_path,
        "if '--version' in sys.argv: sys.exit(print('Version 2025.3.1.0 (build 1)'))",
        "fails = '1/64' in sys.argv[sys.argv.index('--child') + 1]",
        KEY,
        "print('==ERROR== no' if fails else page)",
    )
    monkeypatch.setattr(shutil, "which", {"ncu": ncu}.get)
    # A CPU in the place of a GPU.
    monkeypatch.setattr(devices, "choose", lambda name: torch.device("cuda"))
    monkeypatch.setattr(devices, "describe", lambda device: {"type": "cuda", "name": "A GPU"})
    monkeypatch.setattr(devices, "state", lambda device: None)
    monkeypatch.setattr(devices, "limits", lambda device, dtype: LIMITS)
    monkeypatch.chdir(tmp_path)
    assert main(["--cases", "gather_columns 4096"]) == 1
    file = tmp_path / "runs" / "profile-kernels-llama2-7b-a-gpu.json"
    record = json.loads(file.read_text())
    assert [r["status"] for r in record["rows"]] == ["ok"] * 4 + ["failed"]
    assert record["versions"]["ncu"] == "2025.3.1.0" and record["limits"]["bandwidth"] == 4e12
    assert record["device"]["name"] == "A GPU" and record["complete"]


def refusal(capsys, *arguments: str) -> str:
    assert main([*arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "NVIDIA GPU" in refusal(capsys)


def test_without_ncu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(devices, "choose", lambda name: torch.device("cuda"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "ncu is not on PATH" in refusal(capsys)


def test_cases_that_are_none_are_refused(capsys):
    assert "subnet_grad 11008x4096 single" in refusal(capsys, "--cases", "no such case")
