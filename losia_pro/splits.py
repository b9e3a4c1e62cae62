"""Products that gather aligned runs themselves: where they are taken, and how the CUDA one shares out its tokens."""

from __future__ import annotations

import functools

SHORT = 2048  # tokens, of which at most a gather and the library's product take no longer


def gathering_pays(n_out: int, n_in: int) -> bool:
    """Whether such a product took less than a gather and the library's on an H200, of more than SHORT tokens."""
    return n_out >= 128 and n_in <= 1024


@functools.lru_cache(1024)
def split_tokens(tokens: int, tiles: int, step: int, processors: int) -> int:
    """Tokens that a block sums over, a multiple of ``step`` and at least four, at the least cost: each of ``tiles``
    is one block for every so many tokens, and a processor has one block at a time. For csrc/subnet_grad.cu; Triton's
    product fills the processors once.

    In times of a step, half of a microsecond on an H200, all of them estimates: a wave of blocks takes its steps,
    and 4 more to begin and to end; a sum of the parts takes 5, and one more for every 16 of them.
    """
    steps = -(-tokens // step)

    def cost(splits: int) -> float:
        waves = -(-tiles * splits // processors)
        summing = 5 + tiles * splits / 16 if splits > 1 else 0.0
        return waves * (-(-steps // splits) + 4) + summing

    best = min(range(1, max(1, steps // 4) + 1), key=cost)
    return -(-steps // best) * step
