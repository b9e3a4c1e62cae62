"""Deltas of several tasks on one base: put on, taken off and exchanged in place."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from . import delta, sharded
from .entries import decode
from .kinds import find_linear
from .linear import SubnetLinear


class Delta:
    """A delta file in memory, to put on its base model and take off again, bit for bit::

        french, german = losia_pro.Delta("fr.safetensors"), losia_pro.Delta("de.safetensors")
        french.apply(model)
        ...
        french.remove()
        german.apply(model)

    The weights are written in place, so compiled graphs and captured ones stay good; to order that with a
    forward on another stream or thread is the caller's part. While applied, the base's values of the entries
    are kept on the CPU, as many bytes as the file has of values.

    Args:
        path: written by ``Losia.save_delta``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a delta, or a truncated one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.header, self._tensors = delta.read(path)
        self._model: nn.Module | None = None
        self._base: list[Tensor] = []

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """Put the tuned values into the base model; returns it. The weights of the delta's linears are read
        once, to check that they are the base's.

        Raises:
            ValueError: other weights than the base's (another delta is on them, say), a malformed delta, or
                an attached model, which ``load_delta`` is for. Nothing has changed then.
            RuntimeError: this delta is applied already.
        """
        if self._model is not None:
            raise RuntimeError(f"{self.path}: applied already; remove() takes it off")
        try:
            delta.targets(model, self.header, self._tensors)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        parts = self._parts(model)
        self._base = [t[at].clone().cpu() for t, at, _ in parts]  # of all, before any is written
        self._model = model
        for t, at, values in parts:
            t[at] = values
        return model

    @torch.no_grad()
    def remove(self) -> None:
        """Put the base's values back.

        Raises:
            RuntimeError: not applied, or the model does not hold the delta's values any more.
            ValueError: the model was attached since. Nothing has changed then.
        """
        if self._model is None:
            raise RuntimeError(f"{self.path}: not applied to a model")
        parts = self._parts(self._model)
        if not all(delta.same_bits(t[at], values) for t, at, values in parts):
            raise RuntimeError(
                f"{self.path}: the weights were changed since apply(), so what remove() would leave is not the "
                "base model; load that anew"
            )
        for (t, at, _), values in zip(parts, self._base, strict=True):
            t[at] = values.to(t.device)
        self._model, self._base = None, []

    def _parts(self, model: nn.Module) -> list[tuple[Tensor, Any, Tensor]]:
        """Every tensor that is written, where in it, and the delta's values."""
        parts: list[tuple[Tensor, Any, Tensor]] = []
        for name in delta.modules_of(self.header):
            linear = find_linear(model, name)
            if isinstance(linear, SubnetLinear):
                raise ValueError(  # noqa: TRY004
                    f"{self.path}: the model is attached for training, which load_delta is for; detach() it"
                )
            assert linear is not None
            if sharded.is_sharded(linear.weight):
                raise ValueError(
                    f"{self.path}: {name} is sharded; apply the delta before fully_shard()"
                )
            parts += [(linear.weight, *e) for e in decode(linear.weight, name, self._tensors)]
            bias = self._tensors.get(f"{name}.bias")
            if bias is not None and linear.bias is not None:
                parts.append((linear.bias, ..., bias.to(linear.bias.device)))
        return parts
