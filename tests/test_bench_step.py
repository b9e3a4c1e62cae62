"""`losia-pro bench step` and `memory`: each method is what its name says, is checked, and is recorded."""

from __future__ import annotations

import json

import pytest
import torch

import losia_pro
from losia_pro.cli import main
from losia_pro.cli.bench import estimate, methods, models, step
from losia_pro.cli.bench.trainer import Trainer, time_steps
from losia_pro.cli.errors import CliError

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--batch", "1", "--length", "8", "--steps", "2", "--warmup", "2"]


def bench(folder, *flags: str) -> tuple[int, dict]:
    file = folder / "record.json"
    code = main(["bench", "step", *TINY, "--output", str(file), *flags])
    return code, json.loads(file.read_text())


def build():
    return models.build("toy", 2, 8, CPU, torch.bfloat16)


def trainer(method: str, mode: str = "eager") -> Trainer:
    model = build()
    prepared = methods.parse(method)(model)
    models.set_mode(model, mode)
    return Trainer(prepared, models.tokens("toy", 1, 8, CPU), lr=1e-3, fused=True)


ALL = (
    "losia-pro losia-pro+profile losia-pro-g8 losia-pro-rect losia-pro-bf16 losia-pro-torch "
    "lora-r4 lora-peft-r4 dora-r4 full"
)


@pytest.mark.parametrize(
    "chosen", [("eager", ALL), ("checkpointed", "losia-pro lora-peft-r4 full")]
)
def test_every_method_is_measured_over_the_floor_of_its_mode(chosen, tmp_path, capsys):
    mode, names = chosen
    code, record = bench(tmp_path, "--methods", names.replace(" ", ","), "--modes", mode)
    assert code == 0 and record["complete"]
    places = [(row["mode"], row["method"]) for row in record["rows"]]
    assert places == [(mode, name) for name in ("floor", *names.split(), "floor, again")]
    for row in record["rows"]:
        assert row["status"] == "ok" and row["steps"] == 2
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["peak_bytes"] > 0
        floor = record["rows"][0]
        assert row["floor_ms"] == floor["median_ms"]
        assert row["ratio"] == pytest.approx(row["median_ms"] / floor["median_ms"], abs=1e-4)
    assert record["rows"][0]["ratio"] == 1.0
    assert record["estimated_seconds"] > 0 and record["arguments"]["model"] == "toy"
    printed = capsys.readouterr().out
    assert "/floor" in printed and "Not shown" in printed


def test_checkpointing_is_non_reentrant():
    loss = trainer("losia-pro", "checkpointed").forward()
    nodes, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [after for after, _ in node.next_functions]
    names = {node.name() for node in nodes}
    assert not any("Checkpoint" in name for name in names)
    assert any("SubnetLinear" in name for name in names)


def test_compiled_layers_train(tmp_path, monkeypatch):
    compile_layer = torch.nn.Module.compile

    def traced(layer):  # Dynamo and AOTAutograd, without half a minute of C++
        compiled.append(layer)
        compile_layer(layer, backend="aot_eager")

    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    code, record = bench(tmp_path, "--methods", "losia-pro", "--modes", "compiled")
    assert code == 0
    floor, ours, _ = record["rows"]
    assert ours["status"] == floor["status"] == "ok"
    assert ours["graph_breaks"] == floor["graph_breaks"] == 0
    assert len(compiled) == 2 * 3  # layers, measurements
    assert ours["first_step_s"] * 1e3 > 2 * ours["median_ms"]  # it waits for the compiler
    assert ours["last_loss"] < ours["first_loss"] == pytest.approx(floor["first_loss"], abs=1e-3)


def test_a_paired_floor_is_measured_on_the_same_model(tmp_path):
    flags = "--methods", "losia-pro,full", "--modes", "eager", "--pair"
    _, record = bench(tmp_path, *flags)
    floor, ours, full, _ = record["rows"]
    assert ours["floor_ms"] != floor["median_ms"] == full["floor_ms"]
    assert ours["ratio"] == pytest.approx(ours["median_ms"] / ours["floor_ms"], abs=1e-4)
    assert ours["floor_alone_ms"] != ours["floor_ms"] and "floor_alone_ms" not in full


