"""Parameters that are split otherwise than by FSDP2 are refused in a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import toys
from ranks import Sharded, data, launch, share
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import losia_pro


def parallel(model: nn.Module) -> nn.Module:
    plan = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def tensor_parallel() -> None:
    model = toys.stack()
    losia = losia_pro.attach(model)
    parallel(model)
    losia.bind(torch.optim.AdamW(losia.parameters()))


def a_forward_of_tensor_parallel() -> None:
    model = toys.stack()
    losia_pro.attach(model)
    parallel(model)(data()[0][0].float())


def attach_after_tensor_parallel() -> None:
    losia_pro.attach(parallel(toys.stack()))


def attach_after_fully_shard() -> None:
    losia_pro.attach(fully_shard(toys.stack()))


def fsdp_on_top_of_tensor_parallel() -> None:
    model = toys.stack()
    losia = losia_pro.attach(model)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    parallelize_module(model, mesh["model"], {"layers.*.up": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    losia.bind(torch.optim.AdamW(losia.parameters()))


def another_dimension() -> None:
    Sharded(shard_placement_fn=lambda p: Shard(p.dim() - 1)).bind()


def a_part_of_the_processes() -> None:
    model = toys.stack()
    losia = losia_pro.attach(model)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh["shard"])
    losia.bind(torch.optim.AdamW(losia.parameters()))


def trained_biases_of_another_dtype() -> None:
    Sharded(dtype=torch.bfloat16).bind()


def an_optimizer_from_before() -> None:
    model = toys.stack()
    losia = losia_pro.attach(model)
    optimizer = torch.optim.AdamW(losia.parameters())
    fully_shard(model)
    losia.bind(optimizer)


def bound_before() -> None:
    model = toys.stack()
    losia = losia_pro.attach(model)
    optimizer = torch.optim.AdamW(losia.parameters())
    losia.bind(optimizer)
    fully_shard(model)
    toys.loss_of(model, share(data(torch.float32)[0])).backward()
    optimizer.step()


CASES: dict[Callable[[], None], str] = {
    tensor_parallel: r"TypeError: layers.0.up: tensor parallelism is not supported; .*fully_shard",
    a_forward_of_tensor_parallel: r"TypeError: tensor parallelism is not supported; .*fully_shard",
    attach_after_tensor_parallel: r"ValueError: layers.0.up is sharded already: .* not supported",
    attach_after_fully_shard: r"ValueError: layers.0.up is sharded already: attach\(\) comes first",
    fsdp_on_top_of_tensor_parallel: r"TypeError: layers.0.up is placed as .* without tensor parallelism",
    another_dimension: r"TypeError: layers.0.up is placed as .*without a shard_placement_fn",
    a_part_of_the_processes: r"ValueError: layers.0.up is on a mesh of 1 processes, but 2 train",
    trained_biases_of_another_dtype: r"TypeError: layers.0.up trains .*bfloat16 and .*train_bias=False",
    an_optimizer_from_before: r"ValueError: the optimizer lacks 6 of 6 .* after fully_shard\(\)",
    bound_before: r"ValueError: the optimizer lacks 6 of 6 .* after fully_shard\(\)",
}


def all_cases() -> dict[str, str]:
    """The error that each case ends with."""
    errors = {}
    for case in CASES:
        try:
            case()
            errors[case.__name__] = "no error"
        except (TypeError, ValueError) as error:
            errors[case.__name__] = f"{type(error).__name__}: {error}"
    return errors


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    return launch(all_cases, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES, ids=[c.__name__ for c in CASES])
def test_it_is_said_in_a_sentence(errors, case):
    for rank in errors:
        assert re.search(CASES[case], rank[case.__name__]), rank[case.__name__]


def test_weights_that_an_engine_keeps_in_pieces_are_refused():
    """FullyShardedDataParallel needs an accelerator, DeepSpeed to be installed: what they leave of a weight."""
    model = toys.stack()
    losia = losia_pro.attach(model)
    late = toys.stack()
    for down in (losia.modules["layers.1.down"], late.layers[1].down):
        down.weight.data = down.weight.data.flatten()[: down.weight.numel() // 2]
    said = r"layers.1.down.weight is \(192,\), not \(16, 24\): .*"
    with pytest.raises(TypeError, match=said + "ZeRO-3"):
        losia.bind(torch.optim.AdamW(losia.parameters()))
    with pytest.raises(ValueError, match=said + "takes whole weights; .*ZeRO-3"):
        losia_pro.attach(late)


def test_an_engines_own_optimizer_is_refused():
    """DeepSpeed's ZeRO has an optimizer that is none of torch.optim, and gives the user's other parameters."""

    class DeepSpeedZeroOptimizer:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    losia = losia_pro.attach(toys.stack())
    inner = torch.optim.AdamW(losia.parameters())
    engine = DeepSpeedZeroOptimizer(inner)
    with pytest.raises(TypeError, match="got DeepSpeedZeroOptimizer; .* use DistributedDataPar"):
        losia.bind(engine)
    inner.param_groups[0]["params"] = [torch.zeros(9, requires_grad=True)]
    with pytest.raises(ValueError, match=r"lacks 6 of 6 subnets.*DeepSpeed's ZeRO, which puts"):
        losia.bind(inner)
