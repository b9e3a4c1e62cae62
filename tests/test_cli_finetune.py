"""``losia-pro finetune`` from end to end on a tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from cli_tools import PAIRS, InterruptAt, finetune, record, write_lines
from safetensors.torch import load_file

import losia_pro

FLAGS = ("--steps", 12, "--batch-size", 4, "--period", 3, "--rank-factor", 0.25, "--eval-steps", 4)
LR = ("--lr", "1e-2")


@pytest.fixture(scope="module")
def tuned_run(base, tmp_path_factory):
    """All methods; the tuned models' logits are kept as the run had them in memory."""
    from losia_pro.cli import finetune as module

    output, logits = tmp_path_factory.mktemp("out") / "run", []

    def plain(tuned, job):
        model = original(tuned, job)
        with torch.no_grad():
            logits.append(model.eval()(torch.arange(3, 43)[None]).logits)
        return model

    original = module._plain
    module._plain = plain
    try:
        code = finetune(*base, *FLAGS, *LR, "--compare", "lora,full,losia", "--output", output)
    finally:
        module._plain = original
    assert code == 0
    return output, logits


def test_a_run_leaves_exactly_its_files(tuned_run):
    names = {p.name for p in tuned_run[0].iterdir()}
    assert names == {"run.json", "loss.png", "subnets.png", "delta.safetensors", "merged"}
    for picture in ("loss.png", "subnets.png"):
        assert (tuned_run[0] / picture).read_bytes().startswith(b"\x89PNG")


def test_the_record_tells_the_whole_run(tuned_run, base):
    r = record(tuned_run[0])
    assert r["status"] == "complete"
    assert list(r["results"]) == ["losia-pro", "lora", "full", "losia"]
    assert r["arguments"]["model"] == str(base[1]) and r["arguments"]["period"] == 3
    assert r["versions"]["torch"] == torch.__version__ and r["device"]["type"] == "cpu"
    assert r["examples"] == {"train": 60, "held_out": 12, "cut": 0, "dropped": 0}
    for name, result in r["results"].items():
        assert result["loss"] < r["base"]["loss"], name
        assert [p["step"] for p in result["train"]] == list(range(1, 13))
        assert [p["step"] for p in result["held_out"]] == [4, 8, 12]
        assert result["seconds"] > 0 and result["peak_bytes"] > 1e6
        assert 0 <= result["exact"] <= 1
    model = losia_pro_parameters(base[1])
    assert r["results"]["full"]["trainable"] == model
    assert {m["step"] for m in r["reselections"]} == {3, 6, 9, 12}
    assert r["groups"] == ["model.layers.0", "model.layers.1"]


def losia_pro_parameters(folder) -> int:
    from transformers import AutoModelForCausalLM

    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_dense_losia_learns_what_losia_pro_learns(tuned_run):
    pro, dense = (record(tuned_run[0])["results"][m] for m in ("losia-pro", "losia"))
    assert dense["trainable"] == pro["trainable"]
    assert dense["loss"] == pytest.approx(pro["loss"], rel=1e-4)


def test_the_merged_model_gives_the_tuned_logits_in_a_fresh_process_without_losia_pro(
    tuned_run, tmp_path
):
    output, logits = tuned_run
    script = (
        "import sys, torch; sys.modules['losia_pro'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear\n"
        "with torch.no_grad(): logits = model(torch.arange(3, 43)[None]).logits\n"
        "torch.save(logits, sys.argv[2])\n"
    )
    path = tmp_path / "logits.pt"
    command = [sys.executable, "-c", script, str(output / "merged"), str(path)]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert torch.equal(torch.load(path), logits[0])


def test_the_merged_models_settings_are_the_base_models(tuned_run, base):
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (base[1], tuned_run[0] / "merged")
    )
    assert {k for k in before if before[k] != after.get(k)} <= {"dtype"}
    assert after["dtype"] == "float32" and after["use_cache"] is True


def test_the_delta_turns_the_base_into_the_merged_model(tuned_run, base):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base[1], dtype=torch.float32)
    losia_pro.load_delta(model, tuned_run[0] / "delta.safetensors")
    merged = load_file(tuned_run[0] / "merged" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], merged[name]) for name in merged)


