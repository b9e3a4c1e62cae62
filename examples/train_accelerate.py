"""Fine-tune examples/tiny-llama in a loop of accelerate's: ``python examples/train_accelerate.py``.

On two processes: ``accelerate launch --multi_gpu --num_processes 2 examples/train_accelerate.py``, on a CPU too, where
accelerate's own ``--cpu`` starts several processes through MPI alone, and otherwise one.
"""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import losia_pro

HERE = Path(__file__).parent
EXAMPLES = 4  # on all processes together, of a backward; a step has two

accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-llama")
lines = (HERE / "rst-to-markdown" / "train.jsonl").read_text().splitlines()[:80]
texts = [line["prompt"] + line["response"] + tokenizer.eos_token for line in map(json.loads, lines)]


def collate(some):
    part = tokenizer(some, padding=True, return_tensors="pt")
    return {**part, "labels": part["input_ids"].masked_fill(part["attention_mask"] == 0, -100)}


batches = DataLoader(texts, EXAMPLES // accelerator.num_processes, collate_fn=collate)
model = AutoModelForCausalLM.from_pretrained(HERE / "tiny-llama", dtype=torch.float32)
losia = losia_pro.attach(model, losia_pro.LosiaConfig(rank_factor=1 / 8, period=5))
optimizer = torch.optim.AdamW(losia.parameters(), lr=3e-3)
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
losia.bind(optimizer)  # to what prepare returned
losses = []
for batch in batches:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        losses.append(loss.detach())
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(losia.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients and losia.step % 5 == 0:
        mean = accelerator.gather(torch.stack(losses)).mean()
        losses.clear()
        where = f"step {losia.step} on {accelerator.num_processes} processes"
        accelerator.print(f"{where}: loss {mean:.3f}, {len(losia.history)} linears moved so far")
if accelerator.is_main_process:
    folder = Path("runs/accelerate")
    folder.mkdir(parents=True, exist_ok=True)
    losia.save_delta(folder / "delta.safetensors")  # losia_pro.load_delta(model, path) reads it
    losia.detach().save_pretrained(folder / "tuned")  # a plain model
accelerator.end_training()
