"""Q4_0: 32 weights in 18 bytes, `d` float16 then 16 bytes of nibbles (first half low, second half high); value = d·(q − 8)."""

from typing import NamedTuple

import numpy as np

from .vectors import every, fields, halves, load


class Q4_0(NamedTuple):
    id = 2
    block = 32
    nbytes = 18
    group, zero, top = 32, 8, 15

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 18] -> float32 [n, 32]."""
        d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        qs = blocks[:, 2:]
        q = np.concatenate([qs & 15, qs >> 4], axis=1).astype(np.float32)
        return d * (q - np.float32(8))

    @staticmethod
    def integers(quant, w, o):
        return (fields(load(w, o + 2, 16), 4, 2),)

    @staticmethod
    def scales(quant, w, o, count):
        return halves(every(w, o, 18, count, np.uint16))
