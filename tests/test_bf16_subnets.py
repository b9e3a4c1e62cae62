"""Subnets in bf16: half the memory, and small updates still arrive, rewarmed ones too."""

from __future__ import annotations

import copy
import math

import pytest
import ranks
import torch
import toys
from bound import attached
from runs import STEPS, Run
from torch import nn

import losia_pro
from losia_pro import LosiaConfig, optim, rounding, torch_ops

BF16 = torch.bfloat16
CONFIG = LosiaConfig(
    rank_factor=1 / 4, period=3, output_factor=1 / 2, train_bias=True, subnet_dtype="bfloat16"
)
ONE_IN_A_BILLION = math.log(2e9)


def adamw(parameters):
    return optim.AdamW(parameters, lr=1e-2)


def run(seed=0, config=CONFIG, make=adamw):
    return Run(config, make=make, seed=seed)


def test_parameter_gradient_and_moments_take_8_bytes_an_entry():
    trained = run().bind().go(0, 1)
    for module in trained.losia.modules.values():
        state = trained.optimizer.state[module.subnet]
        kept = [module.subnet, module.subnet.grad, state["exp_avg"], state["exp_avg_sq"]]
        assert {t.dtype for t in kept} == {BF16}
        assert sum(t.nbytes for t in kept) == 8 * module.subnet.numel()


def test_dense_weights_hold_the_subnets_bit_for_bit():
    trained = run().bind()
    for k in range(STEPS):
        trained.go(k, k + 1)
        for m in trained.losia.modules.values():
            assert torch.equal(m.weight[m.out_idx][:, m.in_idx], m.subnet)
    assert {r.step for r in trained.losia.history} == {3, 6, 9, 12}


@pytest.mark.parametrize("stop", [0, 2, 3, 5, 10])
def test_resume_is_bitwise_equal(stop):
    """Into a run of another seed, the optimizer's too."""
    whole = run().bind().go(0, STEPS)
    saved = run().bind().go(0, stop).save()
    torch.manual_seed(stop)
    other = run(seed=1, make=lambda p: optim.AdamW(p, lr=1e-2, seed=7)).load(saved).bind()
    toys.equal_bits(other.go(stop, STEPS).end(), whole.end())


def test_the_delta_holds_the_run(tmp_path):
    trained = run().bind().go(0, STEPS)
    trained.losia.save_delta(tmp_path / "delta")
    base = toys.stack(BF16)
    losia_pro.load_delta(base, tmp_path / "delta")
    toys.equal_bits(base.state_dict(), trained.model.state_dict())


