"""Training compact subnets is masked dense training: same subnets, same weights, for any optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from torch import nn

import losia_pro
from losia_pro import LosiaConfig, reference

LR, STEPS = 1e-2, 60

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR),
    "sgd-momentum-decay": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1, fused=True),
}


def side_by_side(model, config, make, steps, data, *, follow=False):
    """Train an attached model and the oracle on a plain copy; yields both after every step."""
    plain = copy.deepcopy(model)
    losia = losia_pro.attach(model, config)
    optimizer = make(losia.parameters())
    losia.bind(optimizer)
    oracle = toys.Oracle(
        plain, losia.groups, toys.places(losia), make, config,
        follow=(lambda n: toys.places(losia)[n]) if follow else None,
    )  # fmt: skip
    for i, _ in zip(range(steps), toys.train(model, optimizer, data), strict=False):
        plain.zero_grad()
        toys.loss_of(plain, data[i]).backward()
        oracle.update(LR)
        yield losia, oracle


def furthest(losia, oracle) -> float:
    return max(
        float((m.weight - oracle.weights[n]).detach().abs().max()) for n, m in losia.modules.items()
    )


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_60_steps_over_reselections_equal_masked_dense_training(make):
    config = LosiaConfig(rank_factor=1 / 4, period=7, output_factor=1 / 2)
    run = side_by_side(toys.stack(), config, make, STEPS, toys.batches(STEPS), follow=True)
    *_, (losia, oracle) = run
    assert (
        len(oracle.history) == STEPS // 7 * 2 - STEPS // 7 // 4
    )  # two linears a block, one in the head
    assert furthest(losia, oracle) <= 1e-6
    start = toys.stack().state_dict()
    moved = [float((m.weight - start[n + ".weight"]).abs().max()) for n, m in losia.modules.items()]
    assert min(moved) > 1e-3  # the bound above would say nothing of weights that hardly move


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_fp64_run_makes_the_oracles_own_selections_and_weights(make):
    """In fp64 rounding cannot hide a difference: the oracle chooses its subnets by itself."""
    config = LosiaConfig(rank_factor=1 / 4, period=5, output_factor=1 / 2)
    data = toys.batches(STEPS, dtype=torch.float64)
    for losia, oracle in side_by_side(toys.stack(torch.float64), config, make, STEPS, data):
        expected = {n: (o.tolist(), i.tolist()) for n, (o, i) in oracle.subnets.items()}
        assert toys.indices(losia) == expected
        assert furthest(losia, oracle) <= 1e-11
    assert len(losia.history) == len(oracle.history) == 21


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "sync"},
        {"rewarm": False},
        {"importance": "first"},
        {"importance": "second"},
        {"score": "i"},
        {"score": "u"},
        {"beta1": 0.5, "beta2": 0.3},
        {"in_factor": 1 / 8, "out_factor": 1.0},
        {"in_factor": 1.0, "out_factor": 1 / 8},
        {"mode": "dense"},
        {"period": None},
        {"period": 1},
    ],
    ids=str,
)
def test_each_setting_gives_the_oracles_run(settings):
    config = LosiaConfig(**{"rank_factor": 1 / 4, "period": 4, "output_factor": 1 / 2, **settings})
    data = toys.batches(26, dtype=torch.float64)
    run = side_by_side(toys.stack(torch.float64), config, OPTIMIZERS["adamw-loop"], len(data), data)
    for losia, oracle in run:
        expected = {n: (o.tolist(), i.tolist()) for n, (o, i) in oracle.subnets.items()}
        assert toys.indices(losia) == expected
        assert furthest(losia, oracle) <= 1e-11
    if config.period is not None:
        assert [(r.step, r.name) for r in losia.history] == [h[:2] for h in oracle.history]


@pytest.mark.parametrize("settings", [{}, {"schedule": "sync"}], ids=["async", "sync"])
def test_history_records_the_step_score_kept_and_overlap_of_each_move(settings):
    config = LosiaConfig(rank_factor=1 / 4, period=3, **settings)
    data = toys.batches(14, dtype=torch.float64)
    run = side_by_side(toys.stack(torch.float64), config, OPTIMIZERS["sgd"], len(data), data)
    *_, (losia, oracle) = run
    assert losia.history and len(losia.history) == len(oracle.history)
    for got, (step, name, kept, overlap) in zip(losia.history, oracle.history, strict=True):
        assert (got.step, got.name) == (step, name)
        assert got.group == next(i for i, g in enumerate(losia.groups) if name in g)
        assert got.score_kept == pytest.approx(kept, rel=1e-9)
        assert got.overlap == pytest.approx(overlap, abs=1e-12)
    assert any(0 < r.overlap < 1 for r in losia.history)


def adafactor(parameters):
    return torch.optim.Adafactor(parameters, lr=LR, weight_decay=0.1)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-11)], ids=str)
def test_adafactor_equals_training_the_compact_matrices(dtype, bound):
    """Adafactor's factored moments and its scale by the parameter's norm are those of the compact matrix,
    so the oracle trains that: a leaf cut out of the plain weight, its gradient sliced from the dense one."""
    config = LosiaConfig(rank_factor=1 / 4, period=7)
    data = toys.batches(STEPS, dtype=dtype)
    model = toys.stack(dtype)
    plain = copy.deepcopy(model)
    losia = losia_pro.attach(model, config)
    optimizer = adafactor(losia.parameters())
    losia.bind(optimizer)
    at = toys.places(losia)
    dense = {n: plain.get_submodule(n).weight for n in losia.modules}
    compact = {n: nn.Parameter(w.detach()[at[n][0]][:, at[n][1]]) for n, w in dense.items()}
    factored = {n: adafactor([c]) for n, c in compact.items()}
    moved_at: dict[str, int] = {}
    for t, (batch, _) in enumerate(zip(data, toys.train(model, optimizer, data), strict=True), 1):
        plain.zero_grad()
        toys.loss_of(plain, batch).backward()
        for n, w in dense.items():
            rows, columns = at[n]
            compact[n].grad = w.grad[rows][:, columns]
            factor = reference.rewarm_factor(t, moved_at[n], 7) if n in moved_at else 1.0
            factored[n].param_groups[0]["lr"] = LR * factor
            factored[n].step()
            with torch.no_grad():
                w[rows[:, None], columns] = compact[n]
        if t % 7 == 0:
            for n in losia.groups[(t // 7 - 1) % 3]:
                at[n], moved_at[n] = toys.places(losia)[n], t
                compact[n] = nn.Parameter(dense[n].detach()[at[n][0]][:, at[n][1]])
                factored[n] = adafactor([compact[n]])
        worst = max(
            float((m.weight - dense[n]).detach().abs().max()) for n, m in losia.modules.items()
        )
        assert worst <= bound
    assert len(losia.history) == 16


EVERY = {
    name: getattr(torch.optim, name)
    for name in (
        "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam",
        "RMSprop", "Rprop", "SGD",
    )
}  # fmt: skip


@pytest.mark.parametrize("kind", EVERY.values(), ids=EVERY)
def test_after_a_move_every_optimizer_steps_as_if_it_were_new(kind):
    """The step after a re-selection equals the first step of a fresh optimizer on the moved subnets."""
    data = toys.batches(9, dtype=torch.float64)
    model = toys.stack(torch.float64)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=8, rewarm=False))
    optimizer = kind(losia.parameters(), lr=LR)
    losia.bind(optimizer)
    for _ in toys.train(model, optimizer, data[:8]):
        pass
    assert [r.name for r in losia.history] == ["layers.0.up", "layers.0.down"]
    fresh = {n: m.subnet.detach().clone().requires_grad_() for n, m in losia.modules.items()}
    optimizer.zero_grad()
    toys.loss_of(model, data[8]).backward()
    for n, m in losia.modules.items():
        fresh[n].grad = m.subnet.grad.clone()
    optimizer.step()
    kind(list(fresh.values()), lr=LR).step()
    for n, m in losia.modules.items():
        moved = n.startswith("layers.0.")
        stateless = kind is torch.optim.SGD  # without momentum
        assert torch.equal(m.subnet, fresh[n]) == (moved or stateless), n


def test_state_of_moved_subnets_is_gone_and_of_the_others_intact():
    data = toys.batches(6)
    model = toys.stack()
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=6))
    optimizer = torch.optim.AdamW(losia.parameters(), lr=LR)
    losia.bind(optimizer)
    for _ in toys.train(model, optimizer, data):
        pass
    assert losia.history
    for n, m in losia.modules.items():
        if n.startswith("layers.0."):
            assert m.subnet not in optimizer.state
        else:
            assert optimizer.state[m.subnet]["step"] == 6
            assert float(optimizer.state[m.subnet]["exp_avg"].abs().sum()) > 0


def test_first_steps_after_a_move_are_no_larger_than_adams():
    """Adam's first steps are bounded by lr; with the moments cleared but not the count they are 3 to 7 times that."""
    data = toys.batches(14)
    model = toys.stack()
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=7, rewarm=False))
    optimizer = torch.optim.Adam(losia.parameters(), lr=LR)
    losia.bind(optimizer)
    loop = toys.train(model, optimizer, data)
    for _ in range(7):
        next(loop)
    before = toys.weights(losia)
    next(loop)
    after = toys.weights(losia)
    for n in losia.groups[0]:
        largest = float((after[n] - before[n]).abs().max())
        assert 0.5 * LR < largest <= LR * (1 + 1e-5)


