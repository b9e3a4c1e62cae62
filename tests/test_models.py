"""Models of other people, built tiny from their configs: attach, train over moves, detach, save, load."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from torch import nn

import losia_pro
from losia_pro import LosiaConfig, SubnetLinear
from losia_pro.kinds import find_linear

transformers = pytest.importorskip("transformers")

LAYERS, VOCABULARY = 3, 64
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]

# The model's name in transformers, its config, where its blocks are, and the linears of a block in order.
MODELS = {
    "Llama": (GROUPED, "model.layers", ATTENTION + GATED),
    "Gemma": (GROUPED, "model.layers", ATTENTION + GATED),
    "Qwen2": ({**SIZES, "num_key_value_heads": 4}, "model.layers", ATTENTION + GATED),
    "Qwen3": (GROUPED, "model.layers", ATTENTION + GATED),
    "Mistral": (GROUPED, "model.layers", ATTENTION + GATED),
    "Phi": (SIZES, "model.layers", [*ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2"]),
    "Phi3": (
        SIZES, "model.layers",
        ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    ),
    "GPTNeoX": (
        SIZES, "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
}  # fmt: skip
EXPERTS = [f"mlp.experts.{x}_proj.{e}" for x in ("gate_up", "down") for e in range(3)]
MIXED = {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}
MODELS |= {
    "GPT2": (SIZES, "transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "Mixtral": (MIXED, "model.layers", ATTENTION + EXPERTS),
    "Qwen2Moe": (
        {**GROUPED, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16},
        "model.layers", ATTENTION + EXPERTS + [f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")],
    ),
    "GptOss": (
        {**MIXED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "model.layers",
        ATTENTION + EXPERTS,
    ),
}  # fmt: skip
MODELS["Llama, tied"] = ({**GROUPED, "tie_word_embeddings": True}, *MODELS["Llama"][1:])


def causal_lm(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    kind = name.split(",")[0]
    config = getattr(transformers, f"{kind}Config")(**MODELS[name][0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids(99)).logits


def train(model, losia, loss_of, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(losia.parameters(), lr=1e-2)
    losia.bind(optimizer)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def next_token_loss(model, step):
    batch = ids(step % 2)
    return model(input_ids=batch, labels=batch).loss


def same_logits(name: str, attached: torch.Tensor, plain: torch.Tensor) -> None:
    """Bit for bit; but biased experts add the bias within the product, which rounds once less."""
    if name == "GptOss":
        torch.testing.assert_close(attached, plain)
    else:
        assert torch.equal(attached, plain)


def structure(model: nn.Module) -> dict[str, object]:
    whole = toys.snapshot(model)
    return {k: whole[k] for k in ("types", "identity", "parameters", "requires_grad", "hooks")}


@pytest.mark.parametrize("name", MODELS)
def test_a_language_model_trains_and_loads_back_as_a_plain_model(name, tmp_path):
    _, where, linears = MODELS[name]
    model = causal_lm(name)
    base, before, keys = copy.deepcopy(model), structure(model), list(model.state_dict())
    head = model.get_output_embeddings()
    (head_name,) = (n for n, m in model.named_modules() if m is head)

    config = LosiaConfig(rank_factor=1 / 4, period=2, output_factor=1 / 4)
    losia = losia_pro.attach(model, config)
    blocks = [[f"{where}.{i}.{n}" for n in linears] for i in range(LAYERS)]
    assert losia.groups == [*blocks, [head_name]]
    assert all(isinstance(m, SubnetLinear) for m in losia.modules.values())
    assert list(model.state_dict()) == keys
    same_logits(name, logits(model), logits(base))

    losses = train(model, losia, next_token_loss, steps=2 * (LAYERS + 1) + 1)
    assert [r.name for r in losia.history] == [n for group in losia.groups for n in group]
    assert losses[-1] < losses[0]
    for n, m in losia.modules.items():
        assert not torch.equal(m.weight, find_linear(base, n).weight), n
    tied = model.config.tie_word_embeddings
    embedding, old = model.get_input_embeddings().weight, base.get_input_embeddings().weight
    assert tied == (embedding is model.get_output_embeddings().weight)
    assert torch.equal(embedding, old) == (not tied)

    losia.save_delta(tmp_path / "delta")
    tuned = logits(model)
    assert losia.detach() is model
    assert structure(model) == before and list(model.state_dict()) == keys
    same_logits(name, logits(model), tuned)
    tuned = logits(model)
    assert (tuned - logits(base)).abs().max() > 1e-2

    model.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), tuned)
    losia_pro.load_delta(base, tmp_path / "delta")
    toys.equal_bits(base.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_without_an_output_factor_the_head_and_the_embedding_stay(name):
    model = causal_lm(name)
    head = model.get_output_embeddings()
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=1))
    assert len(losia.groups) == LAYERS and model.get_output_embeddings() is head
    kept = [head.weight.detach().clone(), model.get_input_embeddings().weight.detach().clone()]
    train(model, losia, next_token_loss, steps=LAYERS)
    assert len(losia.history) == len(losia.modules)
    assert torch.equal(head.weight, kept[0])
    assert torch.equal(model.get_input_embeddings().weight, kept[1])


def test_a_bf16_model_saves_its_tuned_weights_while_attached(tmp_path):
    model = causal_lm("Llama, tied", torch.bfloat16)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=2))
    train(model, losia, next_token_loss, steps=5)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))
    toys.equal_bits(loaded.state_dict(), model.state_dict())


def test_all_linear_is_every_linear_but_the_head():
    """As PEFT reads it."""
    model = causal_lm("GPTNeoX")
    head = model.get_output_embeddings()
    body = [n for n, m in model.named_modules() if type(m) is nn.Linear and m is not head]
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, target_modules="all-linear"))
    assert list(losia.modules) == body and len(body) == 4 * LAYERS


def test_a_vision_transformer_trains_and_loads_back(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        image_size=16, patch_size=8, num_labels=8,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    base, before = copy.deepcopy(model), structure(model)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=2, output_factor=1 / 2))
    assert len(losia.groups) == LAYERS + 1 and losia.groups[-1] == ["classifier"]
    for i, group in enumerate(losia.groups[:-1]):
        assert len(group) == 6 and all(f".{i}." in n for n in group)
    pixels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def loss_of(model, step):
        return model(pixel_values=pixels, labels=torch.arange(8)).loss

    losses = train(model, losia, loss_of, steps=2 * (LAYERS + 1) + 1)
    assert losses[-1] < losses[0] and len(losia.history) == 6 * LAYERS + 1
    with torch.no_grad():
        tuned = model(pixels).logits
        losia.detach().save_pretrained(tmp_path)
        assert structure(model) == before
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
        assert torch.equal(loaded(pixels).logits, tuned)
        assert not torch.equal(base(pixels).logits, tuned)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(toys.IN, 32)
        self.norm = nn.LayerNorm(32)
        self.middle = nn.Linear(32, 24, bias=False)
        self.outer = nn.Linear(24, toys.OUT)

    def forward(self, x):
        return self.outer(torch.relu(self.middle(torch.relu(self.norm(self.inner(x))))))


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Linear(toys.IN, 32), nn.GELU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, toys.OUT)
    )


PLAIN = {"class": (MLP, ["inner", "middle", "outer"]), "Sequential": (sequential, ["0", "2", "4"])}


@pytest.mark.parametrize(("make", "names"), PLAIN.values(), ids=PLAIN)
def test_in_a_model_without_blocks_each_linear_is_a_group(make, names, tmp_path):
    model = make()
    base, before = copy.deepcopy(model), structure(model)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=2))
    assert losia.groups == [[n] for n in names]
    batch = toys.batches(1)[0]
    losses = train(model, losia, lambda model, _: toys.loss_of(model, batch), steps=8)
    assert losses[-1] < losses[0]
    moves = zip((2, 4, 6, 8), (*names, names[0]), strict=True)
    assert [(r.step, r.name) for r in losia.history] == list(moves)
    torch.save(losia.detach().state_dict(), tmp_path / "weights")
    assert structure(model) == before
    base.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    assert torch.equal(base(batch[0]), model(batch[0]))
