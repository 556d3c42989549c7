"""Q5_K: 256 weights in 176 bytes: d, dmin float16, 12 bytes of scales and minima as Q4_K, 32 bytes of fifth bits, 128 of nibbles.

As Q4_K, and bit j of high byte i is the fifth bit of weight i of sub-block j: d·scale_j·q − dmin·min_j.
"""

from typing import NamedTuple

import numpy as np

from .q4_k import scale_and_min_lanes, scales_and_mins
from .vectors import fields, load


class Q5_K(NamedTuple):
    id = 13
    block = 256
    nbytes = 176
    group, zero, top = 32, 0, 31

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
    def integers(quant, w, o):
        high = load(w, o + 16, 32)
        return (
            fields(load(w, o + 48, 32), 4, 2) | fields(high, 1, 2) << 4,
            fields(load(w, o + 80, 32), 4, 2) | fields(high >> 2, 1, 2) << 4,
            fields(load(w, o + 112, 32), 4, 2) | fields(high >> 4, 1, 2) << 4,
            fields(load(w, o + 144, 32), 4, 2) | fields(high >> 6, 1, 2) << 4,
        )

    @staticmethod
    def scales(quant, w, o, count):
        return scale_and_min_lanes(w, o)
