"""The linear maps of a model by name, those of other packages' layers included.

What a package's layers hold is told by ``losia_pro.integrations.<package>_layers``, if there is one, which is
imported when a model has a layer of that package::

    views(layer) -> dict[str, View]                      # by name within the layer, "" for the layer itself
    stand_in(layer, {name: SubnetView}) -> nn.Module     # what takes the layer's place
    why_not(model) -> str                                # why such a model cannot be tuned; empty if it can
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .views import AnyLinear, SubnetHost, SubnetView, View

WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}  # of torch.compile and of torch.distributed


def named_modules(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` by the names they have without wrappers, which pass attributes on: what is said or
    saved of a compiled model is good for the plain one."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        yield ".".join(part for part in name.split(".") if part not in WRAPPERS), module


@functools.cache
def _integration(package: str) -> Any:
    name = f"{__package__}.integrations.{package}_layers"
    if not package.isidentifier() or importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


def _integration_of(layer: nn.Module) -> Any:
    return _integration(type(layer).__module__.partition(".")[0])


def views_of(layer: nn.Module) -> dict[str, View]:
    """The linear maps that a layer holds by itself, where it is no ``nn.Linear``."""
    integration = _integration_of(layer)
    return {} if integration is None else integration.views(layer)


def stand_in(layer: nn.Module, units: Mapping[str, SubnetView]) -> nn.Module:
    """The module that takes the layer's place and computes the same with a subnet in each of its maps."""
    new: nn.Module = _integration_of(layer).stand_in(layer, units)
    return new


def linears_of(module: nn.Module) -> dict[str, AnyLinear]:
    """The linear maps that one module is or holds by itself, by name within it, "" for the module itself.

    Of linears, the exact type ``nn.Linear`` alone, parametrized or not: a subclass may read its weight in ways that a
    replacement would not see.
    """
    if isinstance(module, nn.Linear) and type_before_parametrizations(module) is nn.Linear:
        return {"": module}
    return {**views_of(module)}


def find_linear(model: nn.Module, name: str) -> AnyLinear | None:
    """The linear map of that name, as ``Losia.modules`` names them, in a plain model or an attached one."""
    for path, key in _splits(name):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if not key and isinstance(module, nn.Linear):
            return module
        held: Mapping[str, AnyLinear] = (
            module.units if isinstance(module, SubnetHost) else views_of(module)
        )
        if key in held:
            return held[key]
    return None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """``a.b.c`` as a module's name and a name within it: all of it, then less and less."""
    parts = name.split(".")
    for n in range(len(parts), -1, -1):
        yield ".".join(parts[:n]), ".".join(parts[n:])


def join(path: str, key: str) -> str:
    """The full name of what is called ``key`` within the module ``path``; either may be empty."""
    return ".".join(filter(None, (path, key)))


def refuse(model: nn.Module) -> None:
    """Raise a ValueError for a model that some package has made unfit for tuning in place."""
    packages: Iterable[str] = {type(m).__module__.partition(".")[0] for m in model.modules()}
    for integration in filter(None, map(_integration, sorted(packages))):
        if why := integration.why_not(model):
            raise ValueError(why)


def refuse_quantized(model: nn.Module) -> None:
    """Raise a ValueError, by name, for a linear whose weight is stored in a form that entries cannot be written
    to: integers, or a tensor subclass that packs them."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if weight is None:
            continue
        packed = is_traceable_wrapper_subclass(weight) and not hasattr(weight, "device_mesh")
        if packed or not weight.is_floating_point():
            raise ValueError(
                f"{name} ({type(module).__name__}) has quantized weights ({type(weight).__name__}, "
                f"{weight.dtype}), which cannot be tuned in place; load the model unquantized, in bf16 say"
            )
