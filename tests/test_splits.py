"""How a sum over tokens is cut: every token once, at least four steps a block, and no cut that does not pay."""

from __future__ import annotations

import pytest

from losia_pro.splits import split_tokens

STEP, PROCESSORS = 64, 132


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 2049, 8192, 8193, 32768])
@pytest.mark.parametrize("tiles", [1, 4, 44, 70, 224, 5000])
def test_blocks_have_whole_steps_and_four_of_them_where_there_are_two(tokens, tiles):
    split = split_tokens(tokens, tiles, STEP, PROCESSORS)
    splits = -(-tokens // split)
    assert split % STEP == 0 and (splits - 1) * split < tokens <= splits * split
    assert splits == 1 or split >= 4 * STEP


@pytest.mark.parametrize(
    ("tiles", "splits"),
    [
        (44, 3),  # as many as fill the processors once
        (32, 4),
        (132, 1),  # full as it is
        (70, 3),  # 210 blocks in two waves, where 70 in one leave half of the processors idle
        (5000, 1),
    ],
)
def test_a_device_is_filled(tiles, splits):
    assert -(-8192 // split_tokens(8192, tiles, STEP, PROCESSORS)) == splits
