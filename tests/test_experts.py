"""Mixtures of experts whose weights are stacked in one parameter: a subnet in each expert, and idle experts."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from mixtures import (
    EXPERTS,
    HIDDEN,
    KINDS,
    WIDE,
    Mixture,
    Routed,
    X,
    experts_of,
    gpt_oss_experts,
    loss_of,
    mixtral_experts,
    transformers,
)
from ranks import Run, data, launch

import losia_pro
from losia_pro import LosiaConfig, reference
from losia_pro.kinds import find_linear, stand_in, views_of
from losia_pro.views import SubnetView

kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@kinds
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_with_subnets_compute_what_each_implementation_of_the_plain_ones_does(
    make, implementation
):
    layer = experts_of(make, torch.float32)
    layer.config._experts_implementation = implementation
    model, x = Mixture(layer), X.float()
    y = model(x)
    made = {k: SubnetView.from_linear(v) for k, v in views_of(layer).items()}
    model.layers[0]["experts"] = stand_in(layer, made)
    torch.testing.assert_close(model(x), y)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)


def test_a_norm_after_each_expert_is_applied():
    module = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark")
    config = transformers.MuseSparkTextConfig()
    config.moe_hidden_size, config.moe_intermediate_size = HIDDEN, WIDE
    config.num_local_experts = EXPERTS
    config._experts_implementation = "eager"
    model = Mixture(experts_of(lambda: module.MuseSparkExperts(config)))
    y = model(X)
    losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4))
    torch.testing.assert_close(model(X), y, rtol=1e-9, atol=1e-12)


def test_the_output_has_the_tokens_dtype_whatever_the_shares_have():
    plain = Mixture(experts_of(mixtral_experts, torch.bfloat16))
    x = X.bfloat16()
    for model in (plain, losia_pro.attach(copy.deepcopy(plain)).model):
        y = model.layers[0]["experts"](x, model.chosen, model.shares.float())
        assert y.dtype == torch.bfloat16


def dense_grads(plain, names):
    """Each expert's full gradient and weight, ``(out, in)``, from a plain backward."""
    plain.zero_grad()
    loss_of(plain).backward()
    found = {}
    for name in names:
        view = find_linear(plain, name)
        grad = view.stored.grad[view.index]
        found[name] = grad.t() if view.transposed else grad, view.weight.detach()
    return found


@kinds
def test_each_experts_gradient_is_its_part_of_the_full_one_and_zero_if_it_was_idle(make):
    plain = Mixture(experts_of(make))
    model = copy.deepcopy(plain)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4))
    loss_of(model).backward()
    assert len(losia.modules) == 2 * EXPERTS
    for name, (grad, _) in dense_grads(plain, losia.modules).items():
        m = losia.modules[name]
        expected = grad[m.out_idx][:, m.in_idx]
        torch.testing.assert_close(m.subnet.grad, expected, rtol=1e-10, atol=1e-14)
        assert bool(m.subnet.grad.any()) == (not name.endswith(".1")), name


@kinds
def test_each_expert_moves_by_its_own_importance_and_an_idle_one_stays(make):
    plain = Mixture(experts_of(make))
    model = copy.deepcopy(plain)
    config = LosiaConfig(rank_factor=1 / 4, period=2, schedule="sync")
    losia = losia_pro.attach(model, config)
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.0)
    losia.bind(optimizer)
    before = toys.indices(losia)

    loss_of(model).backward()
    optimizer.step()
    for name, (grad, weight) in dense_grads(plain, losia.modules).items():
        expected = (1 - config.beta1) * reference.importance(grad, weight)
        found = losia.modules[name].profile.importance
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)

    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    assert len(losia.history) == 2 * EXPERTS
    for r in losia.history:
        idle = r.name.endswith(".1")
        assert (toys.indices(losia)[r.name] == before[r.name]) == idle, r.name
        assert (r.score_kept == 0) == idle


TARGETS = {
    "the layer": (["experts"], 2 * EXPERTS),
    "one of its parameters": (["down_proj"], EXPERTS),
    "one expert": (["experts.down_proj.3"], 1),
    "an expression": (r".*up_proj\.[02]", 2),
}  # fmt: skip


@pytest.mark.parametrize("make", [mixtral_experts, gpt_oss_experts], ids=["", "biased"])
@pytest.mark.parametrize(("patterns", "number"), TARGETS.values(), ids=TARGETS)
def test_experts_can_be_targeted_together_or_one_by_one(patterns, number, make):
    plain = Mixture(experts_of(make))
    model = copy.deepcopy(plain)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, target_modules=patterns))
    assert len(losia.modules) == number
    torch.testing.assert_close(model(X), plain(X), rtol=1e-12, atol=1e-14)


def test_biases_of_experts_are_not_trained_and_say_so():
    model = Mixture(experts_of(gpt_oss_experts))
    before = toys.snapshot(model)
    with pytest.raises(
        ValueError, match="train_bias=True: the bias of layers.0.experts.gate_up_proj.0"
    ):
        losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, train_bias=True))
    toys.assert_same(before, toys.snapshot(model))


