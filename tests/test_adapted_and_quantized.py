"""Models that others have changed already: adapters or packed weights in them are refused, by name."""

from __future__ import annotations

import pytest
import torch
import toys
from torch import nn

import losia_pro

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


class Packed(torch.Tensor):
    """A weight that is held as integers and a scale and says that it is fp32, as torchao's are."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(func)


class EightBit(nn.Linear):
    """A linear of a class of its own with integers for weights, as bitsandbytes' are."""


def packed():
    model = toys.stack()
    weight = Packed(torch.ones(toys.HIDDEN, toys.IN, dtype=torch.int8), torch.ones(()))
    model.layers[1].up.weight = nn.Parameter(weight, requires_grad=False)
    return model


def eight_bit():
    model = toys.stack()
    layer = EightBit(toys.IN, toys.HIDDEN)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    model.layers[1].up = layer
    return model


def tiny_llama():
    return transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    )  # fmt: skip


def quantized_llama():
    """What transformers leaves on a model that it has quantized while loading."""
    model = tiny_llama()
    model.is_quantized = True
    model.config.quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return nn.Sequential(model)


def split_experts():
    """What transformers sets where other processes hold the other experts."""
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    return model


def with_adapter(**settings):
    def make():
        config = peft.LoraConfig(r=2, **settings)
        return peft.get_peft_model(tiny_llama(), config)

    return make


REFUSED = {
    "tensor subclass": (packed, r"layers.1.up \(Linear\) has quantized weights \(Packed, torch.float32\)"),
    "integers": (eight_bit, r"layers.1.up \(EightBit\) has quantized weights \(Parameter, torch.int8\)"),
    "transformers": (quantized_llama, r"LlamaForCausalLM is quantized \(bitsandbytes\)"),
    "expert parallel": (split_experts, r"layers.1.mlp.experts holds a part of the experts"),
    "lora": (
        with_adapter(target_modules=["down_proj"]),
        r"layers.0.mlp.down_proj carries a PEFT adapter \(lora.Linear\).*merge_and_unload",
    ),
    "lora in a parameter": (
        with_adapter(target_modules=[], target_parameters=["up_proj.weight"]),
        r"up_proj carries a PEFT adapter \(lora.ParamWrapper\)",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_by_name(make, message):
    model = make()
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        losia_pro.attach(model)
    assert [type(m) for m in model.modules()] == types


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_model_whose_adapter_was_merged_is_as_any():
    model = with_adapter(target_modules=["down_proj"])().merge_and_unload()
    assert len(losia_pro.attach(model).modules) == 2 * 7
