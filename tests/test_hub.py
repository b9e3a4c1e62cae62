"""What save_pretrained writes and push_to_hub sends: a plain model's files, or a small adapter."""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace

import pytest
import toys
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import get_peft_model
from safetensors import safe_open
from test_trainer import CONFIG, tiny_llama
from transformers import LlamaForCausalLM

import losia_pro
from losia_pro.peft import LosiaConfig


def tuned():
    """An attached model that was changed, and its weights by name."""
    model = tiny_llama().bfloat16()
    losia = losia_pro.attach(model, CONFIG)
    for p in losia.parameters():
        p.data.add_(1)
    losia.write_back()
    names = dict(tiny_llama().named_parameters())
    return model, losia, {n: w.detach().clone() for n, w in model.named_parameters() if n in names}


@pytest.fixture
def sent(monkeypatch):
    """The files that would go to the Hub."""
    files: dict[str, bytes] = {}

    def create_commit(self, operations, **kwargs):
        for o in operations:
            with o.as_file() as f:
                files[o.path_in_repo] = f.read()
        return SimpleNamespace(commit_url="")

    def load(cls, path, *args, **kwargs):
        if not os.path.exists(path):
            raise LocalEntryNotFoundError("the Hub has no card yet")
        return read(path, *args, **kwargs)

    read = ModelCard.load
    monkeypatch.setattr(ModelCard, "load", classmethod(load))
    repo = SimpleNamespace(repo_id="me/it")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return files


@pytest.mark.parametrize("attached", [True, False])
def test_a_model_is_saved_and_sent_as_a_plain_one(tmp_path, sent, attached):
    model, losia, weights = tuned()
    if not attached:
        losia.detach()
    tiny_llama().bfloat16().save_pretrained(tmp_path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "tuned")
        model.push_to_hub("me/it")
    names = {p.name for p in (tmp_path / "plain").iterdir()}
    assert {p.name for p in (tmp_path / "tuned").iterdir()} == names <= sent.keys()
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "tuned" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert sent["model.safetensors"] == (tmp_path / "tuned" / "model.safetensors").read_bytes()
    with (
        safe_open(tmp_path / "plain" / "model.safetensors", "pt") as plain,
        safe_open(tmp_path / "tuned" / "model.safetensors", "pt") as ours,
    ):
        assert set(plain.keys()) == set(ours.keys()) and plain.metadata() == ours.metadata()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "tuned")
    toys.equal_bits({n: w.detach() for n, w in loaded.named_parameters()}, weights)


def test_what_changed_is_saved_with_a_card_and_sent_as_an_adapter(tmp_path, sent):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        LosiaConfig(rank_factor=1 / 8, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "saved")
    model.push_to_hub("me/it")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "library_name: peft" in card and f"base_model: {tmp_path / 'base'}" in card
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert sent[name] == (tmp_path / "saved" / name).read_bytes()
    base = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert len(sent["adapter_model.safetensors"]) < base / 5  # a header of names is most of it