def trained(model, steps=5, **settings):
    config = LosiaConfig(**{"rank_factor": 1 / 4, "period": 1, **settings})
    losia = losia_pro.attach(model, config)
    optimizer = torch.optim.AdamW(losia.parameters(), lr=1e-2)
    losia.bind(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(losia.model).backward()
        optimizer.step()
    return losia, optimizer


@kinds
def test_base_values_deltas_and_detaching_are_exact(make, tmp_path):
    plain = Mixture(experts_of(make))
    losia, _ = trained(copy.deepcopy(plain))
    tuned = copy.deepcopy(losia.model.state_dict())
    assert tuned.keys() == plain.state_dict().keys()
    with losia.base():
        toys.equal_bits(losia.model.state_dict(), plain.state_dict())
    toys.equal_bits(losia.model.state_dict(), tuned)
    losia.save_delta(tmp_path / "delta")

    delta = losia_pro.Delta(tmp_path / "delta")
    toys.equal_bits(delta.apply(copy.deepcopy(plain)).state_dict(), tuned)
    again = losia_pro.attach(copy.deepcopy(plain), LosiaConfig(rank_factor=1 / 4))
    losia_pro.load_delta(again.model, tmp_path / "delta")
    toys.equal_bits(again.model.state_dict(), tuned)
    again.save_delta(tmp_path / "again")
    toys.equal_bits(losia_pro.load_delta(plain, tmp_path / "again").state_dict(), tuned)
    toys.equal_bits(losia.detach().state_dict(), tuned)
    assert type(losia.model.layers[0]["experts"]) is type(plain.layers[0]["experts"])


def test_resume_is_bitwise_equal():
    plain = Mixture(experts_of(gpt_oss_experts))
    losia, optimizer = trained(copy.deepcopy(plain))
    states = [copy.deepcopy(x.state_dict()) for x in (losia.model, losia, optimizer)]
    other, optimizer_2 = trained(copy.deepcopy(plain), steps=0)
    for x, state in zip((other.model, other, optimizer_2), states, strict=True):
        x.load_state_dict(state)
    for run, opt in ((losia, optimizer), (other, optimizer_2)):
        for _ in range(3):
            opt.zero_grad()
            loss_of(run.model).backward()
            opt.step()
    toys.equal_bits(other.model.state_dict(), losia.model.state_dict())
    toys.equal_bits(other.state_dict()["modules"], losia.state_dict()["modules"])


def test_converting_the_layers_dtype_leaves_the_subnets_as_they_were():
    """In the compact dtype, and each expert goes on writing into the parameter that there is then."""
    losia, _ = trained(Mixture(experts_of(mixtral_experts, torch.float32)), steps=0, period=None)
    before = {n: m.subnet.detach().clone() for n, m in losia.modules.items()}
    for dtype, compact in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        losia.model.to(dtype)
        for n, m in losia.modules.items():
            assert m.weight.dtype == dtype and m.subnet.dtype == compact
            assert torch.equal(m.subnet, before[n].to(compact))
    for m in losia.modules.values():
        with torch.no_grad():
            m.subnet.fill_(3.0)
    losia.write_back()
    layer = losia.detach().layers[0]["experts"]
    for p in layer.parameters():
        assert p.dtype == torch.float64 and bool((p == 3).flatten(1).any(1).all())


def test_detaching_keeps_parameters_and_mode_that_were_set_while_attached():
    plain = Mixture(experts_of(mixtral_experts)).eval()
    layer, other = plain.layers[0]["experts"], copy.deepcopy(plain)
    state = {n: t + 1 for n, t in other.state_dict().items()}
    losia = losia_pro.attach(plain, LosiaConfig(rank_factor=1 / 4))
    assert not losia.model.layers[0]["experts"].training
    losia.model.train()
    losia.model.load_state_dict(state, assign=True)
    model = losia.detach()
    assert model.layers[0]["experts"] is layer and layer.training and layer.act_fn.training
    toys.equal_bits(model.state_dict(), state)


def test_a_copy_of_an_attached_model_trains_by_itself():
    losia, _ = trained(Mixture(experts_of(mixtral_experts)))
    twin = copy.deepcopy(losia)
    state = copy.deepcopy(losia.model.state_dict())
    for m in twin.modules.values():
        with torch.no_grad():
            m.subnet.add_(1.0)
    twin.write_back()
    toys.equal_bits(losia.model.state_dict(), state)
    y = twin.model(X)
    assert not torch.equal(y, losia.model(X))
    torch.testing.assert_close(twin.detach()(X), y, rtol=1e-12, atol=1e-14)


def mixture_by_ranks():
    """An ordinary loop of each process over its part of the batches; some experts get nothing in some of them."""
    model = Routed()
    run = Run(LosiaConfig(rank_factor=1 / 4, period=3), model=model).bind().go(data())
    return {**run.end(), "least": model.least}


def test_ranks_train_experts_as_one_process_does_on_the_whole_batch(tmp_path):
    alone = mixture_by_ranks()
    ends = launch(mixture_by_ranks, 2, tmp_path)
    assert min(end["least"] for end in ends) == 0
    for end in ends:
        assert end["places"] == alone["places"] and end["steps"] == alone["steps"] != []
        torch.testing.assert_close(end["model"], alone["model"], rtol=1e-9, atol=1e-11)
        toys.equal_bits(end["model"], ends[0]["model"])


def test_attention_shares_its_inputs_and_experts_have_their_own():
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, share_inputs=True))
    shared = [names for names in losia.sets if len(names) > 1]
    attention = [f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"]
    assert shared == [[n.format(i) for n in attention] for i in range(2)]
    assert sum("experts" in n for n in losia.modules) == 2 * 2 * 3
