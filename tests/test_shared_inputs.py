"""One ``X_S`` for linears that read the same input: found by watching, gathered once, moved together."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
import toys
from operators import Operators
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import losia_pro
from losia_pro import LosiaConfig, SubnetLinear
from losia_pro.selection import select_together

WIDTH, HIDDEN = 16, 24


class Gated(nn.Module):
    """Two linears on one input, and one on another."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        h = F.layer_norm(x, (WIDTH,))
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self, n_blocks: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Gated() for _ in range(n_blocks))
        self.head = nn.Linear(WIDTH, toys.OUT)
        self.checkpoints: bool | None = None  # None: no checkpointing; else use_reentrant

    def forward(self, x):
        for layer in self.layers:
            if self.checkpoints is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.checkpoints)
        return self.head(x)


EXAMPLE = (torch.zeros(1, WIDTH),)
CONFIG = LosiaConfig(rank_factor=1 / 4, period=3, share_inputs=True)


def attached(config=CONFIG, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Model()
    return model, losia_pro.attach(model, config, example=EXAMPLE)


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_they_are_found_in_a_language_model_without_an_example():
    model = tiny_llama()
    before = toys.snapshot(model)
    losia = losia_pro.attach(model, CONFIG)
    shared = [s for s in losia.sets if len(s) > 1]
    layer = "model.layers.{}."
    assert shared == [
        names
        for i in range(2)
        for names in (
            [f"{layer.format(i)}self_attn.{p}_proj" for p in "qkv"],
            [f"{layer.format(i)}mlp.{p}_proj" for p in ("gate", "up")],
        )
    ]
    assert sorted(n for names in losia.sets for n in names) == sorted(losia.modules)
    toys.assert_same(before, toys.snapshot(losia.detach()))


def test_an_example_may_be_what_a_tokenizer_returns():
    from transformers import BatchEncoding

    example = BatchEncoding({"input_ids": torch.tensor([[1, 2, 3]])})  # a mapping, but no dict
    losia = losia_pro.attach(tiny_llama(), CONFIG, example=example)
    assert sum(len(names) > 1 for names in losia.sets) == 4  # q, k, v and gate, up of two layers


def test_linears_called_by_keyword_are_watched_too():
    class Named(Gated):
        def forward(self, x):
            return x + self.down(self.gate(input=x) * self.up(input=x))

    losia = losia_pro.attach(nn.Sequential(Named(), Named()), CONFIG, example=EXAMPLE)
    assert losia.sets[:2] == [["0.gate", "0.up"], ["1.gate", "1.up"]]


def test_a_model_without_example_inputs_asks_for_some_and_is_left_alone():
    model = Model()
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match=r"Model has no dummy_inputs.*example"):
        losia_pro.attach(model, CONFIG)
    with pytest.raises(ValueError, match="does not run on its example inputs"):
        losia_pro.attach(model, CONFIG, example=(torch.zeros(1, 3),))
    toys.assert_same(before, toys.snapshot(model))


def test_a_linear_that_is_called_twice_shares_nothing():
    class Twice(Gated):
        def forward(self, x):
            return self.down(self.gate(x) + self.up(x)) + self.down(self.gate(x.sin()))

    model = nn.Sequential(Twice(), Twice())
    losia = losia_pro.attach(model, CONFIG, example=EXAMPLE)
    assert all(len(names) == 1 for names in losia.sets)


def test_compiled_blocks_are_not_compiled_anew_to_be_watched():
    """The hooks are another graph for each linear: past PyTorch's limit of them, blocks run uncompiled for good."""
    torch._dynamo.reset()
    counters.clear()
    calls = []

    def backend(graph, _):
        return lambda *inputs: calls.append(graph) or graph(*inputs)

    blocks = torch._dynamo.config.recompile_limit + 2
    model = Model(blocks)
    for layer in model.layers:
        layer.compile(backend=backend)
    batch = toys.batches(1, width=WIDTH)[0]
    toys.loss_of(model, batch).backward()
    assert len(calls) == blocks
    losia = losia_pro.attach(model, CONFIG, example=EXAMPLE)
    optimizer = torch.optim.AdamW(losia.parameters(), lr=1e-2)
    losia.bind(optimizer)
    calls.clear()
    list(toys.train(model, optimizer, [batch]))
    assert len(calls) == blocks and not counters["graph_break"]
    torch._dynamo.reset()


def test_it_is_off_by_default_and_the_first_subnets_are_shared_when_on():
    _, plain = attached(LosiaConfig(rank_factor=1 / 4))
    assert all(len(names) == 1 for names in plain.sets)
    _, losia = attached()
    for layer in range(3):
        gate, up = (losia.modules[f"layers.{layer}.{n}"] for n in ("gate", "up"))
        assert gate.in_idx is up.in_idx and not torch.equal(gate.out_idx, up.out_idx)


def test_each_gradient_is_the_dense_ones_slice_from_one_gather_for_all():
    model, losia = attached()
    plain = copy.deepcopy(losia_pro.attach(Model(), LosiaConfig()).detach())
    plain.load_state_dict(model.state_dict())
    batch = toys.batches(1, width=WIDTH)[0]
    with Operators() as ops:
        toys.loss_of(model, batch).backward()
    assert ops.count("losia_pro::gather_columns") == 3 * 2
    assert ops.count("losia_pro::subnet_grad") == 3 * 3
    plain.requires_grad_(True)
    toys.loss_of(plain, batch).backward()
    for name, module in losia.modules.items():
        dense = plain.get_submodule(name).weight.grad[module.out_idx][:, module.in_idx]
        torch.testing.assert_close(module.subnet.grad, dense, rtol=1e-5, atol=1e-7)


