"""Q3_K: 256 weights in 110 bytes: 32 bytes of high bits, 64 bytes of 2-bit quants, sixteen 6-bit scales in 12 bytes, d float16.

Low bits as Q2_K; 4 is subtracted where bit n // 32 of high byte n % 32 is 0. Sub-block j of 16 weights: d·(scale_j − 32)·q.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .vectors import astype, half_lanes, join, lane, load, store, total, view, zeros


@register_jitable
def scale_lanes(w, o):
    """16 float32 lanes: the scales, less 32, from the 12 bytes at `o` (low nibbles in eight, high pairs of bits in four)."""
    low, high = load(w, o, 8), load(w, o + 8, 4)
    pairs = join(join(high & 3, high >> 2 & 3), join(high >> 4 & 3, high >> 6))
    return astype(view((join(low & 15, low >> 4) | pairs << 4) - 32, np.int8), np.float32)


class Q3_K(NamedTuple):
    id = 11
    block = 256
    nbytes = 110

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 110] -> float32 [n, 256]."""
        n = len(blocks)
        low, high = blocks[:, 96:104], blocks[:, 104:108]
        pairs = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
        scales = (np.concatenate([low & 15, low >> 4], axis=1) | pairs << 4).astype(np.float32) - np.float32(32)
        qs = blocks[:, 32:96].reshape(n, 2, 1, 32)
        q = np.concatenate([qs >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(n, 8, 32)
        bit = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
        values = (q | bit << 2).reshape(n, 16, 16).astype(np.float32) - np.float32(4)
        d = blocks[:, 108:].copy().view(np.float16).astype(np.float32)
        return ((d * scales)[..., None] * values).reshape(n, 256)

    @staticmethod
    def dot(quant, w, x, n):
        acc = zeros(16)
        for b in range(n // 256):
            o = 110 * b
            scales = scale_lanes(w, o + 96) * half_lanes(w, o + 108, 16)
            for h in range(2):
                mask = load(w, o + 16 * h, 16)
                for j in range(0, 16, 8):
                    q = load(w, o + 32 + 4 * j + 16 * h, 16)
                    for s in range(j + h, j + 8, 2):
                        value = astype(view((q & 3 | (mask & 1) << 2) - 4, np.int8), np.float32)
                        acc += value * load(x, 256 * b + 16 * s, 16) * lane(scales, s)
                        q, mask = q >> 2, mask >> 1
        return total(acc)

    @staticmethod
    def unpack(quant, w, out, n):
        for b in range(n // 256):
            o = 110 * b
            scales = scale_lanes(w, o + 96) * half_lanes(w, o + 108, 16)
            for h in range(2):
                mask = load(w, o + 16 * h, 16)
                for j in range(0, 16, 8):
                    q = load(w, o + 32 + 4 * j + 16 * h, 16)
                    for s in range(j + h, j + 8, 2):
                        value = astype(view((q & 3 | (mask & 1) << 2) - 4, np.int8), np.float32)
                        store(out, 256 * b + 16 * s, value * lane(scales, s))
                        q, mask = q >> 2, mask >> 1
