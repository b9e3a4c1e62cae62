"""Which launches share a buffer of counters. No GPU and no Triton needed."""

from __future__ import annotations

import pytest
import torch

from losia_pro.kernels import counters as room
from losia_pro.kernels.counters import counters

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept():
    room._kept.clear()


def used(n: int) -> torch.Tensor:
    with counters(n, CPU) as zeros:
        assert zeros.dtype == torch.int32 and zeros.numel() >= n and not zeros.any()
        return zeros


def test_launches_in_turn_share_a_buffer_that_grows():
    small = used(4)
    assert used(3) is small
    large = used(5)
    assert large is not small and used(4) is large


def test_a_launch_within_a_launch_has_its_own():
    with counters(4, CPU) as outer, counters(4, CPU) as inner:
        assert inner is not outer


def test_a_buffer_is_not_used_again_after_an_error():
    with pytest.raises(KeyboardInterrupt), counters(4, CPU) as dirty:
        dirty.fill_(7)
        raise KeyboardInterrupt
    assert used(4) is not dirty


def test_another_stream_than_the_default_one_has_zeros_of_its_own(monkeypatch):
    kept = used(4)
    monkeypatch.setattr(room, "_in_turn", lambda device: False)
    one, other = used(4), used(4)
    assert one is not other and kept is not one and kept is not other
    assert list(room._kept.values()) == [kept]


def test_only_the_default_stream_of_a_gpu_runs_launches_in_turn(monkeypatch):
    for stream, in_turn in ((0, True), (1, False)):
        current = lambda index, stream=stream: stream  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current, raising=False)
        assert room._in_turn(torch.device("cuda", 0)) is in_turn
