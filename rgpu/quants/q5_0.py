"""Q5_0: 32 weights in 22 bytes, `d` float16, the 32 fifth bits, then 16 bytes of nibbles as Q4_0; value = d·(q − 16)."""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .blocks import u32
from .vectors import bits, every, fields, halves, load


def five_bits(high, qs):
    """uint8 [n, 4] and [n, 16] -> uint8 [n, 32]: the fifth bits over the nibbles, as in Q5_0 and Q5_1."""
    return np.concatenate([qs & 15, qs >> 4], axis=1) | np.unpackbits(high, axis=1, bitorder="little") << 4


@register_jitable
def five_bit_lanes(w, o):
    """32 uint8 lanes from the four bytes of fifth bits at `o` and the nibbles behind them."""
    return fields(load(w, o + 4, 16), 4, 2) | bits(u32(w, o)) << 4


class Q5_0(NamedTuple):
    id = 6
    block = 32
    nbytes = 22
    group, zero, top = 32, 16, 31

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 22] -> float32 [n, 32]."""
        d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        return d * (five_bits(blocks[:, 2:6], blocks[:, 6:]).astype(np.float32) - np.float32(16))

    @staticmethod
    def integers(quant, w, o):
        return (five_bit_lanes(w, o + 2),)

    @staticmethod
    def scales(quant, w, o, count):
        return halves(every(w, o, 22, count, np.uint16))
