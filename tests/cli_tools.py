"""What the command line's tests share: a tiny model with a tokenizer trained on the spot, and a runner."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import torch

WORDS = ["red", "green", "blue", "one", "two", "three", "apple", "pear", "plum"]
PAIRS = [
    {"prompt": f"say {a} {b}:", "response": f" {b} {a}!"} for a in WORDS for b in WORDS if a != b
]


def make_tokenizer(**special):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        special_tokens=["<eos>", "<pad>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator([p["prompt"] + p["response"] for p in PAIRS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **{"eos_token": "<eos>", "pad_token": "<pad>", **special}
    )


def make_model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def make_data(folder: Path) -> Path:
    write_lines(folder / "train.jsonl", PAIRS[:60])
    write_lines(folder / "test.jsonl", PAIRS[60:])
    return folder


def finetune(*flags: object) -> int:
    from losia_pro.cli import main

    return main(["finetune", *map(str, flags)])


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


class InterruptAt:
    """Ctrl-C while the held-out loss of a chosen evaluation is measured; counted from 1, the base's."""

    def __init__(self, monkeypatch, number: int, times: int = 1) -> None:
        self.left = number
        from losia_pro.cli.job import Job

        original = Job.evaluate

        def evaluate(job, model):
            self.left -= 1
            if self.left == 0:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return original(job, model)

        monkeypatch.setattr(Job, "evaluate", evaluate)
