"""How activations are stored for integer products: one row is int8 quants with a scale per 32 and the sums that offsets need.

A row of n columns (a multiple of 32) is four planes in 1.5·n bytes: int8 q[n], float32 d[n/32], float32 s32[n/32] = d·Σ of
each 32 q, float32 s16[n/16] = d·Σ of each 16. A column's value is d·q with d = max|x|/127 over its 32.
"""

import numpy as np
from numba.extending import register_jitable

from .blocks import from_bits
from .vectors import EXACT, astype, full, largest, load, store, total, view

# A d below the normal numbers has too few bits to divide by (127 could become 128): such a block counts as zeros.
SMALLEST, LARGEST = np.finfo(np.float32).tiny, np.finfo(np.float32).max
# Added to a small number, it leaves the nearest whole number, halves to even, in the low bits.
ROUND = np.float32(1.5 * 2**23)


@register_jitable
def row_bytes(n):
    """Bytes of a row of `n` columns."""
    return n + n // 2


@register_jitable
def _put(row, o, value):
    store(row, o, view(full(value, 1), np.uint8))


@register_jitable(**EXACT)
def quantize(x, row):
    """Write float32 `x` [n] to `row`, uint8 [row_bytes(n)]; NaN or infinity makes its columns' d and sums NaN. Numba only."""
    n = x.size
    for i in range(0, n, 32):
        # Without their sign, floats order as their bits do, NaN last.
        d = from_bits(largest(view(load(x, i, 32), np.uint32) & 0x7FFFFFFF)) / np.float32(127)
        d = np.float32(np.nan) if not d <= LARGEST else (d if d >= SMALLEST else np.float32(0))
        inverse = np.float32(1) / d if d > 0 else np.float32(0)
        first, second = load(x, i, 16) * inverse + ROUND, load(x, i + 16, 16) * inverse + ROUND
        store(row, i, astype(view(first, np.uint32), np.uint8))
        store(row, i + 16, astype(view(second, np.uint32), np.uint8))
        a, b = total(first - ROUND), total(second - ROUND)  # whole numbers: exact
        _put(row, n + i // 8, d)
        _put(row, n + n // 8 + i // 8, d * (a + b))
        _put(row, n + n // 4 + i // 4, d * a)
        _put(row, n + n // 4 + i // 4 + 4, d * b)


def rounded(x):
    """float32 [..., n] -> float32 of that shape: the values d·q that a product sees of `x`."""
    blocks = x.reshape(-1, 32)
    with np.errstate(divide="ignore", invalid="ignore"):
        d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        d = np.where(d <= LARGEST, np.where(d >= SMALLEST, d, np.float32(0)), np.float32(np.nan))
        q = np.rint(blocks * np.where(d > 0, np.float32(1) / d, np.float32(0)))
        return (d * q).reshape(x.shape)
