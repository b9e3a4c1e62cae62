"""The four ways to tune a model, each as: what is trained, and how it becomes a plain model again."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import losia_pro
from losia_pro.discover import find_targets, repeated_blocks

from .errors import CliError
from .options import SUBNETS


@dataclass
class Tuned:
    """A model made ready for training by one method.

    ``finish()`` gives the plain model with the tuned weights. What the method has of its own (a delta, an
    adapter) is called ``own``; ``save(path)`` writes it, before ``finish()``. ``blocks``: the repeated blocks, for
    ``--compile``.
    """

    model: nn.Module
    trainable: int
    finish: Callable[[], Any]
    own: str | None = None
    save: Callable[[Path], None] = lambda path: None
    callbacks: list[Any] = field(default_factory=list)
    losia: losia_pro.Losia | None = None
    blocks: list[nn.Module] = field(default_factory=list)


def prepare(
    method: str, model: Any, options: argparse.Namespace, calibration: Sequence[dict[str, Any]]
) -> Tuned:
    """Make ``model`` trainable by ``method``.

    Raises:
        CliError: a setting that the model does not allow, in the library's own words.

    ``calibration``: batches for ``init="calibrate"``; empty where a checkpoint is about to be loaded.
    """
    # Found in the plain model: they stay the same modules, and linears in them change their kind.
    blocks = [model.get_submodule(name) for name in repeated_blocks(model)]
    try:
        if method in ("losia-pro", "losia"):
            tuned = _losia(method, model, options, calibration)
        elif method == "lora":
            tuned = _lora(model, options)
        else:
            from losia_pro.integrations.transformers import OwnNames

            model.requires_grad_(True)
            tuned = Tuned(model, _trainable(model), lambda: model, callbacks=[OwnNames()])
    except ValueError as error:
        raise CliError(f"{method}: {error}") from error
    tuned.blocks = blocks
    return tuned


def losia_config(method: str, options: argparse.Namespace) -> losia_pro.LosiaConfig:
    """The subnets' sizes and schedule that the flags ask for."""
    settings = {name: getattr(options, name) for name in SUBNETS}
    return losia_pro.LosiaConfig(**settings, mode="dense" if method == "losia" else "pro")


def _losia(
    method: str, model: Any, options: argparse.Namespace, calibration: Sequence[dict[str, Any]]
) -> Tuned:
    from losia_pro.integrations.transformers import LosiaCallback

    losia = losia_pro.attach(model, losia_config(method, options))
    if calibration:
        device = next(model.parameters()).device
        losia.calibrate([{k: v.to(device) for k, v in batch.items()} for batch in calibration])
    return Tuned(
        model,
        _trainable(model),
        losia.detach,
        "delta.safetensors",
        losia.save_delta,
        [LosiaCallback(losia)],
        losia,
    )


def _lora(model: Any, options: argparse.Namespace) -> Tuned:
    from peft import LoraConfig, get_peft_model

    # The same linears as LoSiA's: all in the repeated blocks, or those that the flag names.
    chosen = find_targets(model, losia_pro.LosiaConfig(target_modules=options.target_modules))
    modules = dict(model.named_modules())
    stacks = dict.fromkeys(n.rpartition(".")[0] for n in chosen.linears if n not in modules)
    rank = options.lora_rank or max(1, model.get_input_embeddings().embedding_dim // 64)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=options.lora_alpha or 2 * rank,
        lora_dropout=0.0,
        target_modules=[n for n in chosen.linears if n in modules],
        target_parameters=[*stacks] or None,
    )
    with warnings.catch_warnings():  # PEFT asks transformers for a name that has since changed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # and set
        adapted = get_peft_model(model, config)
    return Tuned(
        adapted,
        _trainable(adapted),
        adapted.merge_and_unload,
        "adapter",
        lambda path: adapted.save_pretrained(str(path)),
    )


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
