"""BF16: the upper half of a float32."""

from typing import NamedTuple

import numpy as np

from .blocks import from_bits, u16
from .vectors import astype, load, total, view, zeros


class BF16(NamedTuple):
    id = 30
    block = 1
    nbytes = 2

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 2] -> float32 [n, 1]."""
        return (blocks.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    @staticmethod
    def dot(quant, w, x, n):
        acc = zeros(32)
        whole = n // 32 * 32
        for i in range(0, whole, 32):
            q = view(astype(view(load(w, 2 * i, 64), np.uint16), np.uint32) << 16, np.float32)
            acc += q * load(x, i, 32)
        tail = np.float32(0)
        for i in range(whole, n):
            tail += from_bits(np.uint32(u16(w, 2 * i)) << np.uint32(16)) * x[i]
        return total(acc) + tail

    @staticmethod
    def unpack(quant, w, out, n):
        for i in range(n):
            out[i] = from_bits(np.uint32(u16(w, 2 * i)) << np.uint32(16))
