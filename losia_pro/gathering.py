"""Where a product that gathers aligned runs itself, as Triton's does, takes less than a gather and the library's."""

from __future__ import annotations

SHORT = 2048  # tokens: of so many or fewer, a gather and the library's product take no longer at most shapes


def gathering_pays(n_out: int, n_in: int) -> bool:
    """Whether such a product of more than SHORT tokens took less on an H200, at most shapes."""
    return n_out >= 128 and n_in <= 1024