class Ones(nn.Module):
    """One linear of ones, the gradient of whose sum is 1 everywhere."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False, dtype=BF16)
        nn.init.ones_(self.linear.weight)

    def loss(self):
        return self.linear(torch.eye(self.linear.in_features, dtype=BF16)).sum()


def test_rewarmed_updates_arrive_on_the_mean():
    """Ten steps, a move in which every entry stays, and four steps at 0.1, 0.2, 0.3, 0.4 of the learning rate, which
    is half a unit: 11 learning rates. Rounded to nearest, the last four would not move anything."""
    unit, size, lr = 2**-8, 256, 2**-9
    model = Ones(size)
    losia = losia_pro.attach(
        model, LosiaConfig(rank_factor=1.0, period=10, subnet_dtype="bfloat16")
    )
    optimizer = optim.AdamW(losia.parameters(), lr=lr, betas=(0.0, 0.0), eps=0, weight_decay=0)
    losia.bind(optimizer)
    for _ in range(14):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
    # Azuma and Hoeffding: errors of 14 steps within one unit, and of the last four, interpolated, within one more
    drift = unit * math.sqrt((10 + 4 * 2**2) * ONE_IN_A_BILLION / (2 * size**2))
    off = abs(float(losia.modules["linear"].subnet.detach().double().mean()) - (1 - 11 * lr))
    assert off <= drift + 14 * 2**-25 and drift < lr / 4


@pytest.mark.parametrize("factor", [0.02, 0.5, 0.98])
def test_interpolation_is_exact_on_the_mean_and_at_rest(factor):
    n = 2**18
    new = [torch.full((n,), 1 + 2**-7, dtype=BF16), torch.full((4, 4), -3.0, dtype=BF16)]
    old = [torch.ones(n, dtype=BF16), torch.full((4, 4), -3.0, dtype=BF16)]
    torch_ops.lerp_(new, old, 1 - factor, rounding.key_of(1))
    off = abs(float(new[0].double().mean()) - (1 + factor * 2**-7))
    assert off <= 2**-7 * math.sqrt(ONE_IN_A_BILLION / (2 * n)) + 2**-24 < 0.02 * 2**-7 / 2
    assert bool((new[1] == -3).all())


def test_interpolation_gives_each_entry_of_each_tensor_bits_of_its_own():
    new = [torch.full((3, 1000), 1 + 2**-7, dtype=BF16) for _ in range(2)]
    old = [torch.ones_like(t) for t in new]
    torch_ops.lerp_(new, old, 0.5, rounding.key_of(1))
    rows = torch.cat(new).double()
    apart = torch.corrcoef(rows) - torch.eye(6)
    assert float(apart.abs().max()) <= 6 / math.sqrt(1000)


def test_interpolation_is_exact_at_both_ends():
    new = torch.randn(1000).to(BF16)
    old = torch.randn(1000).to(BF16) * 2**-20
    for weight, end in ((0.0, new), (1.0, old)):
        t = new.clone()
        torch_ops.lerp_([t], [old], weight, rounding.key_of(1))
        assert torch.equal(t, end)


def test_a_model_that_is_cast_is_rewarmed_in_its_own_dtype():
    trained = run().bind()
    trained.model.to(torch.float32)
    trained.data = [(x.float(), target) for x, target in trained.data]
    trained.go(0, 5)  # after the first move
    moved = {n for r in trained.losia.history for n in (r.name,)}
    assert moved
    for name in moved:
        subnet = trained.losia.modules[name].subnet.detach()
        assert subnet.dtype == torch.float32 and not torch.equal(subnet, subnet.to(BF16).float())


def test_training_comes_as_far_as_with_fp32_subnets():
    """200 small steps on one batch, some of which nearest loses."""
    losses = {}
    for name, subnet_dtype in (("fp32", None), ("stochastic", "bfloat16"), ("nearest", "bfloat16")):
        model = toys.stack(BF16)
        config = LosiaConfig(rank_factor=1 / 2, period=None, subnet_dtype=subnet_dtype)
        losia = losia_pro.attach(model, config)
        make = torch.optim.AdamW if name != "stochastic" else optim.AdamW
        optimizer = make(losia.parameters(), lr=1e-4, weight_decay=0.0)
        optimizer.bf16_stochastic_round = True  # let the third one through
        losia.bind(optimizer)
        x, target = toys.batches(1, size=64)[0]
        *_, losses[name] = toys.train(model, optimizer, [(x.to(BF16), target)] * 200)
    off, lost = (abs(losses[name] - losses["fp32"]) for name in ("stochastic", "nearest"))
    assert off < lost / 10


def one_rank():
    torch.manual_seed(ranks.rank_and_size()[0])  # the global generators differ
    data = [(x.to(BF16), target) for x, target in ranks.data(torch.float32)]
    return ranks.Run(CONFIG, make=adamw, dtype=BF16).bind().go(data).end()


def test_data_parallel_ranks_stay_bit_for_bit_the_same(tmp_path):
    first, second = ranks.launch(one_rank, 2, tmp_path)
    toys.equal_bits(first, second)
    assert {step for step, _ in first["steps"]} == {3, 6, 9, 12}


NEAREST = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("make", NEAREST.values(), ids=NEAREST)
def test_an_optimizer_that_rounds_to_nearest_is_refused(make):
    model = toys.stack(BF16)
    losia = losia_pro.attach(model, CONFIG)
    optimizer = make(losia.parameters(), lr=1e-2)
    message = (
        f"subnets are in bf16, e.g. .*{make.__name__} rounds to nearest.*use losia_pro.optim.AdamW"
    )
    with pytest.raises(ValueError, match=message):
        losia.bind(optimizer)
    optimizer.bf16_stochastic_round = True  # as torchao's say it
    losia.bind(optimizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_weights_of_another_dtype_are_refused_and_left_alone(dtype):
    model = toys.stack(dtype)
    before = copy.deepcopy(model.state_dict())
    message = f'"bfloat16" is for bf16 weights, and layers.0.up has {dtype}'
    with pytest.raises(ValueError, match=message):
        losia_pro.attach(model, CONFIG)
    toys.equal_bits(model.state_dict(), before)
    assert all(p.requires_grad for p in model.parameters())


def test_moving_keeps_what_stays_and_takes_the_rest_from_the_weight():
    trained = run().bind().go(0, 2)
    module = trained.losia.modules["layers.0.up"]
    weight = module.weight.detach().clone()
    g = torch.Generator().manual_seed(3)
    out_idx, in_idx = (
        torch.randperm(n, generator=g)[: len(idx)].sort().values
        for n, idx in zip(module.weight.shape, (module.out_idx, module.in_idx), strict=True)
    )
    module.select(out_idx, in_idx)
    assert module.subnet.dtype == BF16
    assert torch.equal(module.subnet, weight[out_idx][:, in_idx])
    assert torch.equal(module.weight, weight)


def test_a_model_that_is_cast_has_subnets_of_its_own_dtype():
    model, losia, _ = attached(CONFIG, BF16, optimizer=adamw)
    module = losia.modules["layers.0.up"]
    before = module.subnet.detach().clone()
    for dtype, subnet in (
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (BF16, BF16),
    ):
        model.to(dtype)
        assert module.subnet.dtype == subnet and torch.equal(module.subnet.to(BF16), before)


def test_a_state_of_the_other_kind_is_refused():
    saved = run().bind().go(0, 2).losia.state_dict()
    other = losia_pro.attach(
        toys.stack(BF16), LosiaConfig(**{**CONFIG.to_dict(), "subnet_dtype": None})
    )
    with pytest.raises(
        ValueError, match="saved with subnet_dtype='bfloat16', this run has subnet_dtype=None"
    ):
        other.load_state_dict(saved)


def test_a_state_from_before_there_was_a_choice_is_one_of_fp32():
    config = LosiaConfig(rank_factor=1 / 4, period=3)
    whole = Run(config).bind().go(0, 6)
    state = Run(config).bind().go(0, 4).losia.state_dict()
    del state["config"]["subnet_dtype"]
    losia = losia_pro.attach(toys.stack(BF16), config)
    losia.load_state_dict(state)
    assert losia.step == 4 and whole.losia.step == 6
