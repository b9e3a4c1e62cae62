"""Encoder-decoders, weights and whole layers that a model uses more than once."""

from __future__ import annotations

import copy

import pytest
import torch
import toys

import losia_pro
from losia_pro import LosiaConfig

transformers = pytest.importorskip("transformers")

LAYERS, VOCABULARY = 2, 64
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4, "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}  # fmt: skip
SELF = ["layer.0.SelfAttention." + x for x in "qkvo"]
CROSS = ["layer.1.EncDecAttention." + x for x in "qkvo"]
FEED = ["DenseReluDense.wi", "DenseReluDense.wo"]


def t5():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval()


def ids(seed):
    return torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(seed))


def loss_of(model, step=0):
    return model(input_ids=ids(step % 2), labels=ids(step % 2 + 2)).loss


def train(losia, steps):
    optimizer = torch.optim.AdamW(losia.parameters(), lr=1e-2)
    losia.bind(optimizer)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(losia.model, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_an_encoder_decoder_trains_in_both_and_loads_back(tmp_path):
    """Its head is the embedding of both."""
    model = t5()
    base = copy.deepcopy(model)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=1, output_factor=1 / 4))
    encoder = [SELF + ["layer.1." + x for x in FEED]] * LAYERS
    decoder = [SELF + CROSS + ["layer.2." + x for x in FEED]] * LAYERS
    assert losia.groups == [
        *[[f"encoder.block.{i}.{n}" for n in names] for i, names in enumerate(encoder)],
        *[[f"decoder.block.{i}.{n}" for n in names] for i, names in enumerate(decoder)],
        ["lm_head"],
    ]
    losses = train(losia, 2 * LAYERS + 2)
    assert losses[-1] < losses[0]
    assert [r.group for r in losia.history] == [
        *[i for i, group in enumerate(losia.groups) for _ in group], *[0] * len(losia.groups[0])
    ]  # fmt: skip
    for n, m in losia.modules.items():
        assert not torch.equal(m.weight, base.get_submodule(n).weight), n
    embedding = model.lm_head.weight
    assert all(part.embed_tokens.weight is embedding for part in (model.encoder, model.decoder))

    losia.save_delta(tmp_path / "delta")
    losia.detach().save_pretrained(tmp_path / "merged")
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "merged")
    toys.equal_bits(loaded.state_dict(), model.state_dict())
    losia_pro.load_delta(base, tmp_path / "delta")
    toys.equal_bits(base.state_dict(), model.state_dict())


def albert():
    """One layer's parameters, called at three depths."""
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AlbertForMaskedLM(config).double().eval()


def test_a_layer_used_at_every_depth_has_one_subnet_whose_gradient_is_the_sum_over_the_depths():
    plain = albert()
    model = copy.deepcopy(plain)
    plain(input_ids=ids(0), labels=ids(1)).loss.backward()
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=1, schedule="sync"))
    shared = [n for n in losia.modules if ".albert_layers.0." in n]
    assert len(shared) == 6
    losia.bind(torch.optim.SGD(losia.parameters(), lr=0.0))
    model(input_ids=ids(0), labels=ids(1)).loss.backward()
    for n in losia.modules:
        dense, m = plain.get_submodule(n).weight.grad, losia.modules[n]
        expected = dense[m.out_idx][:, m.in_idx]
        torch.testing.assert_close(m.subnet.grad, expected, rtol=1e-9, atol=1e-14)
        weight = plain.get_submodule(n).weight.detach()
        m.profile.update()
        importance = losia_pro.reference.importance(dense, weight) * (1 - losia.config.beta1)
        torch.testing.assert_close(m.profile.importance, importance, rtol=1e-8, atol=1e-14)
