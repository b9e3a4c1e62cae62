"""Toys whose linears are views of other layers' parameters: mixtures of experts, and linears stored transposed."""

from __future__ import annotations

import pytest
import torch
import toys
from torch import nn

transformers = pytest.importorskip("transformers")
mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
nemotron_h = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

EXPERTS, HIDDEN, WIDE = 5, 16, 24
SIZES = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_local_experts": EXPERTS}


def mixtral_experts():
    return mixtral.MixtralExperts(transformers.MixtralConfig(**SIZES))


def gpt_oss_experts():
    """Biased, stored transposed, gate and up interleaved."""
    return gpt_oss.GptOssExperts(transformers.GptOssConfig(**SIZES))


def nemotron_experts():
    """Without a gate."""
    config = transformers.NemotronHConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDE, n_routed_experts=EXPERTS
    )
    return nemotron_h.NemotronHExperts(config)


KINDS = {"gated": mixtral_experts, "biased": gpt_oss_experts, "no gate": nemotron_experts}


def experts_of(make, dtype=torch.float64):
    layer = make().to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype) / 4)
    return layer


class Mixture(nn.Module):
    """A layer of experts behind a fixed routing that leaves expert ``idle`` alone."""

    def __init__(self, experts: nn.Module, idle: int = 1, tokens: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": experts})])
        generator = torch.Generator().manual_seed(1)
        used = torch.tensor([e for e in range(EXPERTS) if e != idle])
        rows = [used[torch.randperm(len(used), generator=generator)[:2]] for _ in range(tokens)]
        self.chosen = torch.stack(rows)
        self.shares = torch.rand(tokens, 2, generator=generator, dtype=torch.float64)

    def forward(self, x):
        return self.layers[0]["experts"](x, self.chosen, self.shares.to(x.dtype))


X = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def loss_of(model):
    return model(X).square().mean()


def transposed(model: nn.Module) -> nn.Module:
    """The linears of a stack's blocks become such that store the same weights transposed."""
    for block in model.layers:
        for name, linear in list(block.named_children()):
            layer = Conv1D(linear.out_features, linear.in_features).to(linear.weight.dtype)
            with torch.no_grad():
                layer.weight.copy_(linear.weight.t())
                if linear.bias is not None:
                    layer.bias.copy_(linear.bias)
            setattr(block, name, layer)
    return model


def conv_stack(dtype=torch.float64) -> nn.Module:
    return transposed(toys.stack(dtype))


class Routed(nn.Module):
    """Two layers of experts of which each token chooses two by its features, and a head; on float inputs."""

    def __init__(self, dtype=torch.float64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": experts_of(mixtral_experts, dtype)}) for _ in range(2)
        )
        generator = torch.Generator().manual_seed(3)
        self.register_buffer(
            "route", torch.randn(HIDDEN, EXPERTS, generator=generator, dtype=dtype)
        )
        self.head = toys.stack(dtype).head
        self.least = 10**6  # the fewest tokens that an expert was given in a call

    def forward(self, x):
        for layer in self.layers:
            shares, chosen = (x @ self.route).softmax(-1).topk(2)
            self.least = min(self.least, int(chosen.flatten().bincount(minlength=EXPERTS).min()))
            x = x + layer["experts"](x, chosen, shares)
        return self.head(x)
