"""Fine-tune examples/tiny-llama, sharded over processes: ``torchrun --nproc_per_node 2 examples/train_fsdp.py``.

It leaves a checkpoint on its way, and started again goes on from there, on any number of processes.
"""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import losia_pro

HERE, CHECKPOINT = Path(__file__).parent, Path("runs/fsdp")
STEPS, SAVED, EXAMPLES = 20, 10, 8  # examples a step, on all processes together

gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if gpu else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()

tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-llama")
lines = (HERE / "rst-to-markdown" / "train.jsonl").read_text().splitlines()
texts = [line["prompt"] + line["response"] + tokenizer.eos_token for line in map(json.loads, lines)]

model = AutoModelForCausalLM.from_pretrained(HERE / "tiny-llama", dtype=torch.float32)
losia = losia_pro.attach(model, losia_pro.LosiaConfig(period=5))  # before fully_shard()
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(losia.parameters(), lr=3e-3)  # after it


def parts():
    """What a checkpoint holds; ``dcp.load`` fills in the same."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "losia": losia}


if CHECKPOINT.exists():
    state = parts()
    dcp.load(state, checkpoint_id=CHECKPOINT)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
losia.bind(optimizer)
for step in range(losia.step, STEPS):
    mine = texts[step * EXAMPLES : (step + 1) * EXAMPLES][rank::size]
    part = tokenizer(mine, padding=True, return_tensors="pt").to(device)
    labels = part["input_ids"].masked_fill(part["attention_mask"] == 0, -100)
    loss = model(**part, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(losia.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and (step + 1) % 5 == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}, {len(losia.history)} linears moved so far")
    if step + 1 == SAVED:
        dcp.save(parts(), checkpoint_id=CHECKPOINT)
losia.save_delta("runs/fsdp.safetensors")  # every process takes part, the first one writes
dist.destroy_process_group()
