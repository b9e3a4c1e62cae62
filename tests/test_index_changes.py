"""Indices that change between forward and backward are refused in every mode; nothing else is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import losia_pro.guard
from losia_pro import SubnetLinear

MODES = ["plain", "offloaded", "non-reentrant", "reentrant", "nested reentrant"]
WIDTH = 12


def run(block: nn.Module, x: Tensor, mode: str) -> Tensor:
    if mode == "plain":
        return block(x)
    if mode == "offloaded":
        with torch.autograd.graph.save_on_cpu():
            return block(x)
    if mode == "nested reentrant":
        return checkpoint(lambda x: run(block, x, "reentrant"), x, use_reentrant=True)
    return checkpoint(block, x, use_reentrant=mode == "reentrant")


def in_thread(function: Callable[[], object]) -> None:
    """Run in a thread that has made no autograd node yet, as a GPU's backward does."""
    errors: list[BaseException] = []

    def target() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def here(function: Callable[[], object]) -> None:
    function()


@pytest.fixture
def layer() -> SubnetLinear:
    torch.manual_seed(0)
    for _ in range(100):  # this thread's nodes have higher numbers than those of threads to come
        torch.ones((), requires_grad=True).exp()
    return SubnetLinear(WIDTH, WIDTH, rank_factor=1 / 3)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, WIDTH, requires_grad=True)


def move(layer: SubnetLinear) -> None:
    """Another subnet of the same size."""
    out_idx, in_idx = (torch.randperm(WIDTH)[: WIDTH // 3].sort().values for _ in range(2))
    layer.select(out_idx, in_idx)


@pytest.mark.parametrize("forward_between", [False, True], ids=["", "forward between"])
@pytest.mark.parametrize("mode", MODES)
def test_indices_changed_after_the_forward_are_refused(layer, x, mode, forward_between):
    y = run(nn.Sequential(layer, nn.GELU()), x, mode)
    move(layer)
    if forward_between:
        run(layer, x, mode)
    with pytest.raises(RuntimeError, match=r"modified|indices changed"):
        y.sum().backward()
    assert layer.subnet.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_new_values_at_the_same_indices_are_refused_too(layer, x, mode):
    """``select`` also rereads the values, so what comes back would belong to other weights."""
    y = run(layer, x, mode)
    layer.select(layer.out_idx.clone(), layer.in_idx.clone())
    with pytest.raises(RuntimeError, match=r"modified|indices changed"):
        y.sum().backward()


@pytest.mark.parametrize("backward_in", [here, in_thread])
@pytest.mark.parametrize("forward_in", [here, in_thread])
@pytest.mark.parametrize("select_in", [here, in_thread])
@pytest.mark.parametrize("mode", MODES)
def test_training_that_selects_between_steps_is_never_refused(
    layer, x, mode, select_in, forward_in, backward_in
):
    other = SubnetLinear(WIDTH, WIDTH, rank_factor=1 / 3)
    block = nn.Sequential(layer, nn.GELU(), other)
    for _ in range(4):
        ys: list[Tensor] = []
        for _ in range(2):  # micro-batches
            forward_in(lambda: ys.append(run(block, x, mode)))  # noqa: B023
        for y in ys:
            backward_in(y.sum().backward)
        assert layer.subnet.grad is not None and layer.subnet.grad.any()
        layer.subnet.grad = None
        select_in(lambda: move(layer))
        select_in(lambda: move(other))


@pytest.mark.parametrize("mode", MODES)
def test_a_change_from_another_thread_is_refused(layer, x, mode):
    y = run(layer, x, mode)
    in_thread(lambda: move(layer))
    with pytest.raises(RuntimeError, match=r"modified|indices changed"):
        y.sum().backward()


def test_an_evaluation_between_forward_and_backward_is_allowed(layer, x):
    move(layer)
    y = run(layer, x, "reentrant")
    with torch.no_grad():
        layer(x)
    y.sum().backward()
    assert layer.subnet.grad is not None


def test_a_loaded_copy_starts_afresh(layer, x, tmp_path, monkeypatch):
    """Another process numbers its nodes from the start, and may name its thread as this one does."""
    monkeypatch.setattr(losia_pro.guard, "threading", SimpleNamespace(get_ident=lambda: 1))
    move(layer)
    torch.save(layer, tmp_path / "layer.pt")
    copy = torch.load(tmp_path / "layer.pt", weights_only=False)
    in_thread(lambda: run(copy, x, "reentrant").sum().backward())
    assert copy.subnet.grad is not None


@pytest.mark.parametrize("where", ["in a node", "after all nodes"])
def test_a_layer_called_in_a_backward_for_something_else_works(layer, x, where):
    """After the nodes, where a distributed wrapper's callbacks run, there is no node to compare with."""
    move(layer)
    seen: list[Tensor] = []

    def call(*_: object) -> None:
        with torch.no_grad():
            seen.append(layer(x))

    def queue(*_: object) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(call)

    y = layer(x)
    y.register_hook(call if where == "in a node" else queue)
    y.sum().backward()
    assert torch.equal(seen[0], y)
