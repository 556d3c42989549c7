"""Q5_K: 256 weights in 176 bytes: d, dmin float16, 12 bytes of scales and minima as Q4_K, 32 bytes of fifth bits, 128 of nibbles.

As Q4_K, and bit j of high byte i is the fifth bit of weight i of sub-block j: d·scale_j·q − dmin·min_j.
"""

from typing import NamedTuple

import numpy as np

from .q4_k import scale_and_min_lanes, scales_and_mins
from .vectors import astype, lane, load, store, total, zeros


class Q5_K(NamedTuple):
    id = 13
    block = 256
    nbytes = 176

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 176] -> float32 [n, 256]."""
        n = len(blocks)
        d, dmin = blocks[:, 0:4].copy().view(np.float16).astype(np.float32).T
        scales, mins = scales_and_mins(blocks[:, 4:16])
        qs = blocks[:, 48:].reshape(n, 4, 1, 32)
        bit = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
        q = (np.concatenate([qs & 15, qs >> 4], axis=2).reshape(n, 8, 32) | bit << 4).astype(np.float32)
        scale = d[:, None] * scales.astype(np.float32)
        minimum = dmin[:, None] * mins.astype(np.float32)
        return (scale[..., None] * q - minimum[..., None]).reshape(n, 256)

    @staticmethod
    def dot(quant, w, x, n):
        acc = zeros(32)
        for b in range(n // 256):
            o = 176 * b
            scales, mins = scale_and_min_lanes(w, o)
            high = load(w, o + 16, 32)
            for j in range(0, 8, 2):
                qs = load(w, o + 48 + 16 * j, 32)
                i = 256 * b + 32 * j
                even = astype(qs & 15 | (high & 1) << 4, np.float32)
                odd = astype(qs >> 4 | (high & 2) << 3, np.float32)
                acc += (even * lane(scales, j) - lane(mins, j)) * load(x, i, 32)
                acc += (odd * lane(scales, j + 1) - lane(mins, j + 1)) * load(x, i + 32, 32)
                high = high >> 2
        return total(acc)

    @staticmethod
    def unpack(quant, w, out, n):
        for b in range(n // 256):
            o = 176 * b
            scales, mins = scale_and_min_lanes(w, o)
            high = load(w, o + 16, 32)
            for j in range(0, 8, 2):
                qs = load(w, o + 48 + 16 * j, 32)
                i = 256 * b + 32 * j
                even = astype(qs & 15 | (high & 1) << 4, np.float32)
                odd = astype(qs >> 4 | (high & 2) << 3, np.float32)
                store(out, i, even * lane(scales, j) - lane(mins, j))
                store(out, i + 32, odd * lane(scales, j + 1) - lane(mins, j + 1))
                high = high >> 2