def test_rewarming_scales_the_learning_rate_from_the_first_reselection_on():
    """SGD's step is lr times the gradient, so the factor can be read off each step."""
    period, data = 4, toys.batches(20, dtype=torch.float64)
    model = toys.stack(torch.float64)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=period))
    optimizer = torch.optim.SGD(losia.parameters(), lr=LR)
    losia.bind(optimizer)
    factors: dict[str, list[float]] = {n: [] for n in losia.modules}
    for batch in data:
        optimizer.zero_grad()
        toys.loss_of(model, batch).backward()
        grads = {n: m.subnet.grad.clone() for n, m in losia.modules.items()}
        at = toys.places(losia)
        before = toys.weights(losia)
        optimizer.step()
        for n, m in losia.modules.items():
            change = (m.weight.detach() - before[n])[at[n][0]][:, at[n][1]]
            factors[n].append(float(-(change * grads[n]).sum() / grads[n].square().sum() / LR))
    ramp, one = [0.25, 0.5, 0.75, 1.0], [1.0] * 4
    expected = {
        0: [one, ramp, one, one, ramp],
        1: [one, one, ramp, one, one],
        2: [one] * 3 + [ramp, one],
    }
    for group, names in enumerate(losia.groups):
        for n in names:
            assert factors[n] == pytest.approx(sum(expected[group], []), rel=1e-9), n


