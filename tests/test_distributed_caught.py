"""Ranks that differ: every rank raises the same error, which names them and what to do."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import toys
from ranks import CONFIG, Run, Sharded, data, launch, rank_and_size
from torch.distributed import new_group
from torch.distributed.algorithms import Join
from torch.nn.parallel import DistributedDataParallel

from losia_pro import profile

ODD = 1  # the rank that is tampered with, of three


def is_odd() -> bool:
    return rank_and_size()[0] == ODD


def other_first(idx: torch.Tensor, size: int) -> torch.Tensor:
    """The same indices but one."""
    free = next(i for i in range(size) if i not in idx)
    return torch.cat((idx[1:], idx.new_tensor([free]))).sort().values


def base_weights(new: type[Run]) -> None:
    new(seed=int(is_odd())).bind()  # DistributedDataParallel sends rank 0's: too late for the delta


def frozen_weights(new: type[Run]) -> None:
    model = toys.stack(torch.float64)
    if is_odd():
        with torch.no_grad():
            model.norm.weight[3] += 1e-12
    new(model=model).bind()


def weights_after_the_wrapper(new: type[Run]) -> None:
    run = Run()
    if is_odd():
        with torch.no_grad():
            run.model.norm.weight[3] += 1e-12
    run.bind()


def another_seed(new: type[Run]) -> None:
    new(dataclasses.replace(CONFIG, seed=int(is_odd()))).bind()


def first_subnets(new: type[Run]) -> None:
    run = Run()
    if is_odd():
        m = run.losia.modules["layers.0.up"]
        m.select(other_first(m.out_idx, m.out_features), m.in_idx)
    run.bind()


def subnets_on_the_way(new: type[Run]) -> None:
    run = new().bind().go(data()[:4])
    if is_odd():
        m = run.losia.modules["layers.1.down"]
        m.in_idx.copy_(other_first(m.in_idx, m.in_features))
    run.go(data()[4:])


def a_choice_of_its_own(new: type[Run]) -> None:
    choose = profile.localize_together

    def other(scores, *rest):
        out_idx, in_idx = choose(scores, *rest)
        return [other_first(out_idx[0], scores[0].shape[0]), *out_idx[1:]], in_idx

    if is_odd():
        profile.localize_together = other
    try:
        new().bind().go(data())
    finally:
        profile.localize_together = choose


def a_dropped_reduction(new: type[Run]) -> None:
    run = new().bind().go(data()[:1])
    mean = run.losia._ranks.mean_
    if is_odd():
        run.losia._ranks.mean_ = lambda grad: mean(grad.clone())
    run.go(data()[1:2])
    run.losia._ranks.mean_ = mean
    run.go(data()[2:])


def the_model_inside(new: type[Run]) -> None:
    run = Run().bind()
    run.net = run.model
    run.go(data())


def attached_after_the_wrapper(new: type[Run]) -> None:
    model = toys.stack(torch.float64)
    net = DistributedDataParallel(model)
    run = Run(model=model, wrap=False).bind()
    run.net = net
    run.go(data())


def another_step(new: type[Run]) -> None:
    late = new().bind().go(data()[:6]).state()
    early = new().bind().go(data()[:2]).state()
    new().load(early if is_odd() else late).bind()


def another_step_after_bind(new: type[Run]) -> None:
    late = new().bind().go(data()[:6]).state()
    early = new().bind().go(data()[:2]).state()
    new().bind().load(early if is_odd() else late)


def batches_to_calibrate_with(new: type[Run]) -> None:
    config = dataclasses.replace(CONFIG, init="calibrate")
    new(config).losia.calibrate(data()[: 3 - is_odd()], toys.loss_of)


CASES = {
    base_weights: (r"at bind\(\), rank 1 .* in: base weights.*; .* before attach", "1"),
    weights_after_the_wrapper: (r"at bind\(\), .* in: weights; load the same weights", "1"),
    another_seed: (r"at bind\(\), .* in: settings, subnets.*; .*LosiaConfig", "1"),
    first_subnets: (r"at bind\(\), .* in: subnets, weights; select\(\)", "1"),
    subnets_on_the_way: (r"before the re-selection at step 6, .* in: subnets", "1"),
    a_choice_of_its_own: (r"after the re-selection at step 3, .* in: subnets; ", "1"),
    a_dropped_reduction: (r"before the re-selection at step 3, .* in: importance; ", "1"),
    the_model_inside: (r"after the first step, .* in: weights; .*DistributedDataParallel", "1, 2"),
    attached_after_the_wrapper: (r"after the first step, .* wrapped after attach", "1, 2"),
    another_step: (r"at bind\(\), .* in: step, .*; resume every rank", "1"),
    another_step_after_bind: (r"at load_state_dict\(\), .* in: step, .*; resume every rank", "1"),
    batches_to_calibrate_with: (r"at calibrate\(\), .* in: batches to calibrate with; ", "1"),
}
SHARDED = {
    frozen_weights: (r"at bind\(\), .* in: weights; load the same weights on every rank before", "1"),
    **{case: CASES[case] for case in (
        base_weights, another_seed, subnets_on_the_way, a_choice_of_its_own, a_dropped_reduction,
        another_step, another_step_after_bind, batches_to_calibrate_with,
    )},
}  # fmt: skip


def all_cases() -> dict[str, str]:
    """The error that each case ends with."""
    errors = {}
    for new, cases in ((Run, CASES), (Sharded, SHARDED)):
        for case in cases:
            key = f"{new.__name__}-{case.__name__}"
            try:
                case(new)
                errors[key] = "no error"
            except RuntimeError as error:
                errors[key] = str(error)
    return errors


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    return launch(all_cases, 3, tmp_path_factory.mktemp("ranks"))


ALL = {
    f"{new}-{case.__name__}": expected
    for new, cases in (("Run", CASES), ("Sharded", SHARDED))
    for case, expected in cases.items()
}


@pytest.mark.parametrize("case", ALL)
def test_every_rank_names_the_one_that_differs(errors, case):
    pattern, odd = ALL[case]
    first = errors[0][case]
    assert re.search(pattern, first), first
    assert f"rank {odd} differs from rank 0" in first
    assert [e[case] for e in errors] == [first] * 3


def alone_in_a_group() -> bool:
    """Each rank a training of its own: other data, other subnets."""
    rank, size = rank_and_size()
    groups = [new_group([r]) for r in range(size)]
    config = dataclasses.replace(CONFIG, seed=rank)
    run = Run(config, wrap=False, seed=rank).bind(process_group=groups[rank])
    run.go(data())
    return run.losia.step == len(data())


def unevenly() -> str:
    """More batches on one rank than on the other."""
    run = Run().bind()
    with pytest.raises(RuntimeError) as error, Join([run.net]):
        run.go(data()[: 3 + is_odd()])
    run.losia.detach()
    toys.loss_of(run.model, data()[0])
    return str(error.value)


def both() -> tuple[bool, str]:
    return alone_in_a_group(), unevenly()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(both, 2, tmp_path_factory.mktemp("ranks"))


def test_a_group_of_one_trains_alone(two):
    assert [trained for trained, _ in two] == [True, True]


def test_join_is_refused(two):
    for _, error in two:
        assert "join() is not supported: give every rank equally many batches" in error
