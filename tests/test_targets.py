"""Which linears are adapted, in which groups and how large: found by structure, or by name when asked."""

from __future__ import annotations

import pytest
import torch
import toys
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import losia_pro
from losia_pro import LosiaConfig, SubnetLinear
from losia_pro.discover import repeated_blocks


def attach(model, **settings):
    return losia_pro.attach(model, LosiaConfig(**{"rank_factor": 1 / 4, **settings}))


def groups(model, **settings):
    return attach(model, **settings).groups


def pair(i, where="layers"):
    return [f"{where}.{i}.up", f"{where}.{i}.down"]


class Holder(nn.Module):
    """Named children, in order."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Other(toys.Block):
    """Another class of block."""


def stack_of(*blocks):
    return nn.ModuleList(blocks)


def test_blocks_are_groups_in_their_own_order_not_the_alphabets():
    assert groups(toys.stack(n_blocks=12)) == [pair(i) for i in range(12)]


def test_what_stands_outside_the_blocks_is_left_alone():
    model = Holder(
        embed=nn.Linear(8, 16),
        blocks=stack_of(toys.Block(), toys.Block()),
        head=nn.Linear(16, 8),
    )
    assert groups(model) == [pair(0, "blocks"), pair(1, "blocks")]
    assert type(model.embed) is type(model.head) is nn.Linear
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"blocks.{i}.{n}.subnet" for i in range(2) for n in ("up", "down")
    ]


def test_both_towers_of_a_model_with_two_have_their_blocks():
    model = Holder(
        encoder=Holder(layers=stack_of(toys.Block(), toys.Block())),
        decoder=Holder(layers=nn.Sequential(toys.Block(), toys.Block(), toys.Block())),
    )
    assert groups(model) == [pair(i, "encoder.layers") for i in range(2)] + [
        pair(i, "decoder.layers") for i in range(3)
    ]


def test_only_the_outermost_repetition_counts():
    """Experts repeat inside each block; the block is the group."""

    def mixture():
        return Holder(router=nn.Linear(8, 4), experts=stack_of(toys.Block(), toys.Block()))

    model = Holder(layers=stack_of(mixture(), mixture()))
    assert repeated_blocks(model) == ["layers.0", "layers.1"]
    inner = ("router", *pair(0, "experts"), *pair(1, "experts"))
    assert groups(model) == [[f"layers.{i}.{n}" for n in inner] for i in range(2)]


def test_a_container_of_blocks_within_a_container_is_found():
    model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(toys.Block(), toys.Block()))
    assert groups(model) == [pair(0, "1"), pair(1, "1")]


def test_blocks_of_two_classes_are_blocks_alike():
    model = Holder(layers=stack_of(toys.Block(), Other(), toys.Block(), Other(), nn.ReLU()))
    assert groups(model) == [pair(i) for i in range(4)]


def test_without_repetition_each_linear_is_a_group():
    """A single block does not repeat, nor do linears in a row."""
    assert groups(Holder(layers=stack_of(toys.Block()))) == [[n] for n in pair(0)]
    assert groups(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))) == [["0"], ["1"]]


def test_a_single_blocks_model_keeps_its_head_frozen():
    model = toys.words(tied=True)
    del model.layers[1]
    head = model.lm_head
    assert groups(model) == [[n] for n in pair(0)]
    assert model.lm_head is head


PATTERNS = {
    "suffix": (["down"], [["layers.0.down"], ["layers.1.down"], ["layers.2.down"]]),
    "full name": (["layers.1.up"], [["layers.1.up"]]),
    "suffix of two parts": (["2.up"], [["layers.2.up"]]),
    "in the model's order": (["layers.2.up", "layers.0.down"], [["layers.0.down"], ["layers.2.up"]]),
    "some, and the head": (["up", "head"], [["layers.0.up"], ["layers.1.up"], ["layers.2.up"], ["head"]]),
    "matched twice": (["up", "layers.0.up"], [["layers.0.up"], ["layers.1.up"], ["layers.2.up"]]),
    "expression": (r".*\.[02]\.(up|down)", [pair(0), pair(2)]),
    "expression for one name": ("head", [["head"]]),
    "expression that also meets others": (r"layers\.1.*", [pair(1)]),
    "all-linear": ("all-linear", [pair(0), pair(1), pair(2)]),
}  # fmt: skip


@pytest.mark.parametrize(("patterns", "expected"), PATTERNS.values(), ids=PATTERNS)
def test_target_modules_are_names_suffixes_or_an_expression(patterns, expected):
    model = toys.stack()
    assert groups(model, target_modules=patterns) == expected
    adapted = [n for n, m in model.named_modules() if isinstance(m, SubnetLinear)]
    assert sorted(adapted) == sorted(sum(expected, []))


def test_linears_outside_of_blocks_follow_them_as_groups_of_their_own():
    model = Holder(
        first=nn.Linear(8, 16),
        layers=stack_of(toys.Block(), toys.Block()),
        second=nn.Linear(16, 8),
        head=nn.Linear(8, 8),
    )
    assert groups(model, target_modules="all-linear") == [pair(0), pair(1), ["first"], ["second"]]


@pytest.mark.parametrize("targets", [None, "all-linear", ["up", "head"], ["head"]], ids=str)
def test_a_trained_head_is_the_last_group_and_keeps_all_its_inputs(targets):
    model = toys.stack()
    losia = attach(model, target_modules=targets, output_factor=0.3)
    assert losia.groups[-1] == ["head"] and sum(g.count("head") for g in losia.groups) == 1
    head = losia.modules["head"]
    assert head.subnet.shape == (2, toys.IN)  # floor(8 * 0.3) outputs
    assert head.in_idx.tolist() == list(range(toys.IN))


def test_a_head_named_as_a_target_is_a_linear_like_others():
    losia = attach(toys.stack(), target_modules=["head"], output_factor=0.0)
    assert losia.modules["head"].subnet.shape == (2, 4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_own_word_on_its_head_comes_first(tied):
    model = toys.words(tied=tied)
    model.later = nn.Linear(16, 4)  # the last linear outside the blocks
    losia = attach(model, output_factor=1 / 2)
    assert losia.groups == [pair(0), pair(1), ["lm_head"]]
    assert type(model.later) is nn.Linear


def test_a_tied_head_moves_the_embedding_with_it():
    model = toys.words(tied=True)
    before = model.embed.weight.detach().clone()
    losia = attach(model, output_factor=1 / 4, period=2)
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.5)
    losia.bind(optimizer)
    rows = losia.modules["lm_head"].out_idx
    list(toys.train(model, optimizer, toys.texts(1)))
    assert model.embed.weight is model.lm_head.weight
    moved = (model.embed.weight != before).any(1).nonzero().flatten()
    assert torch.equal(moved, rows) and len(rows) == 8
    list(toys.train(model, optimizer, toys.texts(6)))
    assert [r.name for r in losia.history if r.group == 2] == ["lm_head"]
    assert losia.detach().embed.weight is model.lm_head.weight


class Special(nn.Linear):
    """Whatever a subclass does with its weight, a replacement would not know."""


@pytest.mark.filterwarnings("ignore:.*stay frozen")
def test_subclasses_of_linear_are_left_alone():
    block = Holder(up=nn.Linear(8, 8), odd=Special(8, 8))
    other = Holder(up=nn.Linear(8, 8), odd=Special(8, 8))
    model = Holder(layers=stack_of(block, other))
    assert groups(model) == [["layers.0.up"], ["layers.1.up"]]
    assert type(block.odd) is Special


@pytest.mark.parametrize("rest", [300, 500])
def test_blocks_whose_weights_are_mostly_of_other_kinds_are_adapted_with_a_warning(rest, recwarn):
    """A block of 16 x 24 weights twice has 768 + 24 + ``rest`` parameters and more in none of its linears."""
    model = toys.stack(n_blocks=2)
    for block in model.layers:
        block.experts = nn.Parameter(torch.zeros(2, rest, 1))
    attach(model)
    warned = [str(w.message) for w in recwarn.list if w.category is UserWarning]
    assert len(warned) == (rest == 500)
    if warned:
        assert "57% of the parameters in Stack's blocks" in warned[0]
        assert "layers.0.experts (2, 500, 1) is the largest" in warned[0]
        assert recwarn.list[0].filename == __file__


SHAPES = {
    "rank factor": ({}, (6, 4), (4, 6)),
    "floor": ({"rank_factor": 0.3}, (7, 4), (4, 7)),
    "in factor": ({"in_factor": 1 / 16}, (6, 1), (4, 1)),
    "out factor": ({"out_factor": 1.0}, (24, 4), (16, 6)),
    "both": ({"in_factor": 1 / 8, "out_factor": 0.5}, (12, 2), (8, 3)),
    "whole": ({"rank_factor": 1.0}, (24, 16), (16, 24)),
    "groups of 3": ({"rank_factor": 0.5, "neuron_group": 3}, (12, 6), (6, 12)),
    "a group that fits one side whole": ({"in_factor": 1.0, "out_factor": 0.5, "neuron_group": 4}, (12, 16), (8, 24)),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "up", "down"), SHAPES.values(), ids=SHAPES)
def test_factors_decide_the_size_and_exactly_those_entries_train(settings, up, down):
    """Before and after a move of every subnet, ``up`` being 24 x 16 and ``down`` 16 x 24."""
    model = toys.stack()
    losia = attach(model, **settings, period=1, schedule="sync", rewarm=False)
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.5)
    losia.bind(optimizer)
    for n, m in losia.modules.items():
        assert m.subnet.shape == (up if n.endswith("up") else down)
    for batch in toys.batches(3):
        before, where = toys.weights(losia), toys.places(losia)
        list(toys.train(model, optimizer, [batch]))
        for n, m in losia.modules.items():
            rows, columns = where[n]
            expected = torch.zeros_like(m.weight, dtype=torch.bool)
            expected[rows[:, None], columns] = True
            assert torch.equal(m.weight != before[n], expected), n
    assert len(losia.history) == 3 * len(losia.modules)


def shared_linear():
    linear = nn.Linear(16, 16)
    return linear, nn.Sequential(linear, nn.Tanh(), linear, nn.Tanh(), nn.Linear(16, 8))


@pytest.mark.parametrize("targets", [None, ["2", "4"], ["0", "4"], "[24]"], ids=str)
def test_a_shared_linear_is_adapted_once_wherever_it_stands(targets):
    linear, model = shared_linear()
    losia = attach(model, target_modules=targets, period=1)
    assert losia.groups == [["0"], ["4"]]
    assert model[0] is model[2] is losia.modules["0"]
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.1)
    losia.bind(optimizer)
    list(toys.train(model, optimizer, toys.batches(4)))
    assert [r.name for r in losia.history] == ["0", "4", "0", "4"]
    losia.detach()
    assert model[0] is model[2] is linear


def test_a_shared_linears_gradient_is_the_sum_over_its_uses():
    _, model = shared_linear()
    model.double()
    x, target = toys.batches(1, dtype=torch.float64)[0]
    nn.functional.mse_loss(model(x), target).backward()
    dense = model[0].weight.grad
    losia = attach(model)
    nn.functional.mse_loss(model(x), target).backward()
    m = losia.modules["0"]
    torch.testing.assert_close(m.subnet.grad, dense[m.out_idx][:, m.in_idx], rtol=1e-12, atol=1e-15)


def test_a_block_that_stands_twice_is_one_group():
    block = toys.Block()
    model = nn.Sequential(block, toys.Block(), block)
    assert groups(model) == [["0.up", "0.down"], ["1.up", "1.down"]]
    assert model[0] is model[2] is block and isinstance(block.up, SubnetLinear)


@pytest.mark.parametrize("what", ["model", "blocks"])
@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_what_is_compiled_or_wrapped_goes_by_its_plain_names(wrap, what, tmp_path):
    """So a delta of it is one of the plain model."""
    model, plain = toys.stack(), toys.stack()
    if what == "blocks":
        model.layers = stack_of(*map(wrap, model.layers))
    else:
        model = wrap(model)
    losia = attach(model, target_modules=r"layers\.[02]\..*")
    assert losia.groups == [pair(0), pair(2)]
    with torch.no_grad():
        losia.modules["layers.2.up"].subnet += 1
    losia.save_delta(tmp_path / "delta")
    losia_pro.load_delta(plain, tmp_path / "delta")
    tuned = losia.detach().get_submodule("layers.2.up").weight
    assert torch.equal(plain.layers[2].up.weight, tuned)
    assert groups(model) == [pair(i) for i in range(3)]


def test_a_block_that_has_another_name_first_is_a_block():
    model = toys.stack()
    model = Holder(first=model.layers[0], layers=model.layers, head=model.head)
    assert groups(model) == [["first.up", "first.down"], pair(1), pair(2)]
    assert type(model.head) is nn.Linear
