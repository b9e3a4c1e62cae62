"""losia_pro.peft: its config checks as the core's does, and what PEFT cannot do with it is said."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners import tuners_utils
from safetensors.torch import load_file, save_file
from test_peft import IDS, SETTINGS, adapted, logits, step
from test_trainer import CONFIG, arguments, dataset, tiny_llama
from transformers import Trainer

import losia_pro
from losia_pro.integrations import peft as ours
from losia_pro.integrations.transformers import LosiaCallback
from losia_pro.peft import LosiaConfig


def test_the_config_has_every_setting_and_its_checks():
    ours = {f.name: f.default for f in dataclasses.fields(losia_pro.LosiaConfig)}
    theirs = {f.name: f.default for f in dataclasses.fields(LosiaConfig)}
    assert ours.items() <= theirs.items()
    assert LosiaConfig(period=7, target_modules=["q_proj"]).settings() == losia_pro.LosiaConfig(
        period=7, target_modules=["q_proj"]
    )
    assert LosiaConfig(**SETTINGS).settings() == CONFIG
    with pytest.raises(ValueError, match="period must be a whole number"):
        LosiaConfig(period=0)


def refused(match):
    return pytest.raises(ValueError, match=match)


def test_what_cannot_be_is_refused(tmp_path):
    base, model, _ = adapted(steps=2)
    model.save_pretrained(tmp_path)
    tuned = logits(model)
    with refused("made from other weights.*load the base model that was fine-tuned"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path)
    with refused("torch.float32 values.*load it with dtype=torch.float32"):
        PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path)
    with refused("low_cpu_mem_usage=True"):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    with refused("Please use `get_peft_model` instead"):
        inject_adapter_in_model(LosiaConfig(), base)
    assert torch.equal(logits(base), logits(tiny_llama()))
    with refused("takes one LoSiA adapter.*'default'"):
        model.add_adapter("other", LosiaConfig())
    with refused("unload"):
        model.delete_adapter("default")
    with refused("adapter_names.*disable_adapter"):
        model.eval()(input_ids=IDS, adapter_names=["__base__"] * len(IDS))
    with refused("attached already"):
        get_peft_model(model.get_base_model(), LosiaConfig())
    with refused("not compatible"):
        get_peft_model(base, LosiaConfig(), mixed=True)
    assert torch.equal(logits(model), tuned) and list(model.peft_config) == ["default"]
    callback = LosiaCallback()
    with refused("the model is not attached"):
        Trainer(base, arguments(tmp_path), train_dataset=dataset(), callbacks=[callback]).train()
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with refused("the model is not attached"):
        Trainer(lora, arguments(tmp_path), train_dataset=dataset(), callbacks=[callback]).train()


def test_weights_that_were_loaded_over_the_base_are_not_saved_as_an_adapter(tmp_path):
    _, model, _ = adapted(steps=2)
    model.get_base_model().model.layers[0].mlp.up_proj.weight.data += 1
    with pytest.raises(RuntimeError, match="loaded or changed after attach"):
        model.save_pretrained(tmp_path)


def test_a_malformed_adapter_is_refused_and_changes_nothing(tmp_path):
    _, model, optimizer = adapted(steps=2)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    step(model, optimizer)
    tuned = logits(model)
    for key, wrong in (
        ("base_model.model.model.layers.0.mlp.up_proj.values.0", None),
        ("base_model.model.model.layers.0.mlp.up_proj.in_idx.0", "reversed"),
        ("base_model.model.model.layers.0.mlp.up_proj.extra", torch.zeros(1)),
        ("losia_base", None),
    ):
        tensors = dict(good)
        if wrong is None:
            del tensors[key]
        else:
            tensors[key] = tensors[key].flip(0) if isinstance(wrong, str) else wrong
        save_file(tensors, path)
        with refused("malformed delta|base nothing"):
            model.load_adapter(tmp_path, "default")
        assert torch.equal(logits(model), tuned), key


def test_an_older_peft_is_told_what_it_lacks(monkeypatch):
    monkeypatch.delattr(tuners_utils.BaseTuner, "_get_adapter_state_dict")
    with pytest.raises(ImportError, match="needs PEFT 0.21 or later.*attach works without PEFT"):
        importlib.reload(ours)


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'pefts'"):
        losia_pro.pefts  # noqa: B018