def test_pro_and_dense_mode_give_the_same_run():
    def run(mode):
        model = toys.stack(torch.float64)
        config = LosiaConfig(rank_factor=1 / 4, period=4, output_factor=1 / 2, mode=mode)
        losia = losia_pro.attach(model, config)
        optimizer = torch.optim.AdamW(losia.parameters(), lr=LR)
        losia.bind(optimizer)
        losses = list(toys.train(model, optimizer, toys.batches(30, dtype=torch.float64)))
        return losia, losses

    (pro, pro_losses), (dense, dense_losses) = run("pro"), run("dense")
    assert len(pro.history) == 13 and toys.indices(pro) == toys.indices(dense)
    assert pro_losses == pytest.approx(dense_losses, rel=1e-10)
    for n, w in toys.weights(pro).items():
        torch.testing.assert_close(w, toys.weights(dense)[n], rtol=0, atol=1e-11)


def test_only_subnets_and_asked_for_biases_change():
    model = toys.stack()
    start = copy.deepcopy(model.state_dict())
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=None, train_bias=True))
    optimizer = torch.optim.AdamW(losia.parameters(), lr=LR, weight_decay=0.1)
    losia.bind(optimizer)
    for _ in toys.train(model, optimizer, toys.batches(5)):
        pass
    masks = {
        n + ".weight": reference.mask(m.weight, m.out_idx, m.in_idx)
        for n, m in losia.modules.items()
    }
    for key, now in model.state_dict().items():
        changed = now != start[key]
        if key in masks:
            assert torch.equal(changed, masks[key].bool()), key
        elif key.endswith("up.bias"):
            assert bool(changed.all()), key
        else:
            assert not changed.any(), key


def test_trained_biases_follow_dense_training():
    """With every entry selected and the biases trained, the run is plain training of those layers."""
    config = LosiaConfig(rank_factor=1.0, period=None, train_bias=True)
    data = toys.batches(20, dtype=torch.float64)
    plain, model = toys.stack(torch.float64), toys.stack(torch.float64)
    losia = losia_pro.attach(model, config)
    optimizer = torch.optim.AdamW(losia.parameters(), lr=LR)
    losia.bind(optimizer)
    layers = [p for n, p in plain.named_parameters() if n.startswith("layers.")]
    list(toys.train(model, optimizer, data))
    list(toys.train(plain, torch.optim.AdamW(layers, lr=LR), data))
    for (key, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=key)


