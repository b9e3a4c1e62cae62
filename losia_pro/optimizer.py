"""What an optimizer must be to train subnets, which steps of it count, and what it forgets of one that moves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .guard import has_zero_rate
from .optim import AdamW
from .sharded import local

# Those of torch.optim whose first step is one from a state of zeros; SGD's is not where it dampens.
BEGIN_WITH_ZEROS = {
    "Adadelta", "Adafactor", "Adam", "AdamW", "Adamax", "Muon", "RAdam", "RMSprop", "SGD",
}  # fmt: skip


def innermost(optimizer: Any) -> Any:
    """The optimizer that a wrapper steps, accelerate's for one: hooks on the wrapper itself would not run."""
    kind = torch.optim.Optimizer
    while isinstance(optimizer, kind) and isinstance(
        inner := getattr(optimizer, "optimizer", None), kind
    ):
        optimizer = inner
    return optimizer


def check_optimizer(
    optimizer: object, subnets: Mapping[str, Tensor], base_decay: float = 0.0
) -> None:
    """Refuse an optimizer that ``Losia.bind`` cannot hook into, or that would leave a subnet out.

    Raises:
        TypeError: not a ``torch.optim.Optimizer``.
        ValueError: LBFGS; schedule-free optimizers; subnets missing from the optimizer; subnets in bf16 that it rounds
            to nearest; no learning rate to decay by.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"bind takes a torch.optim.Optimizer, got {type(optimizer).__name__}; engines that bring their own, as "
            "DeepSpeed does but for stage 0 in fp32, are not supported: use DistributedDataParallel or fully_shard()"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(  # noqa: TRY004
            "LBFGS keeps one flat history of all parameters, which cannot be reset for the subnets "
            "that move; use a first-order optimizer such as AdamW"
        )
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"{type(optimizer).__name__} trains other values than it evaluates, which the dense weights do not follow, "
            "as schedule-free optimizers do; use AdamW with a scheduler"
        )
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    missing = [n for n, subnet in subnets.items() if id(subnet) not in held]
    if missing and not any(subnets[n].requires_grad for n in missing):
        raise ValueError(
            f"{len(missing)} of {len(subnets)} subnets are frozen and not in the optimizer, e.g. {missing[0]}; let "
            "them require grad before it is created (PEFT's from_pretrained: is_trainable=True)"
        )
    if missing:
        raise ValueError(
            f"the optimizer lacks {len(missing)} of {len(subnets)} subnets, e.g. {missing[0]}; "
            "create it with losia.parameters(), after fully_shard() if that is used (DeepSpeed's ZeRO, which puts "
            "others in their place, is not supported)"
        )
    short = [n for n, subnet in subnets.items() if subnet.dtype == torch.bfloat16]
    if short and not getattr(optimizer, "bf16_stochastic_round", False):
        raise ValueError(
            f"{len(short)} subnets are in bf16, e.g. {short[0]}, and {type(optimizer).__name__} rounds to nearest, "
            "which loses small updates; use losia_pro.optim.AdamW, an optimizer of torchao with "
            "bf16_stochastic_round=True, or leave subnet_dtype out"
        )
    if base_decay and any(g.get("lr") is None for g in optimizer.param_groups):
        raise ValueError(
            f"base_decay={base_decay:g} is per learning rate, and {type(optimizer).__name__} was given none; give it "
            "an lr (and transformers' Adafactor relative_step=False), or set base_decay=0"
        )


def is_rehearsal(optimizer: torch.optim.Optimizer, on_any_rank: Callable[[bool], bool]) -> bool:
    """Whether a step is none: without learning rates and gradients, ``torch.distributed.checkpoint`` makes one
    to let an optimizer create its state."""
    if not all(map(has_zero_rate, optimizer.param_groups)):
        return False
    grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
    return not on_any_rank(any(bool(local(g).any()) for g in grads if g is not None))


def warn_of_idle(subnets: Mapping[str, Tensor]) -> None:
    """Say which of the subnets that are to be trained have no gradient, at an optimizer's first step."""
    idle = [n for n, subnet in subnets.items() if subnet.requires_grad and subnet.grad is None]
    if idle:
        warnings.warn(
            f"{len(idle)} of {len(subnets)} subnets have no gradient at the first step, e.g. {idle[0]}, and stay as "
            "they are: the loss does not depend on them, or the model reads their weights without calling the layer, "
            "as nn.TransformerEncoderLayer does in eval()",
            UserWarning,
            stacklevel=2,
        )


def forget(optimizer: torch.optim.Optimizer, subnet: Tensor) -> None:
    """Start the optimizer's state of ``subnet`` afresh, its count of steps too.

    State that begins with zeros is zeroed in place: a compiled step is compiled for the tensors it has seen, and
    ``torch.distributed.checkpoint`` loads state that every parameter had when it was saved.
    """
    if isinstance(inner := getattr(optimizer, "optim", None), torch.optim.Optimizer):
        optimizer = inner  # ZeroRedundancyOptimizer's: it has the state, of this process's part
    kind = type(optimizer)
    zeros = kind is AdamW or (
        kind is getattr(torch.optim, kind.__name__, None) and kind.__name__ in BEGIN_WITH_ZEROS
    )
    if zeros and not any(g.get("dampening") for g in optimizer.param_groups):
        for value in optimizer.state.get(subnet, {}).values():
            if isinstance(value, Tensor):
                value.zero_()
    else:
        optimizer.state.pop(subnet, None)
