"""Activation checkpointing: equal gradients, and no product recomputed for nothing."""

from __future__ import annotations

import pytest
import torch
from operators import Operators
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from losia_pro import SubnetLinear, dispatch, torch_ops


class _CountProducts(TorchDispatchMode):
    """Counts the matrix products whose result has the given number of columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.count = columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.count += out.shape[-1] == self.columns
        return out


def _run(last: nn.Module, use_reentrant: bool | None) -> tuple[list[Tensor], int]:
    torch.manual_seed(0)
    first = nn.Linear(12, 16).requires_grad_(False)
    block = nn.Sequential(first, nn.GELU(), last)
    x = torch.randn(6, 12, requires_grad=True)
    with _CountProducts(columns=40) as products:  # only `last` has 40 outputs
        y = block(x) if use_reentrant is None else checkpoint(block, x, use_reentrant=use_reentrant)
        y.square().sum().backward()
    grads = [x.grad, *(p.grad for p in last.parameters() if p.requires_grad)]
    return grads, products.count  # type: ignore[return-value]


def _subnet_linear() -> SubnetLinear:
    torch.manual_seed(1)
    return SubnetLinear(16, 40, rank_factor=1 / 4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing_equal_those_without(use_reentrant: bool) -> None:
    want, _ = _run(_subnet_linear(), None)
    got, _ = _run(_subnet_linear(), use_reentrant)
    assert len(got) == 2
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_last_product_of_a_block_is_not_recomputed() -> None:
    frozen = nn.Linear(16, 40).requires_grad_(False)
    _, floor = _run(frozen, False)
    _, ours = _run(_subnet_linear(), False)
    assert floor == 1  # the forward's own
    assert ours == floor


def test_columns_are_gathered_in_the_recomputation_alone() -> None:
    layer, x = _subnet_linear(), torch.randn(6, 16, requires_grad=True)
    with Operators() as watching:  # a dispatch mode could keep what a gather returns
        checkpoint(layer, x, use_reentrant=False)
    assert watching.count("losia_pro::gather_columns") == 1
    shapes: list[torch.Size] = []

    def gathered(*args: object, **kwargs: object) -> Tensor:
        result: Tensor = gather(*args, **kwargs)
        shapes.append(result.shape)
        return result

    gather = torch_ops.gather_columns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_ops, "gather_columns", gathered)
        dispatch._chosen.cache_clear()
        y = checkpoint(layer, x, use_reentrant=False)
        assert shapes == []
        y.square().sum().backward()
        assert shapes == [(6, 4)]
    dispatch._chosen.cache_clear()


@pytest.mark.parametrize("keep", ["gather_columns", "addmm"])
def test_selective_checkpointing_gives_equal_gradients(keep: str) -> None:
    def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        kept = keep in str(op)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    grads = []
    for contexts in (None, lambda: create_selective_checkpoint_contexts(policy)):
        layer, x = _subnet_linear(), torch.linspace(-1, 1, 96).view(6, 16).requires_grad_()
        options = {} if contexts is None else {"context_fn": contexts}
        checkpoint(layer, x, use_reentrant=False, **options).square().sum().backward()
        grads.append((x.grad, layer.subnet.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_selecting_between_forward_and_checkpointed_backward_raises() -> None:
    layer = _subnet_linear()
    x = torch.randn(6, 16, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    layer.select(torch.arange(10), torch.arange(4))
    layer(x)  # another forward in between does not hide it
    with pytest.raises(RuntimeError, match="between forward and backward"):
        y.sum().backward()


def test_offloaded_activations_give_equal_gradients() -> None:
    want, _ = _run(_subnet_linear(), None)
    with torch.autograd.graph.save_on_cpu():
        got, _ = _run(_subnet_linear(), None)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