def test_the_final_table_names_every_method(base, tmp_path, capsys):
    assert finetune(*base, *FLAGS, *LR, "--compare", "full", "--output", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    r = record(tmp_path / "run")
    row = next(line for line in out.splitlines() if line.strip().startswith("losia-pro  "))
    for result in r["results"].values():
        assert f"{r['base']['loss']:.4f} → {result['loss']:.4f}" in out
    assert "Of full fine-tuning's improvement: losia-pro" in out and "exact match" in out and row
    end = out[out.index("Results on") :].split("\n")
    assert all(len(line.rstrip()) <= 80 for line in end if str(tmp_path) not in line)
    assert {line.split()[0] for line in end[-6:-1]} == {
        "merged/", "delta.safetensors", "loss.png", "subnets.png", "run.json"
    }  # fmt: skip
    full = [line for line in out.splitlines() if line.startswith("full ")]
    assert full[-1].split() == ["full", "12/12", "held-out", f"{r['results']['full']['loss']:.3f}"]
    assert "warn" not in (out + err).lower() and err == ""


# Evaluations: 1 the base; 2, 3 steps 4 and 8; 4 the finished model; 5... the next method.
@pytest.mark.parametrize("at", [2, 5])
def test_ctrl_c_saves_and_the_resumed_run_is_the_uninterrupted_one(
    base, tmp_path, capsys, monkeypatch, at
):
    flags = (*base, *FLAGS, *LR, "--compare", "lora", "--init", "calibrate")
    assert finetune(*flags, "--output", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        InterruptAt(patch, at)
        assert finetune(*flags, "--output", tmp_path / "run") == 130
    out = capsys.readouterr().out
    assert f"losia-pro finetune --resume {tmp_path / 'run'}" in out
    assert record(tmp_path / "run")["status"] == "running"
    assert list((tmp_path / "run" / "checkpoints").glob("*/checkpoint-5"))

    # A tied weight is in a checkpoint once: Trainer must not be made to warn of its other name.
    missing = []
    monkeypatch.setattr(
        transformers.Trainer,
        "_issue_warnings_after_load",
        lambda _, load_result: missing.extend(load_result.missing_keys),
    )
    assert finetune("--resume", tmp_path / "run") == 0
    whole, resumed = record(tmp_path / "whole"), record(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert missing == []
    assert resumed["reselections"] == whole["reselections"] and resumed["base"] == whole["base"]
    for method, result in whole["results"].items():
        for key in ("loss", "exact", "train", "held_out"):
            assert resumed["results"][method][key] == result[key], (method, key)
    for name in ("delta.safetensors", "merged/model.safetensors"):
        a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "run" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_last_step_before_a_stop_is_evaluated_once(base, tmp_path, monkeypatch, capsys):
    InterruptAt(monkeypatch, 2)
    assert finetune(*base, *FLAGS, "--eval-steps", 1, "--output", tmp_path / "run") == 130
    lines = [line for line in capsys.readouterr().out.splitlines() if "/12" in line]
    assert [line.split()[1] for line in lines] == ["1/12", "2/12"]


def test_a_second_ctrl_c_stops_at_once_without_saving(base, tmp_path, monkeypatch, capsys):
    InterruptAt(monkeypatch, 2, times=2)
    assert finetune(*base, *FLAGS, "--output", tmp_path / "run") == 130
    assert "--resume" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("checkpoints/*/checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_training_says_that_nothing_was_written(base, tmp_path, monkeypatch, capsys):
    InterruptAt(monkeypatch, 1)
    assert finetune(*base, *FLAGS, "--output", tmp_path / "run") == 130
    assert "nothing was written" in capsys.readouterr().out


def test_resume_takes_the_runs_own_arguments_only(base, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        InterruptAt(patch, 2)
        finetune(*base, *FLAGS, *LR, "--output", tmp_path / "run")
    data = base[3] / "train.jsonl"
    capsys.readouterr()
    assert finetune("--output", tmp_path / "run", "--resume", "--steps", 20, *LR) == 2
    assert "--steps was 12, now 20" in capsys.readouterr().err
    text = data.read_text()
    try:
        data.write_text(text.replace("red", "rad"))
        assert finetune("--resume", tmp_path / "run") == 2
        assert "data has changed" in capsys.readouterr().err
    finally:
        data.write_text(text)
    flags = (*base, *FLAGS, *LR, "--output", tmp_path / "run", "--resume")
    assert finetune(*flags) == 0
    assert finetune(*flags) == 2
    assert "that run is complete" in capsys.readouterr().err


def test_lora_leaves_an_adapter_and_chat_has_no_exact_match(base, tmp_path, capsys):
    rows = [
        {
            "messages": [
                {"role": "user", "content": p["prompt"]},
                {"role": "assistant", "content": p["response"]},
            ]
        }
        for p in PAIRS[:20]
    ]
    data = write_lines(tmp_path / "chat.jsonl", rows)
    output = tmp_path / "run"
    flags = ("--method", "lora", "--epochs", 1, "--batch-size", 4, "--accumulation", 2)
    assert finetune("--model", base[1], "--data", data, *flags, "--output", output) == 0
    assert {p.name for p in output.iterdir()} == {"run.json", "loss.png", "adapter", "merged"}
    assert "exact match" not in capsys.readouterr().out
    r = record(output)
    assert r["steps"] == 3  # 19 examples, five batches of 4, two a step
    assert r["results"]["lora"]["exact"] is None
    assert "### assistant" in (output / "merged" / "chat_template.jinja").read_text()
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in adapter.values()) == r["results"]["lora"]["trainable"]


def test_neurons_are_chosen_in_groups_and_inputs_shared_if_asked_to(base, tmp_path):
    flags = ("--neuron-group", 4, "--share-inputs", "--period", "none")
    assert finetune(*base, *FLAGS, *flags, "--output", tmp_path / "run") == 0
    assert not (tmp_path / "run" / "subnets.png").exists()  # none moved
    delta = load_file(tmp_path / "run" / "delta.safetensors")
    indices = {name: t for name, t in delta.items() if "_idx." in name}
    assert len(indices) == 2 * 7 * 2  # of seven linears in two layers
    for name, idx in indices.items():
        runs = idx.view(-1, 4)
        assert torch.equal(runs, runs[:, :1] + torch.arange(4)) and not (runs[:, 0] % 4).any(), name
        if "q_proj.in_idx" in name:
            assert torch.equal(idx, delta[name.replace("q_proj", "k_proj")])
            assert torch.equal(idx, delta[name.replace("q_proj", "v_proj")])


def test_bf16_subnets_learn_as_fp32_ones_and_go_on_after_a_stop(
    base, tmp_path, monkeypatch, capsys
):
    """Rounded to nearest, most of what such a rate moves would be lost."""
    fp32 = (*base, *FLAGS, "--lr", "2e-4", "--precision", "bf16", "--output")
    flags = ("--subnet-dtype", "bfloat16", *fp32)
    assert finetune(*fp32, tmp_path / "fp32") == finetune(*flags, tmp_path / "whole") == 0
    whole, other = (record(tmp_path / name) for name in ("whole", "fp32"))
    gained = [r["base"]["loss"] - r["results"]["losia-pro"]["loss"] for r in (whole, other)]
    assert gained[0] == pytest.approx(gained[1], rel=0.05)
    with monkeypatch.context() as patch:
        InterruptAt(patch, 2)
        assert finetune(*flags, tmp_path / "run") == 130
    assert finetune("--resume", tmp_path / "run") == 0
    for name in ("delta.safetensors", "merged/model.safetensors"):
        a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "run" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert finetune(*base, *FLAGS, "--subnet-dtype", "bfloat16", "--output", tmp_path / "no") == 2
    assert "this run is in fp32; give --precision bf16" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["losia-pro", "full"])
def test_bf16_with_checkpointing_gives_a_bf16_model(base, tmp_path, method):
    flags = ("--method", method, "--precision", "bf16", "--checkpointing", "--steps", 3)
    assert finetune(*base, *flags, "--batch-size", 4, "--output", tmp_path / "run") == 0
    merged = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    assert record(tmp_path / "run")["results"][method]["loss"] > 0


def test_the_example_runs_without_arguments(base, tmp_path, monkeypatch, capsys):
    from losia_pro.cli import options

    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / options.JOB_MODEL).symlink_to(base[1])
    (tmp_path / "examples" / options.JOB_DATA).symlink_to(base[3])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(losia_pro, "__file__", str(tmp_path / "losia_pro" / "__init__.py"))
    small = {**options.JOB, "steps": 2, "batch_size": 2, "max_length": 32}
    monkeypatch.setattr(options, "JOB", small)
    assert finetune("--save-steps", "none") == 0 == finetune("--save-steps", "none")
    assert capsys.readouterr().out.startswith("No --model, no --data: the example.")
    for name in ("data-losia-pro", "data-losia-pro-2"):
        assert list(record(tmp_path / "runs" / name)["results"]) == ["losia-pro", "lora", "full"]
    monkeypatch.chdir(tmp_path / "runs")
    monkeypatch.setattr(losia_pro, "__file__", str(tmp_path / "runs" / "x" / "__init__.py"))
    assert finetune() == 2