def ones() -> nn.Sequential:
    """One linear whose weights are all 1 and whose gradients, on ``torch.eye``, are all 1."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False, dtype=torch.bfloat16))
    nn.init.ones_(model[0].weight)
    return model


def descend(model, optimizer):
    for _ in range(200):
        optimizer.zero_grad()
        model(torch.eye(8, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()


def test_small_updates_vanish_in_plain_bf16_training():
    model = ones()
    descend(model, torch.optim.SGD(model.parameters(), lr=1e-4))
    assert torch.equal(model[0].weight, ones()[0].weight)


@pytest.mark.parametrize(
    "config",
    [
        LosiaConfig(rank_factor=1 / 2, period=None),
        LosiaConfig(
            rank_factor=1.0, period=50, rewarm=False
        ),  # four moves in which every entry stays
    ],
    ids=["fixed", "moves"],
)
def test_small_updates_arrive_in_a_bf16_model(config):
    """200 updates of 1e-4 to a weight of 1.0."""
    model = ones()
    losia = losia_pro.attach(model, config)
    optimizer = torch.optim.SGD(losia.parameters(), lr=1e-4)
    losia.bind(optimizer)
    descend(model, optimizer)
    module = losia.modules["0"]
    assert module.subnet.dtype == torch.float32
    # 200 roundings of at most half an fp32 step below 1, and one to bf16, of half a bf16 step
    assert float((module.subnet.detach().double() - 0.98).abs().max()) <= 200 * 2**-25
    block = model[0].weight[module.out_idx][:, module.in_idx]
    assert float((block.double() - 0.98).abs().max()) <= 2**-9 + 200 * 2**-25


def test_subnet_keeps_what_bf16_rounds_away_across_a_move():
    """Entries that stay selected keep their exact value, so that small steps go on adding up."""
    model = toys.stack(torch.bfloat16)
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 2, period=3, schedule="sync"))
    optimizer = torch.optim.SGD(losia.parameters(), lr=1e-3)
    losia.bind(optimizer)
    exact = {}
    for i, batch in enumerate(toys.batches(3)):
        optimizer.zero_grad()
        toys.loss_of(model, (batch[0].bfloat16(), batch[1])).backward()
        if i == 2:  # step by hand on a copy: the values before the move
            for n, m in losia.modules.items():
                full = torch.full(m.weight.shape, float("nan"))
                full[m.out_idx[:, None], m.in_idx] = m.subnet.detach() - 1e-3 * m.subnet.grad
                exact[n] = full
        optimizer.step()
    assert [r.step for r in losia.history] == [3] * 6
    kept = 0
    for n, m in losia.modules.items():
        was = exact[n][m.out_idx[:, None], m.in_idx]
        stay = ~was.isnan()
        torch.testing.assert_close(m.subnet[stay], was[stay], rtol=0, atol=1e-7)
        rounded = m.subnet[stay].bfloat16().float()
        kept += int((m.subnet[stay] != rounded).sum())
        assert torch.equal(m.weight, m.weight.clone().index_put_(
            (m.out_idx[:, None], m.in_idx), m.subnet.detach().bfloat16()))  # fmt: skip
    assert kept > 100


def test_model_under_autocast_trains_as_it_does_without_a_controller():
    """bf16 autocast around an fp32 model: compact gradients are the slices of the plain model's."""
    model, plain = toys.stack(), toys.stack()
    losia = losia_pro.attach(model, LosiaConfig(rank_factor=1 / 4, period=2))
    optimizer = torch.optim.SGD(losia.parameters(), lr=LR)
    losia.bind(optimizer)
    batch = toys.batches(1)[0]
    for m in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = toys.loss_of(m, batch)
        loss.backward()
    for n, m in losia.modules.items():
        dense = plain.get_submodule(n).weight.grad[m.out_idx][:, m.in_idx]
        # the plain gradient is rounded to bf16 once, the compact one not: half a bf16 step apart
        # (and the sums of 8 products in another order)
        torch.testing.assert_close(m.subnet.grad, dense, rtol=2**-8, atol=2**-20)
