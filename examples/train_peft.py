"""Fine-tune examples/tiny-llama through PEFT and Trainer: ``python examples/train_peft.py``; PEFT 0.21 or later."""

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import losia_pro
from losia_pro.integrations.transformers import LosiaCallback

HERE = Path(__file__).parent
tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-llama")


def examples(file, n):
    lines = (HERE / "rst-to-markdown" / file).read_text().splitlines()[:n]
    return [
        tokenizer(e["prompt"] + e["response"] + tokenizer.eos_token) for e in map(json.loads, lines)
    ]


def collate(rows):
    batch = tokenizer.pad(rows, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def base_model():
    return AutoModelForCausalLM.from_pretrained(HERE / "tiny-llama", dtype=torch.float32)


config = losia_pro.peft.LosiaConfig(rank_factor=1 / 8, period=5, task_type="CAUSAL_LM")
model = get_peft_model(base_model(), config)
model.print_trainable_parameters()
arguments = TrainingArguments(
    "runs/peft", max_steps=20, per_device_train_batch_size=8, learning_rate=3e-3,
    logging_steps=5, save_strategy="no", report_to="none", disable_tqdm=True,
    dataloader_pin_memory=False,
)  # fmt: skip
trainer = Trainer(
    model, arguments, train_dataset=examples("train.jsonl", 160), data_collator=collate,
    callbacks=[LosiaCallback()],
)  # fmt: skip
trainer.train()
model.save_pretrained("runs/peft")  # the trained places alone: 0.5 MB, where the model has 22

loaded = PeftModel.from_pretrained(base_model(), "runs/peft").to(model.device)
batch = {k: v.to(model.device) for k, v in collate(examples("test.jsonl", 32)).items()}
with torch.no_grad():
    tuned = loaded(**batch).loss
    with loaded.disable_adapter():
        base = loaded(**batch).loss
print(f"held-out loss {base.item():.3f} -> {tuned.item():.3f}")
loaded.merge_and_unload().save_pretrained("runs/peft/merged")  # a plain model
