"""`losia-pro bench memory`: components are differences around the moment they come into being, and add up."""

from __future__ import annotations

import json

import pytest
import torch

from losia_pro.cli import main
from losia_pro.cli.bench import memory, methods, models, runs
from losia_pro.cli.bench.meter import TensorMeter
from losia_pro.profile import importance_dtype

CPU = torch.device("cpu")
FLAGS = ["--device", "cpu", "--batch", "2", "--length", "16"]


def bench(folder, *flags: str) -> dict:
    file = folder / "record.json"
    assert main(["bench", "memory", *FLAGS, "--output", str(file), *flags]) == 0
    record = json.loads(file.read_text())
    assert record["complete"]
    return record


def of(record: dict, method: str, mode: str = "eager") -> dict:
    (row,) = (r for r in record["rows"] if r["method"] == method and r["mode"] == mode)
    return row


def test_by_default_records_go_to_runs_and_replace_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS, "--methods", "floor", "--modes", "eager"]
    assert main(["bench", "memory", *flags]) == main(["bench", "memory", *flags]) == 0
    first, second = sorted(tmp_path.rglob("*.json"), key=lambda file: len(file.name))
    assert first.parent == second.parent == tmp_path / "runs"
    assert first.name.startswith("memory-") and second.name == f"{first.stem}-2.json"


def test_components_are_the_tensors_they_name_and_sum_to_the_peak(tmp_path, capsys):
    flags = "--methods", "floor,losia-pro,losia-pro+profile,full", "--modes", "eager,checkpointed"
    record = bench(tmp_path, *flags)
    assert all(sum(row["bytes"].values()) == row["peak_bytes"] for row in record["rows"])
    model = models.build("toy", 2, 16, CPU, torch.bfloat16)
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    entries = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    losia = methods.parse("losia-pro")(model).losia
    subnets = sum(p.numel() for p in losia.parameters())
    indices = sum(m.out_idx.nbytes + m.in_idx.nbytes for m in losia.modules.values())
    step_counters = 4 * len(losia.parameters())

    floor, ours, full = (of(record, name) for name in ("floor", "losia-pro", "full"))
    for row in (floor, ours, full):
        assert held <= row["bytes"]["weights"] <= held + 1024  # and what building a model leaves
    assert floor["bytes"]["trained"] == floor["bytes"]["optimizer"] == 0
    # Values and gradients in fp32; the indices; and on the CPU the record of them and of the base's values there.
    base = subnets * torch.bfloat16.itemsize
    assert ours["bytes"]["trained"] == 2 * 4 * subnets + 2 * indices + base
    assert ours["bytes"]["optimizer"] == 2 * 4 * subnets + step_counters
    assert ours["bytes"]["profiling"] == 0
    assert full["bytes"]["trained"] == 2 * entries
    profiled = of(record, "losia-pro+profile")
    buffers = 2 * matrices * importance_dtype(torch.bfloat16).itemsize  # of one layer
    assert buffers <= profiled["bytes"]["profiling"] <= 1.5 * buffers
    assert profiled["bytes"]["trained"] == ours["bytes"]["trained"]
    for method in ("floor", "losia-pro"):
        kept = [
            of(record, method, mode)["bytes"]["activations"] for mode in ("eager", "checkpointed")
        ]
        assert 0 < kept[1] < kept[0]
    printed = capsys.readouterr().out
    assert "over floor" in printed and "Not shown" in printed


def test_what_a_cpu_cannot_meter_is_skipped_with_its_reason(tmp_path):
    record = bench(tmp_path, "--methods", "floor", "--modes", "compiled")
    (row,) = record["rows"]
    assert row["status"] == "skipped" and "compiled" in row["reason"]


def test_the_meter_counts_storages_while_they_live():
    with TensorMeter() as meter:
        a = torch.zeros(100)
        b = a.view(10, 10) + 1  # a view is no storage of its own
        assert meter.now() == 800
        c = b.T.contiguous()
        assert meter.now() == meter.peak() == 1200
        del a, c
        assert meter.now() == 400 and meter.peak() == 1200
        meter.restart()
        b.add_(1)
        assert meter.peak() == 400
        del b
        assert meter.now() == 0


def test_the_meter_sees_what_a_backward_keeps_and_frees():
    with TensorMeter() as meter:
        weight = torch.ones(64, 64, requires_grad=True)
        x = torch.ones(8, 64)
        before = meter.now()
        loss = (x @ weight).exp().sum()
        kept = meter.now() - before
        assert kept == 8 * 64 * 4 + 4  # exp's result, and the loss; the product itself is freed
        loss.backward()
        del loss
        assert meter.now() - before == weight.nbytes  # the gradient


def test_a_failed_method_is_told_by_the_exit_code(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(runs, "build", broken)
    file = tmp_path / "record.json"
    flags = ["--methods", "floor", "--modes", "eager", "--output", str(file)]
    assert main(["bench", "memory", *FLAGS, *flags]) == 1
    assert json.loads(file.read_text())["rows"][0]["reason"] == "RuntimeError: no such kernel"
    assert "WRONG: eager, floor" in capsys.readouterr().out


@pytest.mark.parametrize("size", [5e9, 5e6])
def test_the_table_takes_the_unit_that_fits(size):
    row = {"method": "floor", "status": "ok", "peak_bytes": size}
    row["bytes"] = dict.fromkeys(memory.COMPONENTS, size / 6)
    head, _, line = memory._table([row]).splitlines()
    assert head.startswith("GB of" if size > 1e9 else "MB of")
    assert line.split()[-2:] == ["5.000", "+0.000"]
