"""Layers of Hugging Face transformers that hold linear maps without being an ``nn.Linear``; see ``losia_pro.kinds``.

``Conv1D`` (GPT-2) stores ``W`` transposed. Mixtures of experts store the experts' weights as stacks, one parameter
for all first projections and one for all second ones; which of them are so is told by what their class decorator
(``use_experts_implementation``) sets on each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..views import SubnetHost, SubnetView, View


def views(layer: nn.Module) -> dict[str, View]:
    """See ``losia_pro.kinds``."""
    if type(layer) is Conv1D:
        return {"": View(layer, "weight", transposed=True, bias="bias")}
    if not _are_experts(layer):
        return {}
    experts: Any = layer
    found = [
        View(layer, name, e, experts.is_transposed, f"{name}_bias" if experts.has_bias else None)
        for name in _projections(experts)
        for e in range(experts._parameters[name].shape[0])
    ]
    return {view.key: view for view in found}


def stand_in(layer: nn.Module, units: Mapping[str, SubnetView]) -> nn.Module:
    """See ``losia_pro.kinds``."""
    return units[""].stand_in_for(layer) if "" in units else SubnetExperts(layer, units)


def why_not(model: nn.Module) -> str:
    """See ``losia_pro.kinds``."""
    for name, module in model.named_modules():
        if getattr(module, "is_quantized", False):
            config: Any = getattr(module, "config", None)
            method = getattr(getattr(config, "quantization_config", None), "quant_method", "")
            return (
                f"{type(module).__name__} is quantized ({getattr(method, 'value', method)}), so its weights cannot "
                "be tuned in place; load it without quantization_config, in bf16 say"
            )
        if getattr(module, "_is_expert_parallel", False):
            return f"{name} holds a part of the experts (expert parallel), which is not supported"
    return ""


def _are_experts(layer: nn.Module) -> bool:
    flags = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
    if not all(hasattr(layer, flag) for flag in flags):
        return False
    stacks = [layer._parameters.get(name) for name in _projections(layer)]
    return all(stack is not None and stack.dim() == 3 for stack in stacks)


def _projections(experts: Any) -> tuple[str, str]:
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


class SubnetExperts(SubnetHost):
    """A mixture's experts with a subnet in each, as transformers' ``grouped_mm`` and ``batched_mm`` compute it.

        y_t = sum_k p_tk f_e(x_t),  e = e_tk,  f_e(x) = W2_e act(W1_e x)

    Every expert is called, with no tokens if none are for it: then its gradients are zero, as its part of the stack's
    would be, and an optimizer with momentum or decay still moves it. One host sync a call.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` ``(T, in)``; ``top_k_index`` int64 and ``top_k_weights`` ``(T, k)``; ``(T, out)``."""
        experts: Any = self.plain[0]
        first, second = _projections(experts)
        n_tokens, n_chosen = top_k_index.shape
        expert_of, order = top_k_index.flatten().sort(stable=True)
        counts = expert_of.bincount(minlength=experts._parameters[second].shape[0]).tolist()
        parts = hidden_states[order // n_chosen].split(counts)
        outputs = []
        for e, x in enumerate(parts):
            h = self._map(first, e, x)
            h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
            outputs.append(self._map(second, e, h))
        y = torch.cat(outputs)
        if getattr(experts, "has_post_expert_norm", False):
            y = experts.post_expert_norm(y)
        weighted = y * top_k_weights.flatten()[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return weighted[back].view(n_tokens, n_chosen, -1).sum(1).to(hidden_states.dtype)

    def _map(self, name: str, e: int, x: Tensor) -> Tensor:
        """One expert's projection; a plain one if it has no subnet."""
        unit = self.units.get(f"{name}.{e}")
        if unit is not None:
            return unit(x)  # type: ignore[no-any-return]
        experts: Any = self.plain[0]
        weight, bias = self._parameters[name], self._parameters.get(f"{name}_bias")
        assert weight is not None
        matrix = weight[e].t() if experts.is_transposed else weight[e]
        return F.linear(x, matrix, None if bias is None else bias[e])
