"""The examples for PEFT and TRL run as printed, and do what they say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = EXAMPLES / "tiny-llama"


def run(name: str, folder: Path, monkeypatch, capsys) -> str:
    """What it prints, from the command that its first line gives, in a folder of its own."""
    command = re.search(r"``python examples/(\w+\.py)``", (EXAMPLES / name).read_text())
    monkeypatch.chdir(folder)
    runpy.run_path(str(EXAMPLES / command[1]), run_name="__main__")
    return capsys.readouterr().out


def test_the_peft_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    out = run("train_peft.py", tmp_path, monkeypatch, capsys)
    before, after = map(float, re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", out).groups())
    assert after < before - 1
    adapter = tmp_path / "runs" / "peft" / "adapter_model.safetensors"
    assert round(adapter.stat().st_size / 1e6, 1) == 0.3
    assert round((MODEL / "model.safetensors").stat().st_size / 1e6) == 11
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "peft" / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), adapter.parent)
    ids = torch.arange(20)[None]
    assert torch.equal(merged(ids).logits, adapted(ids).logits)


def test_the_dpo_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    out = run("train_dpo.py", tmp_path, monkeypatch, capsys)
    margins = [float(m) for m in re.findall(r"margin (-?[\d.]+)", out)]
    assert len(margins) == 4 and margins[-1] == max(margins) > 1
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)  # as TRL loads it
    PeftModel.from_pretrained(base, tmp_path / "runs" / "dpo")
