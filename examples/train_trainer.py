"""Fine-tune examples/tiny-llama with ``Trainer``: ``python examples/train_trainer.py``.

Killed at any time and started again, it goes on exactly from its last checkpoint. What is logged, and here printed,
reaches any tracker that ``report_to`` names.
"""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import losia_pro
from losia_pro.integrations.transformers import LosiaCallback, last_checkpoint

HERE, FOLDER = Path(__file__).parent, Path("runs/trainer")

tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-llama")
lines = (HERE / "rst-to-markdown" / "train.jsonl").read_text().splitlines()[:160]
texts = [line["prompt"] + line["response"] + tokenizer.eos_token for line in map(json.loads, lines)]


def collate(rows):
    part = tokenizer.pad(rows, return_tensors="pt")
    return {**part, "labels": part["input_ids"].masked_fill(part["attention_mask"] == 0, -100)}


model = AutoModelForCausalLM.from_pretrained(HERE / "tiny-llama", dtype="float32")
losia = losia_pro.attach(model, losia_pro.LosiaConfig(rank_factor=1 / 8, period=5))
arguments = TrainingArguments(
    str(FOLDER), max_steps=20, per_device_train_batch_size=8, learning_rate=3e-3,
    logging_steps=5, save_steps=10, report_to="none", disable_tqdm=True,
    dataloader_pin_memory=False,
)  # fmt: skip
trainer = Trainer(
    model, arguments, train_dataset=[tokenizer(text) for text in texts], data_collator=collate
)
LosiaCallback(losia).add_to(trainer)
trainer.train(resume_from_checkpoint=last_checkpoint(FOLDER))
losia.save_delta(FOLDER / "delta.safetensors")  # what changed
losia.detach().save_pretrained(FOLDER / "tuned")  # the tuned model; push_to_hub sends the same
