"""The language model: a byte-level Llama, its losses, and its pretraining on the old domain."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .corpora import Part
from .settings import Setting, learning_rate

# Causal attention without a mask tensor: transformers' own "sdpa" asks the device, in every forward, whether a
# batch is packed, and the host waits for the answer.
AttentionInterface.register("causal", sdpa_attention_forward)
VALUES = 9_000_000  # of the weights in one file, which then has less than 16 MiB


def build(setting: Setting, device: torch.device) -> Any:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=setting.hidden,
        intermediate_size=setting.intermediate,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        max_position_embeddings=max(setting.length, setting.task_length),
        attn_implementation="causal",
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with device:
        return LlamaForCausalLM(config)


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """fp32 weights under bf16 autocast on a GPU; plain fp32 on a CPU."""
    return (
        torch.autocast("cuda", torch.bfloat16)
        if device.type == "cuda"
        else contextlib.nullcontext()
    )


def token_losses(model: nn.Module, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """For each next token ``(B, L)``: the loss in nats, whether it counts, and whether it is the likeliest."""
    ids = part.rows.long()
    with autocast(ids.device):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    targets = ids[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    place = torch.arange(1, ids.shape[1], device=ids.device)
    counts = (place >= part.first[:, None]) & (place < part.last[:, None])
    return losses.view_as(targets), counts, logits.detach().argmax(-1) == targets


def training_loss(model: nn.Module, part: Part) -> Tensor:
    """Mean over the tokens that count."""
    losses, counts, _ = token_losses(model, part)
    return (losses * counts).sum() / counts.sum()


@torch.no_grad()
def evaluate(model: nn.Module, part: Part, batch: int) -> tuple[float, float]:
    """Mean loss of the tokens that count, in nats; the share of rows of which all of them are greedily right.

    A greedy decoding that starts after the prompt gives the answer exactly if every token of the answer is the
    likeliest after the right tokens before it, so one forward pass tells.
    """
    total = torch.zeros(3, dtype=torch.float64, device=part.rows.device)
    for k in range(0, len(part.rows), batch):
        losses, counts, right = token_losses(model, Part(*(t[k : k + batch] for t in part)))
        total += torch.stack(
            [(losses.double() * counts).sum(), counts.sum(), (right | ~counts).all(1).sum()]
        )
    loss, tokens, rows = total.tolist()
    return loss / tokens, rows / len(part.rows)


def batches(part: Part, size: int, steps: int, seed: int) -> Iterator[Part]:
    """``steps`` batches: every row once before any comes again, in an order of the seed's."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while len(order) < steps * size:
        order = torch.cat([order, torch.randperm(len(part.rows), generator=generator)])
    for chosen in order[: steps * size].to(part.rows.device).split(size):
        yield Part(*(t[chosen] for t in part))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """For the length of a ``with`` block the same device and versions give the same bits; on a GPU
    CUBLAS_WORKSPACE_CONFIG must be set. A compiler times no candidates then."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with torch._inductor.config.patch(deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@deterministic()
def pretrain(setting: Setting, data: Part, compiled: bool) -> Any:
    """The base model: AdamW, linear warm-up, a cosine to a tenth of the peak. Rounded to bf16, so that it can be
    kept in small files.

    Raises:
        FloatingPointError: its loss is no longer finite.
    """
    torch.manual_seed(0)
    device = data.rows.device
    model = build(setting, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.pretrain_lr, betas=(0.9, 0.95), weight_decay=0.1,
        fused=device.type == "cuda",
    )  # fmt: skip
    if compiled:
        compile_blocks(model)
    steps = setting.pretrain_steps
    for step, part in enumerate(batches(data, setting.pretrain_batch, steps, seed=0)):
        optimizer.param_groups[0]["lr"] = setting.pretrain_lr * learning_rate(step, steps, 0.05)
        loss = training_loss(model, part)
        if (step % 100 == 0 or step == steps - 1) and not loss.isfinite():
            raise FloatingPointError(
                f"at step {step} of {steps} the base model's loss is {loss.item()}; a lower pretrain_lr than "
                f"{setting.pretrain_lr:g} would do"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    stop_compiling(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, whatever is wrapped around the model."""
    return [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]


def compile_blocks(model: nn.Module) -> None:
    """Each decoder layer by itself, so that all share what is compiled once."""
    torch._dynamo.config.recompile_limit = (
        1000  # a few variants for each method and shape of a batch
    )
    torch._dynamo.config.accumulated_recompile_limit = 1000
    for block in blocks(model):
        block.compile(dynamic=False)


def stop_compiling(model: nn.Module) -> None:
    for block in blocks(model):
        block._compiled_call_impl = None


# --- files ------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: Path) -> None:
    """bf16 weights one after another in compressed NumPy files; the bytes of signs and exponents apart, since they
    alone can be compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = torch.cat([p.detach().flatten().bfloat16() for p in model.state_dict().values()])
    for k, values in enumerate(flat.cpu().split(VALUES)):
        pairs = values.view(torch.uint8).view(-1, 2).numpy()
        partial = folder / f"part-{k}.partial.npz"
        np.savez_compressed(partial, low=pairs[:, 0], high=pairs[:, 1])
        partial.rename(folder / f"part-{k}.npz")


def load(model: nn.Module, folder: Path) -> bool:
    """Read what ``save`` wrote; False if not all of it is there."""
    state = model.state_dict()
    size = sum(p.numel() for p in state.values())
    files = [folder / f"part-{k}.npz" for k in range(-(-size // VALUES))]
    if not all(path.exists() for path in files):
        return False
    parts = []
    for path in files:
        with np.load(path) as found:
            pairs = np.stack([found["low"], found["high"]], axis=1)
        parts.append(torch.from_numpy(pairs).flatten().view(torch.bfloat16))
    flat = torch.cat(parts)
    if len(flat) != size:
        return False
    for p, values in zip(
        state.values(), flat.split([p.numel() for p in state.values()]), strict=True
    ):
        p.copy_(values.view_as(p))
    return True


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for p in model.state_dict().values():
        found.update(p.detach().bfloat16().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
