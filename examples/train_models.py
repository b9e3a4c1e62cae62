"""Tune tiny models of several kinds, made from their configs: ``python examples/train_models.py``.

A mixture whose experts are stacks of matrices, GPT-2 with its transposed linears and an output head that is tied to
its embedding, and an encoder-decoder; to all of them it is the same loop.
"""

import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    MixtralConfig,
    T5Config,
)

import losia_pro

LINES = Path(__file__).parent / "rst-to-markdown" / "train.jsonl"
STEPS, EXAMPLES, LENGTH = 30, 16, 48
SPECIAL = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # bytes
mixture = MixtralConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **SPECIAL,
)  # fmt: skip
gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH, **SPECIAL)
t5 = T5Config(
    d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0, **SPECIAL
)

pairs = [json.loads(line) for line in LINES.read_text().splitlines()[: STEPS * EXAMPLES]]


def ids(texts):
    padded = [text.encode()[:LENGTH].ljust(LENGTH, b"\0") for text in texts]
    return torch.tensor([list(text) for text in padded])


def batches(translates):
    for i in range(0, len(pairs), EXAMPLES):
        part = pairs[i : i + EXAMPLES]
        target = ids(pair["response"] for pair in part)
        source = ids(pair["prompt"].removeprefix("reST:\n") for pair in part)
        yield {
            "input_ids": source if translates else target,
            "labels": target.masked_fill(target == 0, -100),
        }


for config, auto in (
    (mixture, AutoModelForCausalLM),
    (gpt2, AutoModelForCausalLM),
    (t5, AutoModelForSeq2SeqLM),
):
    torch.manual_seed(0)
    model = auto.from_config(config)
    losia = losia_pro.attach(
        model, losia_pro.LosiaConfig(rank_factor=1 / 4, period=3, output_factor=1 / 4)
    )
    optimizer = torch.optim.AdamW(losia.parameters(), lr=1e-2)
    losia.bind(optimizer)
    losses = []
    for batch in batches(auto is AutoModelForSeq2SeqLM):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    losia.detach().save_pretrained(f"runs/models/{config.model_type}")  # a plain model again
    print(
        f"{config.model_type}: {len(losia.modules)} subnets in {len(losia.groups)} groups, "
        f"loss {losses[0]:.3f} -> {sum(losses[-5:]) / 5:.3f}"
    )
