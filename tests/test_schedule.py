"""Who is profiled, moved and rewarmed when: the paper's table for 3 blocks and slots of 4 steps, written out."""

from __future__ import annotations

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

import losia_pro
from losia_pro import LosiaConfig, reference
from losia_pro.schedule import Schedule

# One line a slot: its steps, the group profiled in them and moved after the last, the group rewarmed.
BLOCKS = """
 0- 3  profile 0  rewarm -
 4- 7  profile 1  rewarm 0
 8-11  profile 2  rewarm 1
12-15  profile 0  rewarm 2
16-19  profile 1  rewarm 0
20-23  profile 2  rewarm 1
24-27  profile 0  rewarm 2
"""
BLOCKS_AND_HEAD = """
 0- 3  profile 0  rewarm -
 4- 7  profile 1  rewarm 0
 8-11  profile 2  rewarm 1
12-15  profile 3  rewarm 2
16-19  profile 0  rewarm 3
20-23  profile 1  rewarm 0
24-27  profile 2  rewarm 1
28-31  profile 3  rewarm 2
32-35  profile 0  rewarm 3
"""
RAMP = [0.25, 0.5, 0.75, 1.0]


def read(table: str):
    """``(step, profiled, moved, factors)`` of every step of a table."""
    for line in table.strip().splitlines():
        steps, _, profiled, _, rewarmed = line.replace("- ", "-").split()
        first, last = map(int, steps.split("-"))
        for step in range(first, last + 1):
            moved = (int(profiled),) if step == last else ()
            factors = {} if rewarmed == "-" else {int(rewarmed): RAMP[step - first]}
            yield step, (int(profiled),), moved, factors


TABLES = {"3 blocks": (3, BLOCKS), "3 blocks and a head": (4, BLOCKS_AND_HEAD)}


@pytest.mark.parametrize(("n_groups", "table"), TABLES.values(), ids=TABLES)
def test_the_schedule_is_the_papers_table(n_groups, table):
    schedule = Schedule(n_groups, 4)
    steps = 0
    for step, profiled, moved, factors in read(table):
        assert schedule.profiled(step) == profiled
        assert schedule.reselected(step) == moved
        for group in range(n_groups):
            assert schedule.rewarm(step, group) == factors.get(group, 1.0), (step, group)
        steps += 1
    assert steps == 4 * len(table.strip().splitlines())


@pytest.mark.parametrize("output_factor", [0.0, 0.5], ids=["blocks", "blocks and head"])
def test_training_profiles_and_moves_exactly_the_tables_groups(output_factor):
    """Seen from outside: which linears hold importance while a step runs, and which move after it."""
    table = BLOCKS_AND_HEAD if output_factor else BLOCKS
    model = toys.stack()
    config = LosiaConfig(rank_factor=1 / 4, period=4, output_factor=output_factor)
    losia = losia_pro.attach(model, config)
    names = [[f"layers.{i}.up", f"layers.{i}.down"] for i in range(3)]
    assert losia.groups == names + ([["head"]] if output_factor else [])
    optimizer = torch.optim.SGD(losia.parameters(), lr=0.0)
    losia.bind(optimizer)
    rows = list(read(table))
    for (step, profiled, moved, _), batch in zip(rows, toys.batches(len(rows)), strict=True):
        holding = {n for n, m in losia.modules.items() if m.profile is not None}
        assert holding == {n for g in profiled for n in losia.groups[g]}, step
        before = len(losia.history)
        list(toys.train(model, optimizer, [batch]))
        new = losia.history[before:]
        assert [r.name for r in new] == [n for g in moved for n in losia.groups[g]]
        assert all((r.step, r.group) == (step + 1, moved[0]) for r in new)


def test_the_synchronous_schedule_profiles_and_moves_all_groups_in_every_slot():
    schedule = Schedule(3, 4, synchronous=True)
    for step in range(16):
        assert schedule.profiled(step) == (0, 1, 2)
        assert schedule.reselected(step) == ((0, 1, 2) if step in (3, 7, 11, 15) else ())
        for group in range(3):
            assert schedule.rewarm(step, group) == (1.0 if step < 4 else RAMP[step % 4])


def test_without_a_period_nothing_is_profiled_moved_or_rewarmed():
    for synchronous in (False, True):
        schedule = Schedule(3, None, synchronous)
        for step in range(20):
            assert schedule.profiled(step) == schedule.reselected(step) == ()
            assert [schedule.rewarm(step, g) for g in range(3)] == [1.0] * 3


@given(
    n_groups=st.integers(1, 5),
    period=st.integers(1, 6),
    synchronous=st.booleans(),
    steps=st.integers(1, 80),
)
def test_rewarming_counts_from_each_groups_last_move(n_groups, period, synchronous, steps):
    """Told from a record of moves alone, by the reference's factor: its ``t`` counts steps from 1."""
    schedule = Schedule(n_groups, period, synchronous)
    moved_after: dict[int, int] = {}
    for step in range(steps):
        for group in range(n_groups):
            factor = 1.0
            if group in moved_after:
                factor = reference.rewarm_factor(step + 1, moved_after[group], period)
            assert schedule.rewarm(step, group) == pytest.approx(factor, abs=1e-15)
        for group in schedule.reselected(step):
            assert group in schedule.profiled(step)
            moved_after[group] = step + 1


@given(n_groups=st.integers(1, 6), period=st.integers(1, 6), rounds=st.integers(1, 4))
def test_every_group_is_profiled_for_whole_slots_and_moved_once_a_round(n_groups, period, rounds):
    schedule = Schedule(n_groups, period)
    steps = range(n_groups * period * rounds)
    profiled = [g for s in steps for g in schedule.profiled(s)]
    moved = [g for s in steps for g in schedule.reselected(s)]
    assert profiled == [g for _ in range(rounds) for g in range(n_groups) for _ in range(period)]
    assert moved == list(range(n_groups)) * rounds
