"""The examples for one process run as printed, and do what they say."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import toys
from peft import PeftModel
from torch._dynamo.utils import counters
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

from losia_pro import load_delta
from losia_pro.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = EXAMPLES / "tiny-llama"


def run(name: str, folder: Path, monkeypatch, capsys) -> str:
    """What it prints, from the last command that its docstring gives, in a folder of its own."""
    *_, command = re.findall(r"``python examples/(.*?)``", (EXAMPLES / name).read_text())
    argv = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / argv[0]), *argv[1:]])
    monkeypatch.chdir(folder)
    runpy.run_path(sys.argv[0], run_name="__main__")
    return capsys.readouterr().out


def saved_values(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_peft_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    out = run("train_peft.py", tmp_path, monkeypatch, capsys)
    before, after = map(float, re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", out).groups())
    assert after < before - 1
    adapter = tmp_path / "runs" / "peft" / "adapter_model.safetensors"
    assert round(adapter.stat().st_size / 1e6, 1) == 0.5
    assert round(2 * (MODEL / "model.safetensors").stat().st_size / 1e6) == 22  # stored in bf16
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "peft" / "merged")
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)  # as the example does
    adapted = PeftModel.from_pretrained(base, adapter.parent)
    ids = torch.arange(20)[None]
    assert torch.equal(merged(ids).logits, adapted(ids).logits)


def test_the_dpo_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    out = run("train_dpo.py", tmp_path, monkeypatch, capsys)
    margins = [float(m) for m in re.findall(r"margin (-?[\d.]+)", out)]
    assert len(margins) == 4 and margins[-1] == max(margins) > 1
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)  # as TRL loads it
    PeftModel.from_pretrained(base, tmp_path / "runs" / "dpo")


def test_the_sft_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    out = run("train_sft.py", tmp_path, monkeypatch, capsys)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", out)]
    assert re.findall(r"'losia_moved': '?(\d+)", out) == ["7"] * 4
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.5
    merged = saved_values(tmp_path / "runs" / "sft" / "merged")
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)  # as TRL loads it
    adapted = PeftModel.from_pretrained(base, tmp_path / "runs" / "sft")
    toys.equal_bits(adapted.merge_and_unload().state_dict(), merged)


def test_the_accelerate_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    """On one process; test_accelerate.py launches it on two."""
    out = run("train_accelerate.py", tmp_path, monkeypatch, capsys)
    found = re.findall(r"step (\d+) on 1 .*: loss ([\d.]+), (\d+) linears", out)
    steps, losses, moved = zip(*found, strict=True)
    assert steps == ("5", "10") and moved == ("7", "14")
    assert float(losses[-1]) < float(losses[0]) - 0.5
    folder = tmp_path / "runs" / "accelerate"
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)  # as the example does
    tuned = load_delta(base, folder / "delta.safetensors").state_dict()
    toys.equal_bits(saved_values(folder / "tuned"), tuned)


def test_the_trainer_example_runs_as_printed_and_goes_on_exactly(tmp_path, monkeypatch, capsys):
    out = run("train_trainer.py", tmp_path, monkeypatch, capsys)
    assert re.findall(r"'losia_moved': '?(\d+)", out) == ["7"] * 4
    for key in ("rewarm", "score_kept", "overlap", "lost_to_rounding"):
        assert len(re.findall(f"'losia_{key}'", out)) >= 4, key
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", out)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.5
    folder = tmp_path / "runs" / "trainer"
    whole = saved_values(folder / "tuned")
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)  # as the example does
    toys.equal_bits(load_delta(base, folder / "delta.safetensors").state_dict(), whole)
    (folder / "checkpoint-20" / "trainer_state.json").unlink()  # as if killed while it was saved
    shutil.rmtree(folder / "tuned")
    out = run("train_trainer.py", tmp_path, monkeypatch, capsys)
    assert [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", out)] == losses[2:]
    toys.equal_bits(saved_values(folder / "tuned"), whole)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_the_compiled_example_runs_as_printed(tmp_path, monkeypatch, capsys, fresh_compiler):
    """The number of graphs does not grow while each group is profiled and moved once."""
    out = run("train_compiled.py", tmp_path, monkeypatch, capsys)
    found = re.findall(r"loss ([\d.]+), (\d+) linears moved, (\d+) graphs", out)
    losses, moved, graphs = zip(*found, strict=True)
    assert moved == ("14", "35", "49") and graphs == ("3",) * 3
    assert float(losses[-1]) < float(losses[0]) - 0.5
    saved_values(tmp_path / "runs" / "compiled")


def test_the_models_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    out = run("train_models.py", tmp_path, monkeypatch, capsys)
    found = {name: (int(n), int(g), float(a), float(b)) for name, n, g, a, b in re.findall(
        r"(\w+): (\d+) subnets in (\d+) groups, loss ([\d.]+) -> ([\d.]+)", out
    )}  # fmt: skip
    # per block: attention and the experts' two maps; four Conv1D; attention and two maps, and the decoder's
    # attention to the encoder. And each model's head, in a group of its own.
    sizes = {
        "mixtral": (2 * (4 + 4 * 2) + 1, 3),
        "gpt2": (2 * 4 + 1, 3),
        "t5": (2 * 6 + 2 * 10 + 1, 5),
    }
    assert {name: numbers[:2] for name, numbers in found.items()} == sizes
    for name, (*_, before, after) in found.items():
        assert after < before - 1, name
        AutoModel.from_pretrained(tmp_path / "runs" / "models" / name)


def test_the_vision_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    out = run("train_vision.py", tmp_path, monkeypatch, capsys)
    upright, inverted, tuned = (float(share) for share in re.findall(r"([\d.]+)%", out))
    assert upright > 60 > 10 > inverted and tuned > 60
    AutoModelForImageClassification.from_pretrained(tmp_path / "runs" / "vision")


def test_the_deltas_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    out = run("switch_deltas.py", tmp_path, monkeypatch, capsys)
    losses = dict(re.findall(r"(\w+): held-out loss (.*)", out))
    assert len(out.splitlines()) == 5 and len(losses) == 3
    assert out.splitlines()[-1] == out.splitlines()[0]  # the base, before and after
    assert out.splitlines()[3] == out.splitlines()[1]
    of = {who: [float(x) for x in re.findall(r"[\d.]+", said)] for who, said in losses.items()}
    assert of["markdown"][0] < of["base"][0] - 0.5 and of["capitals"][1] < of["base"][1] - 0.4
    for k, other in ((0, "capitals"), (1, "markdown")):  # each has its own task alone
        assert abs(of[other][k] - of["base"][k]) < 0.1

    text = (EXAMPLES / "switch_deltas.py").read_text()
    inspect, merge = (shlex.split(c) for c in re.findall(r"^    losia-pro (.*)", text, re.M))
    assert main(inspect) == 0
    assert "42 modules" in capsys.readouterr().out
    assert main([str(EXAMPLES.parent / a) if a == "examples/tiny-llama" else a for a in merge]) == 0
    delta = tmp_path / "runs" / "deltas" / "markdown.safetensors"
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)  # as the example does
    tuned = load_delta(base, delta).state_dict()
    toys.equal_bits(saved_values(tmp_path / "runs" / "deltas" / "merged"), tuned)
