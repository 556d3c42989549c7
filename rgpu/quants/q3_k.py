"""Q3_K: 256 weights in 110 bytes: 32 bytes of high bits, 64 bytes of 2-bit quants, sixteen 6-bit scales in 12 bytes, d float16.

Low bits as Q2_K; 4 is subtracted where bit n // 32 of high byte n % 32 is 0. Sub-block j of 16 weights: d·(scale_j − 32)·q.
"""

from typing import NamedTuple

import numpy as np

from .blocks import u16
from .vectors import astype, fields, full, halves, load, view


class Q3_K(NamedTuple):
    id = 11
    block = 256
    nbytes = 110
    group, zero, top = 16, 4, 7

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
    def integers(quant, w, o):
        high = load(w, o, 32)
        return (
            fields(load(w, o + 32, 32), 2, 4) | fields(high, 1, 4) << 2,
            fields(load(w, o + 64, 32), 2, 4) | fields(high >> 4, 1, 4) << 2,
        )

    @staticmethod
    def scales(quant, w, o, count):
        packed = fields(load(w, o + 96, 8), 4, 2) | fields(load(w, o + 104, 4), 2, 4) << 4
        return astype(view(packed - 32, np.int8), np.float32) * halves(full(u16(w, o + 108), 16))
