"""Stochastic rounding to bf16: exact probabilities, the same bits for the same key, and nothing lost on the mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from losia_pro import rounding

OPS = torch.ops.losia_pro
EVERY = torch.arange(2**16, dtype=torch.int32)  # all the random bits that one rounding can take
VALUES = [
    1 + 2**-9,
    -1.2345678,
    3e-5,
    -(2.0**-130) * 1.7,  # where bf16's numbers are evenly spaced
    2.0**-149,
    3.3e38,
    1 - 2**-24,
]


@pytest.mark.parametrize("value", VALUES)
def test_the_mean_over_all_random_bits_is_the_number_itself(value):
    t = torch.full((2**16,), value)
    rounded = rounding.to_bf16(t, EVERY)
    assert rounded.dtype == torch.bfloat16
    assert float(rounded.double().mean()) == float(
        t.double()[0]
    )  # sums of 2^16 short numbers are exact
    low, high = sorted(rounded.unique().double().tolist())
    assert low < float(t[0]) < high
    assert torch.tensor(low).bfloat16().nextafter(torch.tensor(high).bfloat16()) == high


def test_what_bf16_holds_stays_as_it_is():
    held = torch.tensor([0.0, -0.0, 1.0, -0.0078125, 3.3895e38, torch.inf, -torch.inf]).bfloat16()
    rounded = rounding.to_bf16(held.float()[:, None].expand(-1, 2**16), EVERY)
    assert torch.equal(rounded.view(torch.int16), held.view(torch.int16)[:, None].expand(-1, 2**16))
    nan = torch.tensor([0x7F800001, -1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert rounding.to_bf16(nan[:, None].expand(-1, 2**16), EVERY).isnan().all()


def test_noise_is_a_function_of_key_and_number_that_later_releases_keep():
    """Or a resumed run would go another way."""
    n = torch.tensor([0, 1, -(2**31), -1], dtype=torch.int32)
    key = rounding.key_of(0, 1)
    assert key == 0x422D3F6A3224AD43
    assert rounding.noise(n, key).tolist() == [-722673180, -614465120, -1607007111, 972891216]
    assert torch.equal(rounding.numbers_of(torch.empty(2, 2), 2**31 - 2).flatten()[:3],
                       torch.tensor([2**31 - 2, 2**31 - 1, -(2**31)], dtype=torch.int32))  # fmt: skip


def test_keys_take_64_bits_and_differ_for_any_other_numbers():
    seen = {
        rounding.key_of(*n)
        for n in [(0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**64 - 2,), (2**63,)]
    }
    assert len(seen) == 8
    assert all(2**62 <= key < 2**63 for key in seen)


def halves(random: Tensor) -> list[Tensor]:
    return [random & 0xFFFF, (random >> 16) & 0xFFFF, rounding.mix(random) & 0xFFFF]


def test_noise_is_even_and_uncorrelated():
    """Between entries, between steps, and between the parts that one entry's values take. For n numbers, each mean
    and each correlation of independent ones is within 6 standard errors, but for two chances in a billion."""
    n = 2**16
    numbers = rounding.numbers_of(torch.empty(n))
    steps = [rounding.noise(numbers, rounding.key_of(0, step)) for step in range(4)]
    bits = torch.stack([b >> k & 1 for b in steps for k in range(32)]).double()
    assert float((bits.mean(1) - 0.5).abs().max()) <= 6 * 0.5 / math.sqrt(n)
    rows = [part.double() for b in steps for part in halves(b)]
    rows += [steps[0].roll(k).double() for k in (1, 2, 64)]
    rows.append(rounding.noise(numbers, rounding.key_of(1, 0)).double())
    apart = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert float(apart.abs().max()) <= 6 / math.sqrt(n)


# --- write_back_ ----------------------------------------------------------------------------------


def layers() -> list[list[Tensor]]:
    """Three layers with the same subnet: values a quarter of the way between two numbers of bf16."""
    weights = [torch.zeros(40, 50, dtype=torch.bfloat16) for _ in range(3)]
    rows, columns = torch.arange(0, 40, 2), torch.arange(0, 50, 2)
    return [weights, [torch.full((20, 25), 1 + 2**-9)] * 3, [rows] * 3, [columns] * 3]


def test_write_back_rounds_each_entry_by_itself_and_the_same_way_for_the_same_seed():
    weights, *rest = layers()
    again, other = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for to, seed in ((weights, 5), (again, 5), (again, 5), (other, 6)):
        OPS.write_back_(to, *rest, seed=seed)
    assert all(map(torch.equal, weights, again))
    blocks = [w[::2, ::2] for w in (*weights, *other)]
    n = blocks[0].numel()
    for k, a in enumerate(blocks):
        assert set(a.unique().tolist()) == {1.0, 1 + 2**-7}
        up = int((a > 1).sum())
        assert abs(up - n / 4) <= 6 * math.sqrt(n * 3 / 16)  # six standard deviations
        for b in blocks[:k]:
            same = int((a == b).sum())
            assert abs(same - n * 10 / 16) <= 6 * math.sqrt(n * 10 / 16 * 6 / 16)
    assert all(not w[1::2].any() and not w[:, 1::2].any() for w in weights)
    OPS.write_back_(weights, *rest)
    assert all(bool((w[::2, ::2] == 1).all()) for w in weights)  # to nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_seed_changes_nothing_where_nothing_is_rounded(dtype):
    weight = torch.zeros(4, 4, dtype=dtype)
    idx, subnet = torch.tensor([1, 3]), torch.rand(2, 2).to(dtype)
    OPS.write_back_([weight], [subnet], [idx], [idx], seed=1)
    assert torch.equal(weight[idx][:, idx], subnet)


def test_weights_in_fp16_are_refused_with_a_seed():
    weight, idx = torch.zeros(4, 4).half(), torch.tensor([1])
    OPS.write_back_([weight], [torch.ones(1, 1)], [idx], [idx])
    with pytest.raises(
        ValueError, match="bf16 alone, got torch.float16; seed=None rounds to nearest"
    ):
        OPS.write_back_([weight], [torch.zeros(1, 1)], [idx], [idx], seed=1)
    assert weight[1, 1] == 1
