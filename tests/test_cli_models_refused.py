"""Models that the command line cannot read, or should not train: one sentence, and an earlier run is left as it is."""

from __future__ import annotations

import json

import pytest
import transformers
from cli_tools import finetune, make_data, make_model, make_tokenizer

from losia_pro.cli import main


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20_000])


def change(**settings):
    def do(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))

    return do


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def fewer_tokens(folder):
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=100, num_attention_heads=2, **settings)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def encoder(folder):
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    size = len(make_tokenizer())
    config = transformers.BertConfig(vocab_size=size, num_attention_heads=2, **settings)
    transformers.BertForMaskedLM(config).save_pretrained(folder)


MODELS = {
    "truncated weights": (truncate, "incomplete metadata"),
    "weights of other shapes": (change(intermediate_size=256), "mismatched"),
    "a config of a wrong type": (change(hidden_size="64"), "field 'hidden_size': TypeError"),
    "a config that contradicts itself": (change(num_attention_heads=3), "not a multiple"),
    "an unknown dtype": (change(dtype="float7"), "float7"),
    "no tokenizer": (without_tokenizer, "no tokenizer that can be read"),
    "a tokenizer with more tokens": (fewer_tokens, "and the model knows 100 tokens; use the"),
    "an encoder": (encoder, "is an encoder, which sees the tokens that it is to predict"),
}


def sentence(capsys):
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_will_not_do_is_named_and_nothing_is_written(name, tmp_path, capsys):
    spoil, why = MODELS[name]
    model, run = make_model(tmp_path / "model"), tmp_path / "run"
    flags = ("--data", make_data(tmp_path / "data"), "--steps", 1, "--output", run)
    spoil(model)
    assert finetune("--model", model, *flags) == 2
    message = sentence(capsys)
    assert f"--model {model}: " in message and why in message
    assert not run.exists()
    run.mkdir()
    (run / "run.json").write_text('{"status": "complete"}')
    assert finetune("--model", model, *flags, "--overwrite") == 2
    assert (run / "run.json").read_text() == '{"status": "complete"}'


@pytest.mark.parametrize("name", list(MODELS)[:5])
def test_merge_names_a_base_that_cannot_be_read(name, tmp_path, capsys):
    spoil, why = MODELS[name]
    model, run = make_model(tmp_path / "model"), tmp_path / "run"
    flags = ("--model", model, "--data", make_data(tmp_path / "data"))
    assert finetune(*flags, "--steps", 1, "--output", run) == 0
    spoil(model)
    out = tmp_path / "out"
    assert main(["merge", str(model), str(run / "delta.safetensors"), str(out)]) == 2
    message = sentence(capsys)
    assert f"BASE {model}: " in message and why in message
    assert not out.exists()


def test_a_decoder_of_an_encoders_kind_is_trained(tmp_path):
    model, run = make_model(tmp_path / "model"), tmp_path / "run"
    encoder(model)
    change(is_decoder=True)(model)
    flags = ("--model", model, "--data", make_data(tmp_path / "data"))
    assert finetune(*flags, "--steps", 1, "--output", run) == 0
