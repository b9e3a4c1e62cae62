"""Two tasks on one base, exchanged in place between requests: ``python examples/switch_deltas.py``.

What it leaves in ``runs/deltas`` can be looked at, and made a model of its own, from the command line::

    losia-pro inspect runs/deltas/markdown.safetensors
    losia-pro merge --dtype float32 examples/tiny-llama runs/deltas/markdown.safetensors runs/deltas/merged
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import losia_pro

HERE, FOLDER = Path(__file__).parent, Path("runs/deltas")
STEPS, EXAMPLES = 12, 8

tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-llama")
lines = (HERE / "rst-to-markdown" / "train.jsonl").read_text().splitlines()
pairs = [json.loads(line) for line in lines[: STEPS * EXAMPLES + EXAMPLES]]
tasks = {
    "markdown": [pair["prompt"] + pair["response"] for pair in pairs],
    "capitals": [pair["response"].upper() for pair in pairs],
}


def batch(task, step):
    texts = [text + tokenizer.eos_token for text in tasks[task][step * EXAMPLES :][:EXAMPLES]]
    part = tokenizer(texts, padding=True, return_tensors="pt")
    return {**part, "labels": part["input_ids"].masked_fill(part["attention_mask"] == 0, -100)}


def base_model():
    return AutoModelForCausalLM.from_pretrained(HERE / "tiny-llama", dtype=torch.float32)


FOLDER.mkdir(parents=True, exist_ok=True)
for task in tasks:
    losia = losia_pro.attach(base_model(), losia_pro.LosiaConfig(rank_factor=1 / 8, period=4))
    optimizer = torch.optim.AdamW(losia.parameters(), lr=3e-3)
    losia.bind(optimizer)
    for step in range(STEPS):
        losia.model(**batch(task, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losia.save_delta(FOLDER / f"{task}.safetensors")

model = base_model().eval()
deltas = {task: losia_pro.Delta(FOLDER / f"{task}.safetensors") for task in tasks}
now = None
with torch.inference_mode():
    for wanted in (None, "markdown", "capitals", "markdown", None):
        if now:
            deltas[now].remove()  # the base again, bit for bit
        if wanted:
            deltas[wanted].apply(model)
        now = wanted
        losses = [f"{task} {model(**batch(task, STEPS)).loss.item():.3f}" for task in tasks]
        print(f"{wanted or 'base'}: held-out loss {', '.join(losses)}")
