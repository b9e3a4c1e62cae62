"""``losia-pro finetune`` and ``merge`` on models whose layers are not all ``nn.Linear``."""

from __future__ import annotations

import json

import pytest
import torch
import toys
import transformers
from cli_tools import InterruptAt, finetune, make_data, make_tokenizer, record
from safetensors.torch import load_file

import losia_pro
from losia_pro.cli import main
from losia_pro.discover import find_targets

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": None,
}  # fmt: skip
MODELS = {
    "GPT2": ({}, {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"}),
    "Mixtral": (
        {"num_key_value_heads": 2, "num_local_experts": 3},
        {"model.layers.0.mlp.experts.gate_up_proj.0", "model.layers.1.mlp.experts.down_proj.2"},
    ),
}
FLAGS = ("--steps", 6, "--batch-size", 4, "--period", 2, "--rank-factor", 0.25, "--compare", "lora")


def make_base(name, folder):
    tokenizer = make_tokenizer()
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **SIZES, **MODELS[name][0],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("error:.*fan_in_fan_out")
@pytest.mark.parametrize("name", MODELS)
def test_tuning_comparing_and_merging(name, tmp_path, capsys):
    base, expected = make_base(name, tmp_path / "base"), MODELS[name][1]
    run, data = tmp_path / "run", make_data(tmp_path / "data")
    assert finetune("--model", base, "--data", data, *FLAGS, "--output", run) == 0
    results = record(run)["results"]
    assert {"losia-pro", "lora"} <= results.keys()
    header, _ = losia_pro.delta.read(run / "delta.safetensors")
    assert expected <= json.loads(header["modules"]).keys()

    out = tmp_path / "merged"
    assert main(["merge", str(base), str(run / "delta.safetensors"), str(out)]) == 0
    merged = load_file(run / "merged" / "model.safetensors")
    toys.equal_bits(load_file(out / "model.safetensors"), merged)
    stored = load_file(base / "model.safetensors")
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in stored.items()}
    assert main(["inspect", str(run / "delta.safetensors")]) == 0
    assert min(expected) in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    linears = find_targets(model, losia_pro.LosiaConfig()).linears.values()
    expected_lora = sum(m.in_features + m.out_features for m in linears)  # of rank 1
    assert results["lora"]["trainable"] == expected_lora


@pytest.mark.parametrize("method", ["losia-pro", "full", "lora"])
def test_a_mixture_goes_on_after_a_stop_as_if_it_had_not_stopped(method, tmp_path, monkeypatch):
    """transformers has other names for its experts in files than in the model."""
    base, data = make_base("Mixtral", tmp_path / "base"), make_data(tmp_path / "data")
    flags = ("--model", base, "--data", data, *FLAGS[:-2], "--method", method, "--eval-steps", 1)
    assert finetune(*flags, "--output", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        InterruptAt(patch, 4)
        assert finetune(*flags, "--output", tmp_path / "run") == 130
    assert finetune("--resume", tmp_path / "run") == 0
    whole, run = (
        load_file(tmp_path / n / "merged" / "model.safetensors") for n in ("whole", "run")
    )
    toys.equal_bits(run, whole)
    assert run.keys() == load_file(base / "model.safetensors").keys()
