"""`losia-pro bench` on a GPU, and regression benchmarks of the kernels (pytest-benchmark).

pytest -m gpu tests/gpu/test_bench_gpu.py --benchmark-save=NAME
pytest -m gpu tests/gpu/test_bench_gpu.py --benchmark-compare='*NAME' --benchmark-compare-fail=median:10%
"""

from __future__ import annotations

import gc
import json

import pytest
import torch

from losia_pro import dispatch
from losia_pro.cli import main, tune
from losia_pro.cli.bench import breakdown, kernel_tables, kernels, operations
from losia_pro.cli.bench import device as devices
from losia_pro.cli.bench.meter import AllocatorMeter
from losia_pro.cli.bench.points import Setting

TOKENS = 8192
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]  # LLaMA-2 7B's
SHAPE_IDS = ["4096x4096", "4096x11008", "11008x4096"]


@pytest.fixture(scope="module")
def setting() -> Setting:
    device = devices.choose("cuda")
    torch.manual_seed(0)
    return Setting(device, torch.bfloat16, devices.limits(device, torch.bfloat16))


@pytest.fixture(autouse=True)
def memory():
    yield
    gc.collect()
    torch.cuda.empty_cache()


def record(tmp_path, *words: str) -> dict:
    file = tmp_path / "record.json"
    assert main(["bench", *words, "--device", "cuda", "--output", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["complete"] and content["device"]["type"] == "cuda"
    return content


def test_kernels_are_right_and_timed_by_graph_replays(tmp_path):
    content = record(tmp_path, "kernels", "--models", "toy", "--tokens", "512")
    by = {row["timed_by"] for row in content["rows"] if row["op"] in operations.POINTS}
    assert by == {"graphs"}
    assert {row["selection"] for row in content["rows"] if row["op"] == "host"} == {
        "eager", "compiled", "graphs",
    }  # fmt: skip
    assert all("beyond_least" in row for row in content["rows"] if row["op"] == "host")
    assert content["limits"]["bandwidth"] > 1e11 and content["limits"]["flops"] > 1e13


def test_steps_of_every_kind_run_on_a_gpu(tmp_path):
    methods = "losia-pro,losia-pro+profile,losia-pro-g16,losia-pro-rect,full"
    words = ["step", "--model", "toy", "--batch", "2", "--length", "128", "--methods", methods]
    content = record(tmp_path, *words, "--modes", "eager,checkpointed,compiled")
    assert {row["status"] for row in content["rows"]} == {"ok"}


@pytest.mark.parametrize(
    ("mode", "kernel"), [("eager", "gather_columns_kernel"), ("compiled", "write_back_kernel")]
)  # a compiler makes the gathers itself
def test_kernels_over_the_floor_add_up_and_ours_are_among_them(mode, kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(breakdown, "LEAST_MS", 0.0)  # a toy's kernels take microseconds
    monkeypatch.setattr(breakdown, "MOST", 200)
    words = ["step", "--model", "toy", "--batch", "2", "--length", "128", "--methods", "losia-pro"]
    floor, ours, again = record(tmp_path, *words, "--modes", mode, "--breakdown")["rows"]
    for row in (floor, ours, again):
        over = sum(k["ms"] - k["floor_ms"] for k in row["over_floor"]) + row["rest_ms"]
        # each figure is rounded to a thousandth
        assert over == pytest.approx(
            row["kernels_ms"] - row["floor_kernels_ms"], abs=1e-3 * (len(row["over_floor"]) + 2)
        )
        assert 0 < row["kernels_ms"] < row["median_ms"] * 1.5
    calls = {k["kernel"].split("::")[-1]: k["calls"] for k in ours["over_floor"]}
    assert calls[kernel] >= 1
    assert not any(kernel in k["kernel"] for k in floor["kernels"])


def test_components_of_memory_sum_to_the_peak_on_a_gpu(tmp_path):
    words = ["memory", "--model", "toy", "--batch", "2", "--length", "128"]
    words += ["--methods", "floor,losia-pro+profile,full", "--modes", "eager,checkpointed"]
    rows = record(tmp_path, *words)["rows"]
    assert all(sum(row["bytes"].values()) == row["peak_bytes"] for row in rows)
    eager, checkpointed = (r["bytes"] for r in rows if r["method"] == "floor")
    assert checkpointed["activations"] < eager["activations"]
    assert all(r["bytes"]["profiling"] > 0 for r in rows if "profile" in r["method"])


def test_the_allocators_meter_follows_what_lives():
    meter = AllocatorMeter(torch.device("cuda"))
    before = meter.now()
    a = torch.empty(2**20, dtype=torch.uint8, device="cuda")
    assert meter.now() - before == 2**20
    meter.restart()
    del a
    assert meter.now() == before and meter.peak() == before + 2**20


def test_launch_shapes_are_measured_and_the_kernels_take_them(tmp_path, monkeypatch):
    tuned = pytest.importorskip("losia_pro.kernels.tuned")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Something other than the rule's is kept, whether it is faster or not.
    monkeypatch.setattr(tune, "best", lambda times: min(set(times[0]) - {"rule"}, key=times[0].get))
    device = torch.device("cuda", torch.cuda.current_device())
    tuned.table.cache_clear()
    assert main(["tune", "--shape", "2048x1024", "--tokens", "1024", "--neuron-groups", "16"]) == 0
    rows = tuned.read(tuned.path(device), tuned.header(device))
    assert {row["op"] for row in rows} == set(operations.POINTS)
    for row in rows:
        assert tuned.lookup(device, *tuned.key(row)) == tuple(row["tiles"])
    tuned.table.cache_clear()


@pytest.mark.parametrize("op", ["gather_columns", "subnet_grad"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_the_default_choice_is_not_slower_than_plain_pytorch(op, shape, setting):
    """3 % for noise."""
    rows = kernels.timed(setting, operations.POINTS[op](setting, *shape, TOKENS))
    assert not kernel_tables.wrong(rows)
    ratios = {row["selection"]: kernel_tables.ratio_to(row, "library") for row in rows}
    assert all(ratio <= 1.03 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("impl", ["default", *dispatch.IMPLS])
@pytest.mark.parametrize("selection", ["single", "groups of 16", "1/64 x all", "whole"])
@pytest.mark.parametrize("op", operations.POINTS)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_regression(op, shape, selection, impl, setting, request):
    pytest.importorskip("pytest_benchmark")
    benchmark = request.getfixturevalue("benchmark")
    if (selection == "whole") != (op == "importance_update_"):
        pytest.skip("importance has no selection")
    point = operations.POINTS[op](setting, *shape, TOKENS)
    (case,) = (c for c in point.cases if c.key["selection"] == selection)
    if impl not in case.candidates:
        pytest.skip(f"{impl} cannot run {op} here")
    candidate = case.candidates[impl]
    assert not candidate.wrong
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(point.sets):
            candidate.call(i)
    benchmark.extra_info.update(calls=point.sets, least_us=case.traffic.least_us(setting.limits))

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=30, warmup_rounds=3)
