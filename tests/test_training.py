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
    config = LosiaConfig(rank_factor=1 / 4, period=7, base_decay=0)
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
    config = LosiaConfig(rank_factor=1.0, train_bias=True, base_decay=0)
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
