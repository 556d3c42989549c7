"""Q8_0: 32 weights in 34 bytes, `d` float16 then 32 int8; value = d·q. Also a KV cache type, hence `pack`."""

from typing import NamedTuple

import numpy as np

from .blocks import from_bits, to_half
from .vectors import astype, every, halves, largest, load, store, view

SMALLEST = np.float32(2**-128)  # 1/d overflows; d is 0 in float16 long before, so the quants don't matter


class Q8_0(NamedTuple):
    id = 8
    block = 32
    nbytes = 34
    group, zero, top = 32, 128, 255

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 34] -> float32 [n, 32]."""
        d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        return d * blocks[:, 2:].view(np.int8).astype(np.float32)

    @staticmethod
    def integers(quant, w, o):
        return (load(w, o + 2, 32) + 128,)

    @staticmethod
    def scales(quant, w, o, count):
        return halves(every(w, o, 34, count, np.uint16))

    @staticmethod
    def pack(quant, x, w, n):
        for b in range(n // 32):
            values = load(x, 32 * b, 32)
            # Without their sign, floats order as their bits do.
            d = from_bits(largest(view(values, np.uint32) & 0x7FFFFFFF)) / np.float32(127)
            scaled = values * (np.float32(1) / d if d > SMALLEST else np.float32(0))
            # Halves are rounded away from zero, as ggml does (C's roundf), not to even.
            whole = astype(scaled, np.int8)
            q = whole + astype((scaled - astype(whole, np.float32)) * 2, np.int8)
            bits = to_half(d)
            w[34 * b], w[34 * b + 1] = bits & 255, bits >> 8
            store(w, 34 * b + 2, view(q, np.uint8))
