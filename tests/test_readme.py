"""README.md and CONTRIBUTING.md: code runs as printed, figures are the recorded ones, what is named is there."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from cli_tools import PAIRS, make_data, make_model, make_tokenizer
from safetensors.torch import load_file

import losia_pro

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING = (ROOT / name for name in ("README.md", "CONTRIBUTING.md"))
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
PYTHON = [block for language, block in BLOCKS if language == "python"]
SHELL = "\n".join(block for language, block in BLOCKS if not language)
COMMANDS = re.findall(r"^losia-pro .*", SHELL, re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a tiny model under the name that the README uses."""
    make_model(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examples() -> list[dict[str, torch.Tensor]]:
    tokenizer = make_tokenizer()
    ids = [tokenizer(p["prompt"] + p["response"], return_tensors="pt").input_ids[0] for p in PAIRS]
    return [{"input_ids": i, "labels": i} for i in ids[:16]]


def test_the_ordinary_loop_runs_as_printed(folder):
    batches = [{k: v[None] for k, v in e.items()} for e in examples()]
    names = {"batches": batches}
    exec(PYTHON[0], names)
    assert names["losia"].step == len(batches)  # the optimizer was bound
    assert 9 <= len([line for line in PYTHON[0].splitlines() if line]) <= 14
    assert_tuned(folder, 3 / 32)
    base = names["AutoModelForCausalLM"].from_pretrained("my-model")
    losia_pro.load_delta(base, "delta.safetensors")
    tuned = load_file("tuned/model.safetensors")
    assert all(torch.equal(base.state_dict()[name], tuned[name]) for name in tuned)


def test_the_trainer_runs_as_printed(folder):
    from transformers import AutoModelForCausalLM, TrainingArguments

    names = {
        "losia_pro": losia_pro,
        "model": AutoModelForCausalLM.from_pretrained("my-model"),
        "arguments": TrainingArguments(
            "out", max_steps=4, per_device_train_batch_size=1, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no",
        ),
        "dataset": examples(),
    }  # fmt: skip
    exec(PYTHON[1], names)
    assert len(names["losia"].modules) == 2 * 7 and names["losia"].step == 4
    assert_tuned(folder, 3 / 32)


def test_peft_runs_as_printed(folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from losia_pro.integrations.transformers import LosiaCallback

    names = {
        "losia_pro": losia_pro,
        "model": AutoModelForCausalLM.from_pretrained("my-model"),
        "Trainer": Trainer,
        "LosiaCallback": LosiaCallback,
        "arguments": TrainingArguments(
            "out", max_steps=4, per_device_train_batch_size=1, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no",
        ),
        "dataset": examples(),
    }  # fmt: skip
    exec(PYTHON[2], names)
    base = AutoModelForCausalLM.from_pretrained("my-model")
    PeftModel.from_pretrained(base, "adapter").merge_and_unload().save_pretrained("tuned")
    assert_tuned(folder, 3 / 32)


def assert_tuned(folder: Path, share: float) -> None:
    """Some entries of every linear in the blocks have changed, at most this share of it; nothing else."""
    before, after = (load_file(folder / n / "model.safetensors") for n in ("my-model", "tuned"))
    assert before.keys() == after.keys()
    for name in before:
        changed = (before[name] != after[name]).float().mean()
        assert (0 < changed <= share) if "proj" in name else changed == 0, name


def test_every_python_block_is_run_by_a_test():
    assert len(PYTHON) == 3


def test_the_printed_commands_and_flags_exist(folder, capsys):
    from losia_pro.cli import main

    shown = {}
    for command in {line.split()[1] for line in COMMANDS}:
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
        shown[command] = capsys.readouterr().out
    names = {"finetune", "recipes", "evaluate", "merge", "inspect", "doctor", "bench", "tune"}
    assert set(shown) == names
    flags = shown["finetune"] + shown["evaluate"]
    others = {"--help", "--nproc_per_node"}  # the second is torchrun's
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README.read_text())) - others:
        assert f"{flag} " in flags or f"{flag}\n" in flags, flag


