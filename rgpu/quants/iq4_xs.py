"""IQ4_XS: 256 weights in 136 bytes: d float16, eight 6-bit scales (high pairs in a uint16, low nibbles in 4 bytes), 128 bytes.

Sub-block j of 32 weights is 16 of those bytes, nibbles as in IQ4_NL; value = d·(scale_j − 32)·T[q].
"""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .blocks import half, u16
from .iq4_nl import TABLE, table_lanes, table_values
from .vectors import load, store, total, zeros


@register_jitable
def scale(w, o, j):
    """Scale of sub-block `j` in the block at `o`, without d, as float32."""
    low = (w[o + 4 + j // 2] >> (4 * (j % 2))) & 15
    high = (u16(w, o + 2) >> (2 * j)) & 3
    return np.float32((low | (high << 4)) - 32)


class IQ4_XS(NamedTuple):
    id = 23
    block = 256
    nbytes = 136

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 136] -> float32 [n, 256]."""
        n = len(blocks)
        d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        high = blocks[:, 2:4].copy().view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
        low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(n, 8)
        scales = d * ((low | high << 4).astype(np.float32) - np.float32(32))
        return (scales[..., None] * table_values(TABLE, blocks[:, 8:].reshape(n, 8, 16))).reshape(n, 256)

    @staticmethod
    def dot(quant, w, x, n):
        acc = zeros(32)
        for b in range(n // 256):
            o = 136 * b
            d = half(w, o)
            for j in range(8):
                acc += table_lanes(TABLE, w, o + 8 + 16 * j) * load(x, 256 * b + 32 * j, 32) * (d * scale(w, o, j))
        return total(acc)

    @staticmethod
    def unpack(quant, w, out, n):
        for b in range(n // 256):
            o = 136 * b
            d = half(w, o)
            for j in range(8):
                store(out, 256 * b + 32 * j, table_lanes(TABLE, w, o + 8 + 16 * j) * (d * scale(w, o, j)))
