"""Which linears read the same input: found by watching one forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .discover import Targets
from .kinds import named_modules


def find_shared_inputs(
    model: nn.Module, targets: Targets, example: object = None
) -> list[list[str]]:
    """Which linears of a block read the same tensor, seen in one forward without gradients.

    Args:
        example: what the model is called with, a mapping or a sequence of arguments; by default a Hugging Face
            model's own ``dummy_inputs``.

    Returns:
        The sets of two or more, in order.

    Raises:
        ValueError: no example, or one that the model refuses.
    """
    example = getattr(model, "dummy_inputs", None) if example is None else example
    if example is None:
        raise ValueError(
            f"share_inputs=True finds out in a forward which linears share their input, and "
            f"{type(model).__name__} has no dummy_inputs: give attach(..., example=inputs)"
        )
    device = next(model.parameters()).device
    readers: dict[tuple[int, int], list[str]] = {}
    layers: dict[str, nn.Module] = dict(named_modules(model))
    kept: list[Tensor] = []  # so that no two inputs have the same id

    def watch(group: int, name: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            x = args[0] if args else named["input"]
            kept.append(x)
            readers.setdefault((group, id(x)), []).append(name)

        return layers[name].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [
        watch(i, n)
        for i, group in enumerate(targets.groups)
        for n in group
        if n != targets.head and n in layers
    ]
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        # A compiler would trace the hooks, which are another graph for every layer.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            if isinstance(example, Mapping):
                model(**{k: _on(v, device) for k, v in example.items()})
            elif isinstance(example, Tensor):
                model(_on(example, device))
            else:
                model(*[_on(v, device) for v in example])  # type: ignore[union-attr]
    except Exception as error:
        raise ValueError(
            f"share_inputs=True: the model does not run on its example inputs ({error}); "
            "give attach(..., example=inputs)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    called = Counter(name for names in readers.values() for name in names)
    sets = [[n for n in names if called[n] == 1] for names in readers.values()]
    return [names for names in sets if len(names) > 1]


def _on(value: object, device: torch.device) -> object:
    return value.to(device) if isinstance(value, Tensor) else value
