"""LoSiA-Pro: fine-tune one block of weights, a subnet, in each linear layer."""

from importlib import import_module
from typing import Any

from . import optim, reference
from .config import LosiaConfig
from .controller import Losia, attach
from .delta import load_delta
from .functional import subnet_linear
from .linear import SubnetLinear
from .localize import localize
from .switch import Delta

__version__ = "0.1.0"

__all__ = [
    "Delta",
    "Losia",
    "LosiaConfig",
    "SubnetLinear",
    "attach",
    "load_delta",
    "localize",
    "optim",
    "reference",
    "subnet_linear",
]


def __getattr__(name: str) -> Any:
    if name == "peft":  # needs PEFT, and so is imported when it is asked for
        return import_module("losia_pro.peft")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