def test_the_columns_are_kept_once_and_no_longer_than_their_input():
    model, losia = attached()
    kept = []
    layer = model.layers[0]
    h = torch.randn(5, WIDTH)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer.gate(h) + layer.up(h)
    columns = [t for t in kept if t.shape == (5, layer.gate.in_idx.numel())]
    assert len(columns) == 2 and columns[0] is columns[1]
    assert layer.gate.shared._kept[-1] is columns[0]
    kept.clear()
    del columns, y, h
    assert layer.gate.shared._kept is None


def test_an_input_that_changed_in_place_is_gathered_anew():
    model, _ = attached()
    layer = model.layers[0]
    h = torch.randn(5, WIDTH)
    layer.gate(h).sum().backward()
    h.mul_(2)
    dy = torch.randn(5, HIDDEN)
    layer.up(h).backward(dy)
    up = layer.up
    truth = dy[:, up.out_idx].T @ h[:, up.in_idx]
    torch.testing.assert_close(up.subnet.grad, truth)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_checkpointing_equal_those_without(use_reentrant):
    batch = toys.batches(1, width=WIDTH)[0]
    batch = batch[0].requires_grad_(), batch[1]
    grads = []
    for checkpoints in (None, use_reentrant):
        model, losia = attached()
        model.checkpoints = checkpoints
        toys.loss_of(model, batch).backward()
        grads.append({n: m.subnet.grad for n, m in losia.modules.items()})
    toys.equal_bits(*grads)


def test_compiled_gathers_of_one_graph_are_one():
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    model, losia = attached()
    graphs = []

    def count(graph, _):
        graphs.append(sum("index_select" in str(n.target) for n in graph.graph.nodes))
        return make_boxed_func(graph)

    backend = aot_autograd(  # with the partitioner that Inductor uses
        fw_compiler=count,
        bw_compiler=count,
        partition_fn=min_cut_rematerialization_partition,
    )
    compiled = torch.compile(model.layers[0], fullgraph=True, backend=backend)
    x = torch.randn(5, WIDTH, requires_grad=True)
    compiled(x).sum().backward()
    assert graphs[0] == 2
    ours = {n: m.subnet.grad for n, m in losia.modules.items() if n.startswith("layers.0")}
    model.zero_grad()
    model.layers[0](x).sum().backward()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, losia.modules[name].subnet.grad)


def test_they_move_together_and_a_resumed_run_is_bitwise_the_whole_one():
    def go(model, losia, optimizer, data):
        losia.bind(optimizer)
        list(toys.train(model, optimizer, data))

    def start(seed=0):
        model, losia = attached(seed=seed)
        return model, losia, torch.optim.AdamW(losia.parameters(), lr=1e-2)

    data = toys.batches(12, width=WIDTH)
    whole = start()
    go(*whole, data)
    moved = {r.step for r in whole[1].history}
    assert moved == {3, 6, 9, 12}
    for names in whole[1].sets:
        first, *others = (whole[1].modules[n] for n in names)
        assert all(torch.equal(first.in_idx, m.in_idx) for m in others)
    half = start()
    go(*half, data[:7])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in half], file)
    file.seek(0)
    resumed = start(seed=1)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go(*resumed, data[7:])
    toys.equal_bits([p.state_dict() for p in resumed], [p.state_dict() for p in whole])


def test_an_unshared_runs_state_is_refused():
    _, losia = attached()
    _, plain = attached(LosiaConfig(rank_factor=1 / 4, period=3))
    with pytest.raises(ValueError, match="share_inputs"):
        losia.load_state_dict(plain.state_dict())


def test_one_alone_cannot_be_moved_to_other_inputs():
    _, losia = attached()
    gate, up = losia.modules["layers.0.gate"], losia.modules["layers.0.up"]
    other = (gate.in_idx + 1) % WIDTH
    before = toys.places(losia)
    with pytest.raises(ValueError, match="shared with other linears"):
        gate.select(gate.out_idx, other)
    with pytest.raises(ValueError, match="in_idx must be on cpu, got meta"):
        gate.select(gate.out_idx, other.to("meta"))
    toys.equal_bits(before, toys.places(losia))
    gate.subnet.data += 1
    exact = gate.subnet.detach().clone()
    gate.select(gate.out_idx.flip(0), gate.in_idx.clone())  # the same places
    assert torch.equal(gate.subnet, exact)
    select_together([gate, up], [gate.out_idx, up.out_idx], other)
    assert gate.in_idx is up.in_idx and gate.in_idx.tolist() == sorted(other.tolist())
    for m in (gate, up):
        assert torch.equal(m.subnet, m.weight[m.out_idx][:, m.in_idx])


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, lambda m: m.double(), lambda m: m.to_empty(device="cpu")],
    ids=["deepcopy", "double", "to_empty"],
)
def test_they_stay_shared_when_the_model_is_copied_or_converted(change):
    model, _ = attached()
    layer = change(model).layers[0]
    assert isinstance(layer.gate, SubnetLinear)
    assert layer.gate.shared is layer.up.shared and layer.gate.in_idx is layer.up.in_idx
    assert layer.gate.shared.in_idx is layer.gate.in_idx