def test_a_paired_floor_is_timed_in_turn_unless_a_layer_is_profiled(tmp_path, monkeypatch):
    order: list[str] = []
    for name in ("step", "frozen"):
        old = getattr(Trainer, name)
        monkeypatch.setattr(
            Trainer, name, lambda self, old=old, name=name: (order.append(name), old(self))[1]
        )
    flags = "--methods", "losia-pro,losia-pro+profile", "--modes", "eager", "--pair"
    _, record = bench(tmp_path, *flags, "--steps", "6", "--warmup", "2")
    _, ours, profiled, _ = record["rows"]
    assert (ours["steps"], profiled["steps"]) == (6, 6)
    alone, turns = ["step"] * (2 + 6), ["step"] * 4 + ["frozen"] * 4 + ["step"] * 2 + ["frozen"] * 2
    ahead = ["step"] * 2 + ["frozen"] * 2
    assert order == [*alone, *alone, *ahead, *turns, *alone, *alone, *alone]


def test_a_frozen_step_between_two_others_changes_nothing():
    with_it, without = trainer("losia-pro"), trainer("losia-pro")
    assert with_it.step() == without.step()
    with_it.frozen()
    assert all(p.grad is None and p.requires_grad for p in with_it.prepared.parameters)
    assert [with_it.step() for _ in range(2)] == [without.step() for _ in range(2)]


def test_the_floor_backpropagates_to_its_inputs_and_trains_nothing():
    floor = trainer("floor")
    seen = []
    embeddings = floor.prepared.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda m, i, output: seen.append(output))
    before = {n: p.clone() for n, p in floor.prepared.model.named_parameters()}
    time_steps(floor, 2, 1, CPU)
    assert all(output.grad is not None and output.grad.any() for output in seen)
    for name, p in floor.prepared.model.named_parameters():
        assert not p.requires_grad and p.grad is None and torch.equal(p, before[name])


@pytest.mark.parametrize("method", ["losia-pro", "lora-r4", "full"])
def test_every_method_backpropagates_to_the_first_layers_inputs(method):
    tuned = trainer(method)
    seen = []
    hook = lambda m, i, output: seen.append(output.requires_grad)  # noqa: E731
    tuned.prepared.model.get_input_embeddings().register_forward_hook(hook)
    tuned.step()
    assert seen == [True]


def test_losia_methods_have_the_settings_of_their_names():
    def config(name: str) -> losia_pro.LosiaConfig:
        losia = methods.parse(name)(build()).losia
        assert losia is not None
        return losia.config

    plain = config("losia-pro")
    assert plain == losia_pro.LosiaConfig(rank_factor=1 / 8, base_decay=0.0)
    assert config("losia-pro-default") == losia_pro.LosiaConfig()
    assert config("losia-pro+profile").period == methods.FOREVER
    assert config("losia-pro-g8").neuron_group == 8
    rect = config("losia-pro-rect")
    assert (rect.in_factor, rect.out_factor) == (1 / 64, 1.0)
    wide = config("losia-pro-1/8x1-bf16")
    assert (wide.in_factor, wide.out_factor, wide.subnet_dtype) == (1 / 8, 1, "bfloat16")
    assert config("losia-pro-torch").impl == "torch"
    assert config("losia-pro-bf16").subnet_dtype == "bfloat16"
    several = config("losia-pro-g8-rank_factor=1/4-rewarm=false-beta1=0.5")
    assert (several.neuron_group, several.rank_factor) == (8, 0.25)
    assert (several.rewarm, several.beta1) == (False, 0.5)


@pytest.mark.parametrize(
    ("method", "dtype", "dropout", "dora"),
    [
        ("lora-r4", torch.bfloat16, 0.0, False),
        ("lora-peft-r4", torch.float32, 0.05, False),
        ("dora-r4", torch.float32, 0.05, True),
    ],
)
def test_peers_are_what_their_names_say(method, dtype, dropout, dora):
    prepared = methods.parse(method)(build())
    config = prepared.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, dropout)
    assert config.use_dora is dora and prepared.autocast is (method != "lora-r4")
    matrices = [p for p in prepared.parameters if p.dim() == 2]
    assert len(matrices) == 2 * 7 * 2 and {p.dtype for p in matrices} == {dtype}
    adapted = {n.split(".lora_A")[0] for n, _ in prepared.model.named_parameters() if "lora_A" in n}
    layers = prepared.model.base_model.model.model.layers
    linears = [n for n, m in layers.named_modules() if n.endswith("_proj") and hasattr(m, "weight")]
    assert len(adapted) == len(linears) == 14


def test_peers_compute_in_bf16_under_autocast():
    lora = trainer("lora-peft-r4")
    seen = []
    for name, module in lora.prepared.model.named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    lora.step()
    assert seen and set(seen) == {torch.bfloat16}


