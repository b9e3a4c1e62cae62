"""Stochastic rounding of fp32 to bf16 within a kernel: what `losia_pro/rounding.py` computes, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def noise(n, key):
    """32 random bits for each entry, by its number; the key is an int64."""
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    return mix(mix((n & 0xFFFFFFFF).to(tl.uint32) ^ low) ^ high)


@triton.jit
def to_bf16(value, random):
    """Adds the low 16 of the random bits to what bf16 drops, and keeps the carry; infinities and NaN stay."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = ((bits + (random & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) < 0x7F800000, rounded, value).to(tl.bfloat16)
