"""Launch shapes that are measured, on the CPU; `test_kernels_interpreted.py` runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from losia_pro import dispatch, reference
from losia_pro.cli import main, tune
from losia_pro.cli.bench import device as devices
from losia_pro.cli.bench import kernels
from losia_pro.cli.bench.timing import Stats
from losia_pro.cli.bench.traffic import Limits
from losia_pro.kernels import launch, tuned

CPU = torch.device("cpu")
FP32 = torch.float32


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.table.cache_clear()
    yield tmp_path
    tuned.table.cache_clear()


def shapes(op: str, dtype: torch.dtype) -> dict:
    return dict(tune._candidates(op, dtype, CPU))


def relative(a: torch.Tensor, truth: torch.Tensor) -> float:
    return float((a.double() - truth).norm() / truth.norm())


@pytest.fixture
def launched(monkeypatch):
    """The launch shape of each of the kernels' launches."""
    seen: list[tuple[int, ...]] = []
    names = "BLOCK_T", "BLOCK_C", "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"

    class Watched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*args, **options):
                seen.append(tuple(options[n] for n in names if n in options))
                self.kernel[grid](*args, **options)

            return run

    for module in ("gather_columns", "subnet_grad", "importance_update"):
        module = f"losia_pro.kernels.{module}"
        name = f"{module.rpartition('.')[2]}_kernel"
        module = importlib.import_module(module)
        monkeypatch.setattr(module, name, Watched(getattr(module, name)))
    return seen


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_every_launch_shape_that_is_measured_is_launched_and_gives_the_right_answer(
    dtype, launched
):
    """With tiles that end within the matrices."""
    torch.manual_seed(0)
    tokens, out, into = 70, 280, 72
    dy, x = torch.randn(tokens, out).to(dtype), torch.randn(tokens, into).to(dtype)
    weight = torch.randn(out, into).to(dtype)
    idx = (torch.arange(0, out // 8, 2)[:, None] * 8 + torch.arange(8)).flatten()
    for tiles in shapes("gather_columns", dtype).values():
        with tuned.forced("gather_columns", tiles):
            assert torch.equal(launch.gather_columns(dy, idx, 8), dy[:, idx]), tiles
        assert tiles in (None, launched[-1])
    truth = dy[:, idx].double().T @ x.double()
    plain = relative(dy[:, idx].float().T @ x.float(), truth)
    for tiles in shapes("subnet_grad", dtype).values():
        with tuned.forced("subnet_grad", tiles):
            ours = launch.subnet_grad(dy, x, idx, torch.float32, 8, fused=True)
        assert relative(ours, truth) <= 2 * plain, tiles
        assert tiles in (None, launched[-1])
    current = reference.importance(dy.double().T @ x.double(), weight.double(), "first")
    bound = 4 * tokens * torch.finfo(torch.float32).eps
    for tiles in shapes("importance_update_", dtype).values():
        kept = torch.zeros(2, out, into)
        with tuned.forced("importance_update_", tiles):
            launch.importance_update_(*kept, weight, dy, x, None, 0.5, 0.5, "first")
        assert relative(kept[0], current / 2) <= bound, tiles
        assert relative(kept[1], current / 4) <= bound, tiles
        assert tiles in (None, launched[-1])


FASTER = {  # by operation: the launch shape that is to win
    "gather_columns": "32x64, 8 warps",
    "subnet_grad": "64x128x32, 8 warps, 3 stages",
    "importance_update_": "64x128x32, 8 warps, 3 stages",
}


@pytest.fixture
def clock(monkeypatch):
    """Times without a device: what ``clock`` says of a launch shape, else as the rule."""
    fast: dict[str, float] = {}

    def interleaved(calls, *_):
        return {n: Stats(fast.get(n.split(" ", 1)[1], 10.0), 9.0, 11.0, 7) for n in calls}

    monkeypatch.setattr(kernels, "interleaved", interleaved)
    monkeypatch.setattr(devices, "limits", lambda *_: Limits(1e12, 1e12, 32, 0))
    return fast


FLAGS = ["tune", "--device", "cpu", "--dtype", "fp32", "--shape", "256x64", "--tokens", "16,24"]
FLAGS += ["--rank-factor", "0.5", "--neuron-groups", "1,8"]


def test_what_wins_is_kept_and_used_and_what_no_longer_wins_is_not(clock, launched, capsys):
    clock.update(dict.fromkeys(FASTER.values(), 9.0))
    assert main(FLAGS) == 0
    rows = json.loads(tuned.path(CPU).read_text())["rows"]
    found = {tuned.key(row): tuple(row["tiles"]) for row in rows}
    assert set(found) == {
        *(("gather_columns", FP32, n, run) for n in (32, 128) for run in (1, 8)),
        *(("gather_columns", FP32, n, 1) for n in (1, 4, 6, 24)),
        *(("subnet_grad", FP32, *sizes) for sizes in SIZES),
        ("importance_update_", FP32, 256, 64),
    }
    for (op, *_), tiles in found.items():
        assert tiles == shapes(op, FP32)[FASTER[op]]
    assert all(row["us"] == [9.0, 9.0] and row["rule_us"] == [10.0, 10.0] for row in rows)
    assert "0.900x of the rule's time" in capsys.readouterr().out

    launched.clear()
    x, idx = torch.randn(64, 256), torch.arange(0, 256, 2)
    assert torch.equal(launch.gather_columns(x, idx), x[:, idx])
    launch.gather_columns(x, idx[:100])  # of another size: the rule's
    assert launched == [(32, 64, 8), (8, 128, 8)]

    clock.clear()
    assert main([*FLAGS, "--ops", "subnet_grad"]) == 0
    left = {tuned.key(row) for row in json.loads(tuned.path(CPU).read_text())["rows"]}
    assert left == {key for key in found if key[0] != "subnet_grad"}


def test_where_the_library_answers_a_launch_shape_that_was_faster_does(clock, launched):
    """Of all columns, in bf16; and it is not taken for that of as many chosen ones."""
    name = "64x128x64, 4 warps, 3 stages"
    tiles = shapes("subnet_grad", torch.bfloat16)[name]
    clock[name] = 9.0
    assert main([*FLAGS, "--dtype", "bf16", "--ops", "subnet_grad"]) == 0
    keys = [tuned.key(row) for row in json.loads(tuned.path(CPU).read_text())["rows"]]
    assert keys == [("subnet_grad", torch.bfloat16, *sizes) for sizes in SIZES]
    dy, x, every = torch.randn(40, 256), torch.randn(40, 6), torch.arange(256)
    for dtype, n_in in ((torch.bfloat16, 6), (torch.bfloat16, 5), (FP32, 6)):
        launched.clear()
        ours = launch.subnet_grad(dy.to(dtype), x[:, :n_in].to(dtype), every, FP32, 256)
        truth = dy.to(dtype).double().T @ x[:, :n_in].to(dtype).double()
        assert relative(ours, truth) < 1e-6
        assert launched == ([tiles] if (dtype, n_in) == (torch.bfloat16, 6) else [])
    assert tuned.lookup(CPU, "subnet_grad", torch.bfloat16, 256, 6, 16) is None


SIZES = (128, 32, 8), (256, 6, 256), (256, 1, 256)  # n_out, n_in, run


def test_a_budget_ends_it_with_what_was_measured_of_the_first_weight(clock, monkeypatch, capsys):
    clock.update(dict.fromkeys(FASTER.values(), 9.0))
    seconds = iter(range(10))
    monkeypatch.setattr(tune, "perf_counter", lambda: float(next(seconds)))
    assert main([*FLAGS, "--shape", "64x256", "--budget", "1.5"]) == 0
    rows = json.loads(tuned.path(CPU).read_text())["rows"]
    assert [(row["op"], row.get("n_out"), row.get("n_in")) for row in rows] == [
        ("subnet_grad", *sizes[:2]) for sizes in SIZES
    ]
    assert "5 of 6 left" in capsys.readouterr().out


def test_a_launch_shape_that_is_wrong_or_cannot_run_is_not_kept(clock, monkeypatch):
    clock.update(dict.fromkeys([FASTER["gather_columns"], "16x256, 8 warps"], 5.0))
    wrong, refused = (shapes("gather_columns", FP32)[name] for name in clock)
    right = launch.gather_columns

    def gather_columns(*args):
        if tuned._forced.get("gather_columns") == refused:
            raise RuntimeError("out of resources")
        shift = tuned._forced.get("gather_columns") == wrong
        return right(*args).roll(int(shift), 0)

    monkeypatch.setattr(launch, "gather_columns", gather_columns)
    dispatch._chosen.cache_clear()
    try:
        assert main([*FLAGS, "--ops", "gather_columns"]) == 0
    finally:
        dispatch._chosen.cache_clear()
    assert json.loads(tuned.path(CPU).read_text())["rows"] == []


def test_a_rule_that_is_wrong_is_told_by_the_exit_code(clock, monkeypatch, capsys):
    monkeypatch.setattr(launch, "gather_columns", lambda x, idx, *_: x[:, idx] + 1)
    dispatch._chosen.cache_clear()
    try:
        assert main([*FLAGS, "--ops", "gather_columns"]) == 1
    finally:
        dispatch._chosen.cache_clear()
    assert "WRONG: gather_columns" in capsys.readouterr().out