def test_an_impossible_setting_is_skipped_with_its_reason(tmp_path):
    flags = "--methods", "losia-pro-beta1=2,losia-pro-no_field=1", "--modes", "eager"
    code, record = bench(tmp_path, *flags)
    assert code == 0
    beta, field = record["rows"][1:3]
    assert beta["status"] == "skipped" and "beta1 must be in [0, 1)" in beta["reason"]
    assert field["status"] == "skipped" and "no_field" in field["reason"]


def test_a_step_that_trains_nothing_fails_the_run(tmp_path, capsys):
    code, record = bench(tmp_path, "--methods", "losia-pro", "--modes", "eager", "--lr", "1e-30")
    assert code == 1
    row = record["rows"][1]
    assert row["status"] == "failed" and "did not change" in row["reason"]
    assert "median_ms" not in row and "WRONG: eager, losia-pro" in capsys.readouterr().out


def test_a_subnet_that_is_not_written_back_fails(monkeypatch):
    monkeypatch.setattr(losia_pro.Losia, "write_back", lambda self: None)
    with pytest.raises(AssertionError, match="not written into the weight"):
        time_steps(trainer("losia-pro"), 2, 1, CPU)


def test_a_profile_that_sees_no_gradient_fails(monkeypatch):
    monkeypatch.setattr(losia_pro.profile.Profile, "add", lambda self, dy, x: None)
    with pytest.raises(AssertionError, match="no importance"):
        time_steps(trainer("losia-pro+profile"), 2, 1, CPU)


def test_a_loss_that_is_not_finite_fails(monkeypatch):
    tuned = trainer("full")
    with torch.no_grad():
        tuned.prepared.parameters[0].fill_(torch.nan)
    with pytest.raises(AssertionError, match="the loss is not finite: .*nan"):
        time_steps(tuned, 2, 1, CPU)


def test_running_out_of_memory_is_recorded_and_the_rest_is_measured(tmp_path, monkeypatch):
    forward = Trainer.forward

    def limited(self):
        if self.prepared.losia is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self)

    monkeypatch.setattr(Trainer, "forward", limited)
    code, record = bench(tmp_path, "--methods", "losia-pro,full", "--modes", "eager")
    statuses = [row["status"] for row in record["rows"]]
    assert code == 0 and statuses == ["ok", "out of memory", "ok", "ok"]


def test_a_killed_run_keeps_what_it_measured(tmp_path, monkeypatch):
    attempt = step.runs.attempt

    def interrupted(measure, device):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(attempt(measure, device))
        return done[-1]

    done: list[dict] = []
    monkeypatch.setattr(step.runs, "attempt", interrupted)
    code, record = bench(tmp_path, "--methods", "losia-pro,full", "--modes", "eager")
    assert code == 130 and not record["complete"]
    assert [row["method"] for row in record["rows"]] == ["floor", "losia-pro"]


def test_a_budget_ends_the_run_before_what_would_not_fit(tmp_path):
    code, record = bench(
        tmp_path, "--methods", "losia-pro", "--modes", "eager", "--budget", "0.001"
    )
    assert code == 0 and record["rows"] == []
    assert "3 of 3 left" in record["stopped"] and not record["complete"]


def test_the_estimate_of_a_7b_step_is_near_the_half_second_that_one_takes():
    seconds = estimate.step_seconds("llama2-7b", 32, 4, 2048, "floor", "eager", rate=764e12)
    assert 0.4 < seconds < 0.65
    assert estimate.kind("lora-peft-r16") == "lora-peft" and estimate.kind("lora-r16") == "lora"
    assert estimate.kind("losia-pro+profile") == "losia-pro"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--methods", "losia"),
        ("--methods", "losia-pro-quick"),
        ("--methods", "losia-pro+fast"),
        ("--methods", "lora-r0"),
        ("--modes", "fast"),
        ("--layers", "1"),
        ("--layers", "3"),
    ],
)
def test_names_and_sizes_that_do_not_exist_are_refused(flag, value, capsys):
    assert main(["bench", "step", "--device", "cpu", flag, value]) == 2
    assert f"{flag} {value}" in capsys.readouterr().err


def test_every_default_method_is_one(monkeypatch):
    for name in methods.DEFAULT:
        methods.parse(name)
    with pytest.raises(CliError):
        methods.parse("losia-prog8")


def test_a_missing_peft_is_a_reason_to_skip(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(methods.Skip, match="needs the package peft"):
        methods.parse("lora-r4")(build())


def test_a_selection_that_a_model_is_too_small_for_is_skipped():
    with pytest.raises(methods.Skip, match="too small to slice"):
        methods.parse("losia-pro-rect-g16")(build())
