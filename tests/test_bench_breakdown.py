"""`losia-pro bench step --breakdown`: differences from the floor by kernel, from canned profiles, add up."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from losia_pro.cli import main
from losia_pro.cli.bench import breakdown, step
from losia_pro.cli.bench.breakdown import Kernel
from losia_pro.cli.bench.trainer import Trainer
from losia_pro.cli.errors import CliError

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--batch", "1", "--length", "8", "--steps", "2", "--warmup", "2"]
FLOOR = [("gemm", 4.0), ("gemm", 4.0), ("triton_poi_fused_mul_1", 0.5), ("copy<1>(int)", 0.1)]
METHOD = [
    ("gemm", 4.0), ("gemm", 4.25), ("triton_poi_fused_mul_2", 0.5), ("copy<2>(int)", 0.15),
    ("copy<1>(int)", 0.1), ("void losia::(anonymous namespace)::gather<int>(char*)", 1.0),
]  # fmt: skip


def compared(method=METHOD, floor=FLOOR) -> dict:
    return breakdown.figures(breakdown.by_name(method, 1), breakdown.by_name(floor, 1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("triton_poi_fused_mul_silu_3", "triton_poi_fused_mul_silu_3"),
        ("void at::native::vectorized<4, at::Add<float>>(int)", "at::native::vectorized"),
        ("void at::native::(anonymous namespace)::cat<4>(int)", "at::native::cat"),
        ("(anonymous namespace)::adamw_kernel(float*)", "adamw_kernel"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        ("<unnamed>", "<unnamed>"),
        ("n" * 100, "n" * 80),
    ],
)
def test_a_name_ends_before_its_template_arguments_and_parameters(name, expected):
    assert breakdown.short(name) == expected


def test_launches_are_added_up_by_short_name_and_divided_by_the_steps():
    events = [("copy<1>(int)", 1.0), ("copy<2>(int)", 2.0), ("gemm", 6.0)]
    assert breakdown.by_name(events, 2) == {"copy": Kernel(1.0, 1.5), "gemm": Kernel(0.5, 3.0)}


def test_the_largest_differences_come_first_and_whole_where_the_floor_has_no_such_kernel():
    row = compared()
    assert row["over_floor"] == [
        {"kernel": "losia::gather", "calls": 1.0, "ms": 1.0, "floor_ms": 0.0},
        {"kernel": "triton_poi_fused_mul_2", "calls": 1.0, "ms": 0.5, "floor_ms": 0.0},
        {"kernel": "triton_poi_fused_mul_1", "calls": 0.0, "ms": 0.0, "floor_ms": 0.5},
        {"kernel": "gemm", "calls": 2.0, "ms": 8.25, "floor_ms": 8.0},
    ]  # the copies differ by less than is listed
    assert row["rest_ms"] == pytest.approx(0.15)
    assert (row["kernels_ms"], row["floor_kernels_ms"]) == (10.0, 8.6)
    assert [k["kernel"] for k in row["kernels"]][:2] == ["gemm", "losia::gather"]


@pytest.mark.parametrize("kernels", [3, 40])
def test_what_is_listed_and_the_rest_add_up_to_the_whole_difference(kernels):
    method = [(f"ours_{i}", 0.15 + 0.1 * i) for i in range(kernels)]
    row = compared([*METHOD, *method], [*FLOOR, ("only the floor's", 3.0)])
    assert len(row["over_floor"]) <= 25 and len(row["kernels"]) <= 25
    listed = sum(k["ms"] - k["floor_ms"] for k in row["over_floor"])
    assert row["rest_ms"] > 0
    assert listed + row["rest_ms"] == pytest.approx(row["kernels_ms"] - row["floor_kernels_ms"])


def test_without_a_floor_the_kernels_are_still_there():
    row = breakdown.figures(breakdown.by_name(METHOD, 1), None)
    assert row["kernels_ms"] == 10.0 and row["kernels"]
    assert row["over_floor"] is row["rest_ms"] is row["floor_kernels_ms"] is None


def profiler_that_sees(monkeypatch, *events: tuple[str, DeviceType, bool]) -> None:
    def profile(activities):
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        seen = [
            SimpleNamespace(
                name=name, device_type=where, is_user_annotation=word, self_device_time_total=3000.0
            )
            for name, where, word in events
        ]
        return contextlib.nullcontext(SimpleNamespace(events=lambda: seen))

    monkeypatch.setattr(breakdown, "profile", profile)


def test_only_what_the_gpu_did_counts_over_three_steps(monkeypatch):
    profiler_that_sees(
        monkeypatch,
        ("gemm", DeviceType.CUDA, False),
        ("cudaLaunchKernel", DeviceType.CPU, False),
        ("a region", DeviceType.CUDA, True),
    )
    steps: list[int] = []
    assert breakdown.kernels_of(lambda: steps.append(1), CPU) == {"gemm": Kernel(1 / 3, 1.0)}
    assert len(steps) == 3


def test_a_profiler_that_sees_nothing_is_said(monkeypatch):
    profiler_that_sees(monkeypatch, ("cudaLaunchKernel", DeviceType.CPU, False))
    with pytest.raises(CliError, match="--breakdown: PyTorch's profiler sees no kernels"):
        breakdown.kernels_of(lambda: None, CPU)


def test_a_cpu_is_refused_before_anything_is_recorded(tmp_path, capsys):
    file = tmp_path / "record.json"
    words = ["bench", "step", *TINY, "--modes", "eager", "--breakdown", "--output", str(file)]
    assert main(words) == 2
    assert "--breakdown: takes a CUDA device; cpu has no kernels" in capsys.readouterr().err
    assert not file.exists()


@pytest.fixture
def canned(monkeypatch):
    """Kernels of the floor and of others, as if profiled; the second value is how often it was."""
    took: list[bool] = []
    timed = step.time_steps

    def time_steps(*args):
        took.append(False)
        return timed(*args)

    def kernels_of(run, device):
        trainer = run.__self__
        assert isinstance(trainer, Trainer)
        took.append(True)
        events = METHOD if trainer.prepared.parameters else FLOOR
        return breakdown.by_name([*events, (f"call {len(took)}", 1.0)], 1)

    monkeypatch.setattr(breakdown, "ready", lambda device: None)
    monkeypatch.setattr(breakdown, "kernels_of", kernels_of)
    monkeypatch.setattr(step, "time_steps", time_steps)
    return took


def bench(folder, *flags: str) -> dict:
    file = folder / "record.json"
    words = ["--methods", "losia-pro,full", "--modes", "eager", "--output", str(file)]
    assert main(["bench", "step", *TINY, *words, *flags]) == 0
    return json.loads(file.read_text())


def test_each_row_says_by_which_kernels_it_differs_from_its_floor(canned, tmp_path, capsys):
    record = bench(tmp_path, "--breakdown")
    assert canned == [False, True] * 4  # profiled after it was timed
    floor, ours, full, _ = record["rows"]
    assert floor["over_floor"] == [] and floor["rest_ms"] == 0 and len(floor["kernels"]) == 4
    for row in (ours, full):
        over = {k["kernel"]: k["ms"] - k["floor_ms"] for k in row["over_floor"]}
        assert over["losia::gather"] == 1.0 and over["call 2"] == -1.0
        assert row["floor_kernels_ms"] == floor["kernels_ms"] == 9.6
    assert set(breakdown.NOT_SHOWN) < set(record["not_shown"])
    printed = capsys.readouterr().out
    assert "losia-pro, by kernel" in printed and "full, by kernel" not in printed
    lines = {line.split("  ")[0]: line.split()[-4:] for line in printed.splitlines()}
    assert lines["gemm"] == ["2", "8.250", "8.000", "+0.25"]
    assert lines["the rest"][-1] == "+0.15"
    assert lines["all kernels"][-3:] == ["11.00", "9.600", "+1.40"]


def test_a_paired_method_is_compared_with_the_kernels_of_its_own_floor(canned, tmp_path):
    _, ours, full, _ = bench(tmp_path, "--breakdown", "--pair")["rows"]
    (own,) = (k for k in ours["over_floor"] if k["kernel"] == "call 4")
    assert own["floor_ms"] == 1.0
    assert {k["kernel"] for k in full["over_floor"]} >= {"call 2"}


def test_without_the_flag_nothing_is_profiled(canned, tmp_path, capsys):
    record = bench(tmp_path)
    assert not any(canned) and all("kernels" not in row for row in record["rows"])
    assert "by kernel" not in capsys.readouterr().out
    assert not set(breakdown.NOT_SHOWN) & set(record["not_shown"])


def test_the_estimate_counts_the_profiled_steps():
    def seconds(flag: bool) -> float:
        args = SimpleNamespace(
            model="toy", layers=2, batch=1, length=8, methods=["losia-pro"], modes=["eager"],
            warmup=2, steps=2, pair=False, breakdown=flag,
        )  # fmt: skip
        return sum(m.seconds for m in step._plan(args, CPU, rate=1e3))

    assert seconds(True) == pytest.approx(
        seconds(False) * (2 + 2 + breakdown.STEPS) / (2 + 2), rel=0.01
    )
