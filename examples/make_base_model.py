"""Make the example base model: a 5.6 M parameter Llama pretrained on Python's source and docs.

    python examples/make_base_model.py --docs DIR --corpus corpus.jsonl.xz --stop-after tokenizer
    python examples/make_base_model.py --corpus corpus.jsonl.xz          # minutes on one GPU

The corpus is the standard library of the Python that runs this, found through `sysconfig`, and the
sources of Python's documentation in `DIR`, without the documents that `make_task.py` uses. It is
kept in one compressed file, so that the training can run where `DIR` is not. Steps already done
(corpus, tokenizer) are not done again: delete their files to redo them.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from make_task import documents, is_task_document, rank

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
# Tables, data of the machine that built Python, and rendered documentation (the task's included).
LEFT_OUT = (
    "encodings/",
    "pydoc_data/",
    "_sysconfigdata",
    "config-",
    "site-packages",
    "idlelib/Icons",
)
TEST_SHARE = 0.35  # of the training windows, from the library's own tests
REPEAT_SHARE = 0.05  # of the windows, one passage repeated: teaches copying
HELD_OUT = 0.02  # of the documents


def standard_library() -> Iterator[tuple[str, str]]:
    """(name, text) of every Python file of the running Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(LEFT_OUT):
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # test data in other encodings


def load_corpus(file: Path, docs: Path | None) -> dict[str, list[str]]:
    """Texts by part: "train", "tests" (of the library) and "held-out"; builds `file` if missing."""
    if not file.exists():
        if docs is None:
            raise SystemExit(f"{file} does not exist: give --docs to build it")
        found = dict(standard_library())
        found |= {f"{n}.rst": text for n, text in documents(docs) if not is_task_document(n)}
        file.parent.mkdir(parents=True, exist_ok=True)
        with lzma.open(file, "wt", encoding="utf-8") as out:
            for name, text in found.items():
                out.write(json.dumps({"name": name, "text": text}) + "\n")
    parts: dict[str, list[str]] = {"train": [], "tests": [], "held-out": []}
    with lzma.open(file, "rt", encoding="utf-8") as rows:
        for row in map(json.loads, rows):
            name = row["name"]
            is_test = "test/" in name or "tests/" in name
            held_out = not is_test and rank(name, "held-out") < HELD_OUT
            parts["held-out" if held_out else "tests" if is_test else "train"].append(row["text"])
    for part, texts in parts.items():
        print(f"{part}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} M characters")
    return parts


def load_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer in `folder`, trained on `texts` if missing.

    Digits stand alone and runs of backticks are tokens of their own, so that a name is cut the
    same way inside and outside of markup.
    """
    if not (folder / "tokenizer.json").exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(" ?`+"), "isolated"),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        bpe.train_from_iterator(texts, trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=1024, **SPECIAL)
        fast.save_pretrained(folder)
        saved = folder / "tokenizer_config.json"  # the old class name: transformers 4 reads it too
        saved.write_text(saved.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids, each between <|bos|> and <|eos|>; int64."""
    ids: list[int] = []
    for encoded in tokenizer.backend_tokenizer.encode_batch_fast(texts):
        ids += [tokenizer.bos_token_id, *encoded.ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def windows(ids: torch.Tensor, count: int, length: int, repeated: int = 0) -> torch.Tensor:
    """(count, length) random windows of `ids`; the first `repeated` repeat one passage instead."""
    start = torch.randint(len(ids) - length, (count, 1), device=ids.device)
    period = torch.full((count, 1), length, device=ids.device)
    period[:repeated] = torch.randint(8, length // 2, (repeated, 1), device=ids.device)
    return ids[start + torch.arange(length, device=ids.device) % period]


def next_token_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each token given those before it; ids (B, T + 1)."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def pretrain(
    model: LlamaForCausalLM, data: dict[str, torch.Tensor], args: argparse.Namespace
) -> dict[str, float]:
    """AdamW with warm-up and a cosine that ends after `args.steps` or `args.seconds`.

    Keeps the weights of the best held-out loss. Returns a record for the model's README.
    """
    device = data["train"].device
    length = args.context + 1
    held_out = data["held-out"][: len(data["held-out"]) // length * length].view(-1, length)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    loss_of = torch.compile(next_token_loss, dynamic=False) if args.compile else next_token_loss
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    from_tests, repeated = round(args.batch * TEST_SHARE), round(args.batch * REPEAT_SHARE)
    best, at, weights, started, step, progress = math.inf, 0, {}, time.monotonic(), 0, 0.0
    while progress < 1:
        batch = torch.cat(
            [
                windows(data["train"], args.batch - from_tests, length, repeated),
                windows(data["tests"], from_tests, length),
            ]
        )
        rate = args.lr * min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * progress)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast:
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds = time.monotonic() - started
        progress = max(step / args.steps, seconds / args.seconds)
        if step % args.eval_every == 0 or progress >= 1:
            with torch.no_grad(), autocast:
                losses = [next_token_loss(model, rows) for rows in held_out.split(args.batch)]
            now = torch.stack(losses).mean().item()
            print(
                f"step {step}: loss {loss.item():.3f}, held-out {now:.3f}, lr {rate:.1e}, "
                f"{step * args.batch * args.context / 1e6:.0f} M tokens, {seconds:.0f} s",
                flush=True,
            )
            if now < best:
                best, at = now, step
                weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(weights, strict=False)
    return {"steps": at, "tokens": at * args.batch * args.context, "held_out_loss": round(best, 4)}


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, help="sources of Python's documentation")
    parser.add_argument("--corpus", type=Path, required=True, help="built there if missing")
    parser.add_argument("--out", type=Path, default=here / "tiny-llama")
    parser.add_argument("--stop-after", choices=["corpus", "tokenizer"])
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64, help="windows of --context tokens a step")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end sooner, if need be")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.6)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    corpus = load_corpus(args.corpus, args.docs)
    if args.stop_after == "corpus":
        return
    tokenizer = load_tokenizer(args.out, corpus["train"], args.vocab)
    if args.stop_after == "tokenizer":
        return
    data = {part: encode(tokenizer, texts).to(args.device) for part, texts in corpus.items()}
    print({part: f"{len(ids) / 1e6:.2f} M tokens" for part, ids in data.items()}, flush=True)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 5 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_key_value_heads=max(1, args.hidden // 64),
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    record = pretrain(model, data, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
