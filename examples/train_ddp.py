"""Fine-tune examples/tiny-llama on two processes: ``torchrun --nproc_per_node 2 examples/train_ddp.py``."""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import losia_pro

HERE = Path(__file__).parent
STEPS, EXAMPLES = 40, 8  # examples a step on each process

gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if gpu else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()

tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-llama")
lines = (HERE / "rst-to-markdown" / "train.jsonl").read_text().splitlines()
texts = [line["prompt"] + line["response"] + tokenizer.eos_token for line in map(json.loads, lines)]

model = AutoModelForCausalLM.from_pretrained(HERE / "tiny-llama", dtype=torch.float32).to(device)
losia = losia_pro.attach(model, losia_pro.LosiaConfig(period=10))
ddp = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(losia.parameters(), lr=3e-3)
losia.bind(optimizer)
for step in range(STEPS):
    first = (step * size + rank) * EXAMPLES
    part = tokenizer(texts[first : first + EXAMPLES], padding=True, return_tensors="pt").to(device)
    labels = part["input_ids"].masked_fill(part["attention_mask"] == 0, -100)
    loss = ddp(**part, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and (step + 1) % 10 == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}, {len(losia.history)} linears moved so far")
if rank == 0:
    Path("runs").mkdir(exist_ok=True)
    losia.save_delta("runs/ddp.safetensors")  # losia_pro.load_delta(model, path) reads it
dist.destroy_process_group()
