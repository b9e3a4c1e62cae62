"""The models that are measured: their configurations, their linears, and the subnets' selections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from losia_pro.config import subnet_size


@dataclass(frozen=True)
class Shape:
    """A decoder: what of its configuration decides shapes."""

    kind: str  # "llama" or "gemma": which class of transformers builds it
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    def linears(self) -> list[tuple[int, int]]:
        """``(in, out)`` of each linear of one decoder layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden)]
        up, down = (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        return [*attention, up, up, down]

    def parameters(self, layers: int | None = None) -> int:
        """Entries of all matrices; norms are not counted."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        a_layer = sum(i * o for i, o in self.linears())
        return embeddings + a_layer * (self.layers if layers is None else layers)


MODELS = {
    "llama2-7b": Shape("llama", 4096, 11008, 32, 32, 32, 128, 32000),
    "llama2-13b": Shape("llama", 5120, 13824, 40, 40, 40, 128, 32000),
    "gemma-2b": Shape("gemma", 2048, 16384, 18, 8, 1, 256, 256000, tied=True),
    "llama3-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256),
    "llama3-70b": Shape("llama", 8192, 28672, 80, 64, 8, 128, 128256),
    "toy": Shape("llama", 128, 256, 2, 4, 4, 32, 128),
}


@dataclass(frozen=True)
class Selection:
    """Which neurons a subnet takes: shares of the inputs and outputs, in aligned runs of ``group``."""

    name: str
    in_factor: float
    out_factor: float
    group: int = 1

    def n_in(self, features: int) -> int:
        return subnet_size(features, self.in_factor, self.group)

    def n_out(self, features: int) -> int:
        return subnet_size(features, self.out_factor, self.group)

    def choose(
        self, features: int, factor: float, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """Sorted random indices of one side, on the CPU, and the length of the runs that they come in:
        all of them are one run."""
        n = subnet_size(features, factor, self.group)
        if n == features:
            return torch.arange(features), features
        runs = torch.randperm(features // self.group, generator=generator)[: n // self.group]
        first = runs.sort().values * self.group
        return (first[:, None] + torch.arange(self.group)).flatten(), self.group


SELECTIONS = (
    Selection("single", 1 / 8, 1 / 8),
    Selection("groups of 8", 1 / 8, 1 / 8, 8),
    Selection("groups of 16", 1 / 8, 1 / 8, 16),
    Selection("1/64 x all", 1 / 64, 1.0),
)


def unique_linears(models: list[str]) -> list[tuple[int, int]]:
    """``(in, out)`` of all linears of several models, each once, in the models' order."""
    return list(dict.fromkeys(shape for name in models for shape in MODELS[name].linears()))
