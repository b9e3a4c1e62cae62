"""`losia-pro bench kernels`: answers are checked before they are timed, peers take turns, stops are recorded."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch

from losia_pro import SubnetLinear, dispatch, torch_ops
from losia_pro.cli import main
from losia_pro.cli.bench import host, kernel_tables, timing, traffic
from losia_pro.cli.bench.points import Candidate
from losia_pro.cli.bench.shapes import MODELS, SELECTIONS, unique_linears
from losia_pro.cli.bench.table import number, table
from losia_pro.cli.bench.traffic import Limits, Traffic

CPU = torch.device("cpu")


def bench(folder, *flags: str) -> tuple[int, dict]:
    file = folder / "record.json"
    code = main(
        ["bench", "kernels", "--device", "cpu", "--tokens", "16", "--output", str(file), *flags]
    )
    return code, json.loads(file.read_text())


def test_every_operation_is_timed_against_plain_pytorch_and_least_traffic(tmp_path, capsys):
    code, record = bench(tmp_path)
    assert code == 0 and record["complete"] and record["stopped"] is None
    found = {(row["op"], row["selection"]) for row in record["rows"]}
    every = {s.name for s in SELECTIONS}
    for op in ("gather_columns", "subnet_grad", "write_back_"):
        more = {"single, stochastic"} if op == "write_back_" else set()
        assert {selection for o, selection in found if o == op} == every | more
    assert {
        ("importance_update_", "whole"),
        ("adamw_", "single"),
        ("lerp_", "single"),
        ("lerp_", "single, fp32"),
        ("host", "eager"),
    } <= found
    for row in record["rows"]:
        names = set(host.CHAINS) if row["op"] == "host" else {"library", "default"}
        names -= {"library"} if row["selection"] == "single, stochastic" else set()
        assert names <= set(row["candidates"])
        for candidate in row["candidates"].values():
            assert 0 < candidate["p20_us"] <= candidate["median_us"] <= candidate["p80_us"]
            assert candidate.get("error", 0) <= candidate.get("allowed", 0)
        if row["op"] != "host":
            bandwidth, flops = record["limits"]["bandwidth"], record["limits"]["flops"]
            least = 1e6 * max(row["bytes"] / bandwidth, row["flops"] / flops)
            assert row["least_us"] == pytest.approx(least, abs=1e-3)
    assert {"torch", "transformers", "losia_pro", "python"} <= set(record["versions"])
    assert record["device"]["type"] == "cpu" and record["not_shown"] and record["date"]
    assert record["default_impl"]["subnet_grad"] == "torch" and record["special_impl"] == {}
    printed = capsys.readouterr().out
    assert "Not shown" in printed and "/least" in printed


def test_the_shapes_of_a_model_are_measured_once_each(tmp_path):
    _, record = bench(tmp_path, "--models", "toy,toy", "--ops", "gather_columns,subnet_grad")
    places = [(r["op"], r["in"], r["out"], r["selection"]) for r in record["rows"]]
    assert len(places) == len(set(places))
    assert {r["in"] for r in record["rows"] if r["op"] == "gather_columns"} == {128, 256}
    shapes = {(r["in"], r["out"]) for r in record["rows"] if r["op"] == "subnet_grad"}
    assert shapes == {(128, 128), (128, 256), (256, 128)}


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_the_least_function_gives_what_the_layer_gives(how):
    torch.manual_seed(0)
    layer = SubnetLinear(32, 48, bias=False, rank_factor=1 / 4)
    layers, found = (layer, host.Least(layer)), []
    dy = torch.randn(5, 48)
    for each in layers:
        x = torch.arange(160.0).view(5, 32).requires_grad_()
        y = (torch.compile(each, fullgraph=True) if how == "compiled" else each)(x)
        y.backward(dy)
        found.append((y, x.grad, each.subnet.grad))
    for ours, least in zip(*found, strict=True):
        torch.testing.assert_close(least, ours)


def test_a_host_row_says_how_far_the_layer_is_from_both(monkeypatch):
    """Of each round: what lies beyond is not a difference of medians."""
    took = {"F.linear": [1.0, 6.0, 5.0], "least Function": [3.0, 7.0, 6.0]}
    took["SubnetLinear"] = [4.0, 9.0, 20.0]
    names = iter(host.CHAINS)

    def sampler(*_):
        times = itertools.cycle(took[next(names)])
        return lambda: next(times)

    monkeypatch.setattr(host, "_sampler", sampler)
    monkeypatch.setattr(host, "REPEATS", 3)
    monkeypatch.setattr(host, "MAX_ROUNDS", 1)
    row = host.measure("eager", CPU, torch.float32)
    assert row["beyond"]["median_us"] == 3 and row["beyond_least"]["median_us"] == 2
    head, _, line = kernel_tables.block([row]).splitlines()
    assert re.split(r"  +", head.strip()) == [*host.CHAINS, "beyond F.linear", "beyond least"]
    assert line.split() == ["eager", "5.00", "6.00", "9.00", "3.00", "2.00"]


def answer_with(monkeypatch, op: str, result) -> None:
    """Let every implementation of ``op`` be ``result``."""
    chosen = dispatch._chosen
    monkeypatch.setattr(
        dispatch, "_chosen", lambda o, *rest: result if o == op else chosen(o, *rest)
    )


def half_updated(which: int):
    whole = torch_ops.importance_update_

    def update(importance, uncertainty, *rest):
        kept = (importance, uncertainty)[which].clone()
        whole(importance, uncertainty, *rest)
        (importance, uncertainty)[which].copy_(kept)

    return update


def shifted(weights, subnets, rows, columns, *_):
    for weight, subnet, r, c in zip(weights, subnets, rows, columns, strict=True):
        weight[r[:, None], c] = subnet.to(weight.dtype).roll(1, 0)


def spilled(weights, subnets, rows, columns, *_):
    for weight, subnet, r, c in zip(weights, subnets, rows, columns, strict=True):
        weight.fill_(0.5)
        weight[r[:, None], c] = subnet.to(weight.dtype)


def stepped_but_one(params, grads, exp_avgs, exp_avg_sqs, *rest, **constants):
    forgotten = [v.clone() for v in exp_avg_sqs]
    torch_ops.adamw_(params, grads, exp_avgs, forgotten, *rest, **constants)


def rounded_to_nearest(tensors, others, weight, key):
    for t, other in zip(tensors, others, strict=True):
        t.copy_(t.float().lerp_(other.float(), weight).bfloat16())


BROKEN = {
    "neighbours": ("gather_columns", lambda x, idx, *_: x[:, (idx + 1) % x.shape[1]]),
    "zeros": ("subnet_grad", lambda dy, x_sub, idx, *_: torch.zeros(len(idx), x_sub.shape[1])),
    "nothing": ("write_back_", lambda *_: None),
    "other values": ("write_back_", shifted),
    "other entries too": ("write_back_", spilled),
    "a moment left behind": ("adamw_", stepped_but_one),
    "to nearest": ("lerp_", rounded_to_nearest),
    "no importance": ("importance_update_", half_updated(0)),
    "no uncertainty": ("importance_update_", half_updated(1)),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_wrong_result_has_no_time_and_fails_the_run(broken, tmp_path, monkeypatch, capsys):
    op, result = BROKEN[broken]
    answer_with(monkeypatch, op, result)
    code, record = bench(tmp_path, "--ops", op)
    assert code == 1
    wrong = [row["candidates"]["torch"] for row in record["rows"]]
    for candidate in wrong:
        assert "median_us" not in candidate and "error" in candidate["refused"]
    library = [row["candidates"].get("library", {"median_us": 1}) for row in record["rows"]]
    assert all("median_us" in candidate for candidate in library)
    assert f"WRONG: {op}" in capsys.readouterr().out


def test_an_implementation_that_raises_is_recorded_and_the_others_are_timed(tmp_path, monkeypatch):
    def refuse(*_):
        raise TypeError("not this dtype\nand more")

    answer_with(monkeypatch, "gather_columns", refuse)
    code, record = bench(tmp_path, "--ops", "gather_columns")
    assert code == 1
    candidates = record["rows"][0]["candidates"]
    assert candidates["default"]["refused"] == "TypeError: not this dtype"
    assert candidates["library"]["median_us"] > 0


@pytest.mark.parametrize(
    ("error", "wrong"),
    [(1.9, False), (2.0, False), (2.1, True), (math.nan, True), (math.inf, True)],
)
def test_an_error_beyond_what_is_allowed_is_wrong(error, wrong):
    assert bool(Candidate(lambda _: None, error, 2.0).wrong) is wrong


def test_a_budget_stops_the_run_and_says_what_is_left(tmp_path, capsys):
    code, record = bench(tmp_path, "--ops", "gather_columns", "--budget", "1e-9")
    assert code == 0 and record["rows"] == [] and not record["complete"]
    assert "2 of 2 points left" in record["stopped"] and "Stopped early" in capsys.readouterr().out


def test_unknown_names_are_refused(tmp_path, capsys):
    for flag, value in (("--models", "no-such-model"), ("--ops", "matmul"), ("--tokens", "0")):
        assert main(["bench", "kernels", "--device", "cpu", flag, value]) == 2
        assert f"{flag} {value}" in capsys.readouterr().err
    assert main(["bench", "kernels", "--device", "cuda:99"]) == 2


def test_candidates_take_turns():
    order = []

    def call(name):
        return lambda i: order.append((name, i))

    times = timing.interleaved({n: (call(n), 2) for n in "ab"}, 2, CPU)
    assert set(times) == {"a", "b"} and times["a"].samples >= timing.MIN_ROUNDS
    rounds = order[4:]  # after the warm-up of each
    assert rounds[:8] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 2


def test_a_candidate_that_fails_while_it_is_timed_does_not_stop_the_others():
    def fail(_):
        raise RuntimeError("operation not permitted when stream is capturing")

    times = timing.interleaved({"bad": (fail, 1), "good": (lambda _: None, 1)}, 1, CPU)
    assert "not permitted" in times["bad"] and times["good"].median >= 0


def test_percentiles_agree_with_torch():
    samples = [5.0, 1.0, 4.0, 2.0, 9.0, 3.0]
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        expected = torch.quantile(torch.tensor(samples, dtype=torch.float64), q)
        assert timing.quantile(samples, q) == pytest.approx(float(expected))


def test_input_sets_exceed_the_cache_together():
    cache = 50 * 2**20
    assert timing.n_sets(2**20, cache) * 2**20 >= 2 * cache
    assert timing.n_sets(2**30, cache) == 2
    assert timing.n_calls(5, least_us=1000.0) == 5 and timing.n_calls(5, least_us=10.0) == 20


def test_a_gather_moves_whole_sectors():
    idx = torch.tensor([0, 15, 16, 40])  # bf16: bytes 0, 30, 32, 80: sectors 0, 1, 2
    assert traffic.touched(idx, 2, 64, 32) == 3 * 32
    assert traffic.touched(torch.arange(64), 2, 64, 32) == 128
    assert traffic.gather_columns(10, 96, 4, 2) == Traffic(10 * (96 + 8) + 32, 0)
    grad = traffic.subnet_grad(10, 96, n_out=4, n_in=3, element=2)
    assert grad == Traffic(10 * (96 + 6) + 4 * 3 * 4 + 32, 2 * 10 * 4 * 3)
    importance = traffic.importance_update(10, out=4, into=3, element=2, score=4)
    assert importance == Traffic(10 * 7 * 2 + 12 * (2 + 16), 2 * 10 * 4 * 3)
    assert traffic.adamw(10) == Traffic(140, 0)
    assert traffic.lerp(10, 2, 2) == Traffic(60, 0) and traffic.lerp(10, 4, 2) == Traffic(100, 0)
    assert traffic.write_back(row=96, n_out=4, n_in=3, subnet=4) == Traffic(4 * (12 + 96) + 56, 0)


def test_the_published_figures_of_least_traffic_follow():
    """4096 x 4096, 8192 tokens, bf16 at 4.28 TB/s: 15.7 us for a gather, of which 88 % of the sectors are read."""
    limits = Limits(bandwidth=4.28e12, flops=764e12, sector=32, l2=0)
    row = round(4096 * 2 * (1 - (7 / 8) ** 16))
    assert traffic.gather_columns(8192, row, 512, 2).least_us(limits) == pytest.approx(
        15.7, abs=0.1
    )
    assert traffic.subnet_grad(8192, row, 512, 512, 2).least_us(limits) == pytest.approx(
        16.2, abs=0.3
    )


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: s.name)
def test_a_selection_is_sorted_distinct_and_in_aligned_runs(selection):
    generator = torch.Generator().manual_seed(0)
    for features in (4096, 11008, 1024):
        idx, group = selection.choose(features, selection.out_factor, generator)
        assert torch.equal(idx, idx.unique()) and idx[0] >= 0 and idx[-1] < features
        assert len(idx) == selection.n_out(features)
        runs = idx.view(-1, group)
        assert not (runs[:, 0] % group).any()
        assert torch.equal(runs, runs[:, :1] + torch.arange(group))
        assert group == (features if selection.out_factor == 1 else selection.group)


@pytest.mark.parametrize(
    ("model", "parameters", "norms"),
    [
        ("llama2-7b", 6_738_415_616, 65 * 4096),
        ("llama2-13b", 13_015_864_320, 81 * 5120),
        ("gemma-2b", 2_506_172_416, 37 * 2048),
        ("llama3-8b", 8_030_261_248, 65 * 4096),
        ("llama3-70b", 70_553_706_496, 161 * 8192),
    ],
)
def test_the_models_have_their_published_sizes(model, parameters, norms):
    assert MODELS[model].parameters() == parameters - norms


def test_linears_shared_by_models_are_measured_once():
    shapes = unique_linears(["llama2-7b", "llama3-8b"])
    assert len(shapes) == len(set(shapes))
    assert set(shapes) == {
        (4096, 4096), (4096, 11008), (11008, 4096), (4096, 1024), (4096, 14336), (14336, 4096),
    }  # fmt: skip


def test_the_summary_takes_the_worst_ratio():
    def row(default: float, library: float) -> dict:
        times = {"default": {"median_us": default}, "library": {"median_us": library}}
        where = {"op": "subnet_grad", "selection": "single", "in": 1, "out": 1, "tokens": 1}
        return {**where, "least_us": 10.0, "candidates": times, "single_library_us": 100.0}

    line = kernel_tables.summary([row(20, 40), row(30, 20), row(20, 20)]).splitlines()[-1]
    columns = ["2.000x", "3.000x", "1.000x", "1.500x", "0.200x", "0.300x"]
    assert line.split()[-6:] == columns


def test_numbers_keep_their_digits_and_columns_align():
    shown = [number(v) for v in (0.01234, 1.2345, 12.345, 12345.6, None)]
    assert shown == ["0.012", "1.23", "12.3", "12346", "-"]
    lines = table(["a", "bb"], [["ccc", "1"], ["d", "22"]]).splitlines()
    assert lines == ["a    bb", "---  --", "ccc   1", "d    22"]
