"""Q4_1: 32 weights in 20 bytes, `d`, `m` float16 then 16 bytes of nibbles (first half low, second half high); value = d·q + m."""

from typing import NamedTuple

import numpy as np

from .vectors import every, fields, halves, load


class Q4_1(NamedTuple):
    id = 3
    block = 32
    nbytes = 20
    group, zero, top = 32, 0, 15

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 20] -> float32 [n, 32]."""
        d, m = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]
        qs = blocks[:, 4:]
        return d * np.concatenate([qs & 15, qs >> 4], axis=1).astype(np.float32) + m

    @staticmethod
    def integers(quant, w, o):
        return (fields(load(w, o + 4, 16), 4, 2),)

    @staticmethod
    def scales(quant, w, o, count):
        both = every(w, o, 20, count, np.uint32)
        return halves(both), halves(both >> 16) * -1
