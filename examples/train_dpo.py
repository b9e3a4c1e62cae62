"""Preference-tune examples/tiny-llama with TRL: ``python examples/train_dpo.py``; PEFT 0.21 or later and TRL.

Markdown is preferred to the reStructuredText left as it was. The reference is the base model, which the trainer gets
by switching the adapter off: no second copy of the model is kept.
"""

import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import losia_pro
from losia_pro.integrations.transformers import LosiaCallback

HERE = Path(__file__).parent
rows = []
for line in (HERE / "rst-to-markdown" / "train.jsonl").read_text().splitlines():
    prompt, markdown = json.loads(line).values()
    rst = prompt.removeprefix("reST:\n").removesuffix("\nMarkdown:\n")
    if rst != markdown and len(prompt) < 120:
        rows.append({"prompt": prompt, "chosen": markdown, "rejected": rst})

arguments = DPOConfig(
    "runs/dpo", max_steps=12, per_device_train_batch_size=4, learning_rate=3e-3, logging_steps=3,
    save_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=False,
    bf16=False, dataloader_pin_memory=False,
)  # fmt: skip
trainer = DPOTrainer(
    str(HERE / "tiny-llama"), args=arguments, train_dataset=Dataset.from_list(rows[:48]),
    processing_class=AutoTokenizer.from_pretrained(HERE / "tiny-llama"),
    peft_config=losia_pro.peft.LosiaConfig(period=3), callbacks=[LosiaCallback()],
)  # fmt: skip
trainer.train()
for log in trainer.state.log_history:
    if "loss" in log:
        margin, right = log["rewards/margins"], log["rewards/accuracies"]
        print(f"step {log['step']}: loss {log['loss']:.3f}, margin {margin:.2f}, {right:.0%} right")
trainer.model.save_pretrained("runs/dpo")
