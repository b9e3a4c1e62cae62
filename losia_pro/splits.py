"""Into how many parts a sum over tokens is cut, so that few tiles of a product fill a device."""

from __future__ import annotations

import functools


@functools.lru_cache(1024)
def split_tokens(tokens: int, tiles: int, step: int, processors: int) -> int:
    """Tokens that a block sums over, a multiple of ``step`` and at least four, at the least cost: each of ``tiles``
    is one block for every so many tokens, and a processor has one block at a time.

    In times of a step, an estimated half of a microsecond on an H200: a wave of blocks takes its steps, and 4 more to
    begin and to end; a sum of the parts takes 5, and one more for every 16 of them, which are written and read.
    """
    steps = -(-tokens // step)

    def cost(splits: int) -> float:
        waves = -(-tiles * splits // processors)
        summing = 5 + tiles * splits / 16 if splits > 1 else 0.0
        return waves * (-(-steps // splits) + 4) + summing

    best = min(range(1, max(1, steps // 4) + 1), key=cost)
    return -(-steps // best) * step
