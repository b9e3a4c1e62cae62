"""Fine-tune examples/tiny-llama compiled, checkpointed, under autocast: ``python examples/train_compiled.py``.

Each block is compiled on its own. Where its subnets are is data to its graphs, so no move compiles anything anew;
while a block is profiled it has another graph. On a CPU, PyTorch's compiler needs a C++ compiler; without one:
``python examples/train_compiled.py aot_eager``.
"""

import json
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer

import losia_pro

HERE = Path(__file__).parent
STEPS, EXAMPLES, LENGTH = 15, 8, 64
backend = sys.argv[1] if len(sys.argv) > 1 else "inductor"

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-llama")
lines = (HERE / "rst-to-markdown" / "train.jsonl").read_text().splitlines()
texts = [line["prompt"] + line["response"] + tokenizer.eos_token for line in map(json.loads, lines)]
texts = [text for text in texts if len(tokenizer(text)["input_ids"]) <= LENGTH]

model = AutoModelForCausalLM.from_pretrained(HERE / "tiny-llama", dtype=torch.float32).to(device)
losia = losia_pro.attach(model, losia_pro.LosiaConfig(rank_factor=1 / 8, period=2))
model.gradient_checkpointing_enable({"use_reentrant": False})
model.train()  # or nothing is checkpointed
for layer in model.model.layers:
    layer.compile(fullgraph=True, backend=backend)
optimizer = torch.optim.AdamW(losia.parameters(), lr=3e-3)
losia.bind(optimizer)
optimizer_step = torch.compile(optimizer.step, backend=backend)
for step in range(STEPS):
    mine = texts[step * EXAMPLES : (step + 1) * EXAMPLES]
    part = tokenizer(mine, padding="max_length", max_length=LENGTH, return_tensors="pt").to(device)
    labels = part["input_ids"].masked_fill(part["attention_mask"] == 0, -100)
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(**part, labels=labels).loss
    loss.backward()
    optimizer_step()
    optimizer.zero_grad()
    if (step + 1) % 5 == 0:
        moved, graphs = len(losia.history), counters["stats"]["unique_graphs"]
        print(f"step {step + 1}: loss {loss.item():.3f}, {moved} linears moved, {graphs} graphs")
losia.detach().save_pretrained("runs/compiled")
