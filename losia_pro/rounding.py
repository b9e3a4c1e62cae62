"""Stochastic rounding of fp32 to bf16, the same bits on every device, in every run.

bf16 keeps the upper 16 bits of an fp32 number. The lower 16, ``f``, are added to 16 random bits, and what carries is
kept: the number is rounded away from zero with probability ``f / 2^16`` exactly, so that its expectation is itself,

    E[round(v)] = v,    Var[round(v)] = f (2^16 - f) / 2^32 u^2 <= u^2 / 4,    u <= 2^-7 |v| the spacing of bf16 at v,

where rounding to nearest returns the old weight for every update below ``u / 2``. Numbers that bf16 holds, infinities
and NaN stay as they are.

The random bits are a hash of a key and of the entry's number, so nothing has to be kept for a resume, and ranks and
implementations agree: ``kernels/rounding.py`` and ``csrc/rounding.cuh`` compute the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

_64 = 2**64 - 1


def key_of(*numbers: int) -> int:
    """A key for a sequence of integers, such as a seed and a step: 62 random bits and 2^62, so that it is a positive
    int64 that takes more than 32 bits.

    Each number goes through the finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & _64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _64
        state ^= state >> 31
    return state >> 2 | 1 << 62


def noise(numbers: Tensor, key: int) -> Tensor:
    """32 random bits for each number: ``mix(mix(n ^ low word of key) ^ high word)``, int32 in and out."""
    return mix(mix(numbers ^ _int32(key)) ^ _int32(key >> 32))


def mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers in which every bit of ``x`` flips each bit of the result half of the time.

    It is the two-round function of least bias in github.com/skeeto/hash-prospector; int32 arithmetic wraps.
    """
    x = x ^ _shifted(x, 16)
    x = x * _int32(0x21F0AAAD)
    x = x ^ _shifted(x, 15)
    x = x * _int32(0xD35A2D97)
    return x ^ _shifted(x, 15)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros: int32's own shift repeats the sign."""
    return x >> bits & (1 << 32 - bits) - 1


def _int32(word: int) -> int:
    """The low 32 bits as the signed number that int32 tensors take."""
    return (word + 2**31) % 2**32 - 2**31


def numbers_of(t: Tensor, first: int = 0) -> Tensor:
    """``first``, ``first + 1``, ... in the shape of ``t``, row by row, modulo 2^32 as int32."""
    n = torch.arange(first, first + t.numel(), device=t.device)
    return n.to(torch.int32).view(t.shape)


def to_bf16(value: Tensor, random: Tensor) -> Tensor:
    """``value`` in fp32, rounded by the low 16 of ``random``'s bits; int32, of its shape."""
    bits = value.view(torch.int32) + (random & 0xFFFF) & -0x10000
    rounded = bits.view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
