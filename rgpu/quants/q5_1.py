"""Q5_1: 32 weights in 24 bytes, `d`, `m` float16, the 32 fifth bits, then 16 bytes of nibbles as Q4_1; value = d·q + m."""

from typing import NamedTuple

import numpy as np

from .q5_0 import five_bit_lanes, five_bits
from .vectors import every, halves


class Q5_1(NamedTuple):
    id = 7
    block = 32
    nbytes = 24
    group, zero, top = 32, 0, 31

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 24] -> float32 [n, 32]."""
        d, m = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]
        return d * five_bits(blocks[:, 4:8], blocks[:, 8:]).astype(np.float32) + m

    @staticmethod
    def integers(quant, w, o):
        return (five_bit_lanes(w, o + 4),)

    @staticmethod
    def scales(quant, w, o, count):
        both = every(w, o, 24, count, np.uint32)
        return halves(both), halves(both >> 16) * -1
