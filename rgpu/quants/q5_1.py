"""Q5_1: 32 weights in 24 bytes, `d`, `m` float16, the 32 fifth bits, then 16 bytes of nibbles as Q4_1; value = d·q + m."""

from typing import NamedTuple

import numpy as np

from .q5_0 import five_bit_lanes, five_bits
from .vectors import astype, half_lanes, load, store, total, zeros


class Q5_1(NamedTuple):
    id = 7
    block = 32
    nbytes = 24

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 24] -> float32 [n, 32]."""
        d, m = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]
        return d * five_bits(blocks[:, 4:8], blocks[:, 8:]).astype(np.float32) + m

    @staticmethod
    def dot(quant, w, x, n):
        acc = zeros(32)
        for b in range(n // 32):
            q = astype(five_bit_lanes(w, 24 * b + 4), np.float32)
            acc += (q * half_lanes(w, 24 * b, 32) + half_lanes(w, 24 * b + 2, 32)) * load(x, 32 * b, 32)
        return total(acc)

    @staticmethod
    def unpack(quant, w, out, n):
        for b in range(n // 32):
            q = astype(five_bit_lanes(w, 24 * b + 4), np.float32)
            store(out, 32 * b, q * half_lanes(w, 24 * b, 32) + half_lanes(w, 24 * b + 2, 32))
