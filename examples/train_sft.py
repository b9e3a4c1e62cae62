"""Fine-tune examples/tiny-llama with TRL's SFTTrainer: ``python examples/train_sft.py``; PEFT 0.21 or later and TRL."""

import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import losia_pro
from losia_pro.integrations.transformers import LosiaCallback

HERE = Path(__file__).parent
lines = (HERE / "rst-to-markdown" / "train.jsonl").read_text().splitlines()[:96]
rows = [{"prompt": e["prompt"], "completion": e["response"]} for e in map(json.loads, lines)]

arguments = SFTConfig(
    "runs/sft", max_steps=12, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=3,
    save_strategy="no", report_to="none", disable_tqdm=True, bf16=False, dataloader_pin_memory=False,
)  # fmt: skip
trainer = SFTTrainer(
    str(HERE / "tiny-llama"), args=arguments, train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(HERE / "tiny-llama"),
    peft_config=losia_pro.peft.LosiaConfig(rank_factor=1 / 8, period=3), callbacks=[LosiaCallback()],
)  # fmt: skip
trainer.train()
trainer.model.save_pretrained("runs/sft")  # the adapter: PeftModel.from_pretrained reads it
trainer.model.merge_and_unload().save_pretrained("runs/sft/merged")  # a plain model