def test_the_first_command_runs_as_printed(folder, monkeypatch):
    import shlex

    from losia_pro.cli import main

    make_data(folder / "d")
    (folder / "d" / "train.jsonl").rename(folder / "my.jsonl")
    command = next(line for line in COMMANDS if "my.jsonl" in line)
    argv = shlex.split(command.replace("DIR_OR_HUB_ID", "my-model"))[1:]
    assert main([*argv, "--epochs", "1"]) == 0
    record = json.loads((folder / "runs" / "my-losia-pro" / "run.json").read_text())
    assert list(record["results"]) == ["losia-pro", "lora", "full"]


def test_the_recipes_commands_run_as_printed_but_for_the_downloads(folder, monkeypatch, capsys):
    import shlex

    import datasets
    import lm_eval

    from losia_pro.cli import evaluate, main

    tune, show, judge = (
        line for c in ("--recipe", "recipes ", "evaluate") for line in COMMANDS if c in line
    )
    asked = []

    def rows(name, subset, split):
        asked.append((name, subset, split))
        return [{"query": p["prompt"], "response": p["response"]} for p in PAIRS]

    def offline(tasks, **arguments):
        asked.append(tasks)
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    monkeypatch.setattr(lm_eval, "simple_evaluate", offline)
    monkeypatch.setattr(
        evaluate, "_check_tasks", lambda wanted, known: None
    )  # tests/test_cli_recipes.py does
    argv = shlex.split(tune.replace("DIR_OR_HUB_ID", "my-model"), comments=True)[1:]
    assert main([*argv, "--steps", "1", "--batch-size", "2", "--max-length", "64"]) == 0
    assert (
        shlex.join(shlex.split(judge, comments=True)) in capsys.readouterr().out
    )  # finetune says it too
    assert main(shlex.split(show, comments=True)[1:]) == 0
    assert main(shlex.split(judge, comments=True)[1:]) == 2
    assert "no network" in capsys.readouterr().err
    assert asked == [("meta-math/MetaMathQA", None, "train"), ["gsm8k"]]


def mean(record: dict, method: str, key: str) -> float:
    return statistics.fmean(run["results"][method][key] for run in record["runs"])


def test_the_measured_table_is_the_recorded_one():
    record = json.loads((ROOT / "benchmarks" / "results" / "example.json").read_text())
    base = record["base"]
    gain = base["loss"] - mean(record, "full", "loss")
    rows = [f"| the base model | | {base['loss']:.3f} | | {base['exact']:.1%} |"]
    for method in ("losia-pro", "lora", "full"):
        loss, exact = (mean(record, method, key) for key in ("loss", "exact"))
        trainable = record["runs"][0]["results"][method]["trainable"]
        share = (base["loss"] - loss) / gain
        rows.append(f"| {method} | {trainable:,} | {loss:.3f} | {share:.1%} | {exact:.1%} |")
    text = README.read_text()
    assert "\n".join(rows) in text, "\n".join(rows)
    assert len(record["runs"]) == 3 and "Mean over three seeds" in text
    assert f"{record['steps']} steps of {record['settings']['batch_size']} examples" in text


def test_the_example_reaches_most_of_full_fine_tunings_improvement():
    record = json.loads((ROOT / "benchmarks" / "results" / "example.json").read_text())
    for run in record["runs"]:
        pro, full = (run["results"][m]["loss"] for m in ("losia-pro", "full"))
        assert record["base"]["loss"] - pro >= 0.6 * (record["base"]["loss"] - full)


@pytest.mark.parametrize("document", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_what_the_documents_name_is_there(document):
    text = document.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    paths = re.findall(
        r"`((?:losia_pro|kernels|csrc|tests|benchmarks|examples|docs|\.ci)/[\w./-]*)`", text
    )
    assert paths
    for name in [p for p in links if "://" not in p] + paths:
        assert (ROOT / name).exists(), name
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for name in re.findall(r"`losia_pro\.([\w.]+)`", text):
        value = losia_pro
        for part in name.split("."):
            value = value if part == "kernels" else getattr(value, part)
