"""Models of a named shape with random weights, made on the device, and the modes that they are trained in."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CliError
from .shapes import MODELS

MODES = {
    "eager": "as PyTorch runs it",
    "checkpointed": "non-reentrant activation checkpointing of each decoder layer",
    "compiled": "torch.compile of each decoder layer",
}


def build(name: str, layers: int, length: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A causal language model in training mode, SDPA attention, no cache; nothing is downloaded.

    Its embeddings' output requires grad, so that every method backpropagates through the same dense
    products, those of the first layer included.
    """
    try:
        from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig
    except ImportError as error:
        raise CliError(
            "bench step and memory need transformers: pip install transformers"
        ) from error
    shape = MODELS[name]
    config = {"llama": LlamaConfig, "gemma": GemmaConfig}[shape.kind](
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max(length, 2048),
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    dtypes = {p.dtype for p in model.parameters()}
    where = {p.device.type for p in model.parameters()}
    if dtypes != {dtype} or where != {device.type}:
        raise AssertionError(f"the model was built as {dtypes} on {where}, not {dtype} on {device}")
    model.get_input_embeddings().register_forward_hook(_require_grad)
    return model.train()


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()


def tokens(name: str, batch: int, length: int, device: torch.device) -> Tensor:
    """Random token ids ``(batch, length)``."""
    return torch.randint(MODELS[name].vocabulary, (batch, length), device=device)


def set_mode(model: Any, mode: str) -> None:
    """Put a model made by ``build`` into a mode, after its linears were adapted."""
    if mode == "checkpointed":
        name = "gradient_checkpointing"
        if hasattr(model, "activation_checkpointing_enable"):  # transformers since 5.18
            name = "activation_checkpointing"
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    elif mode == "compiled":
        torch.compiler.reset()
        for layer in model.get_decoder().layers:
            layer.compile()


def graph_breaks() -> int:
    """How often ``torch.compile`` has left the graph in this process; internal to PyTorch, so maybe always 0."""
    with contextlib.suppress(Exception):
        from torch._dynamo.utils import counters

        return int(sum(counters["graph_break"].values()))
    return 0
