"""Layers that PEFT has put adapters into: they hold no linear map of the model's own; see ``losia_pro.kinds``."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..views import View


def views(layer: nn.Module) -> dict[str, View]:
    """See ``losia_pro.kinds``."""
    return {}


def why_not(model: nn.Module) -> str:
    """See ``losia_pro.kinds``."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            kind = f"{type(module).__module__.split('.')[-2]}.{type(module).__name__}"
            return (
                f"{name} carries a PEFT adapter ({kind}), through which its weight would not be tuned alone; "
                "take the adapter off first: merge_and_unload() keeps what it has learnt, unload() does not"
            )
    return ""
