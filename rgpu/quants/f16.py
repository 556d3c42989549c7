"""F16: IEEE half precision. The default KV cache type, hence `pack`."""

from typing import NamedTuple

import numpy as np

from .blocks import half
from .vectors import astype, load, store, total, view, zeros


class F16(NamedTuple):
    id = 1
    block = 1
    nbytes = 2

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 2] -> float32 [n, 1]."""
        return blocks.copy().view(np.float16).astype(np.float32)

    @staticmethod
    def dot(quant, w, x, n):
        acc = zeros(32)
        whole = n // 32 * 32
        for i in range(0, whole, 32):
            acc += astype(view(load(w, 2 * i, 64), np.float16), np.float32) * load(x, i, 32)
        tail = np.float32(0)
        for i in range(whole, n):
            tail += half(w, 2 * i) * x[i]
        return total(acc) + tail

    @staticmethod
    def unpack(quant, w, out, n):
        whole = n // 32 * 32
        for i in range(0, whole, 32):
            store(out, i, astype(view(load(w, 2 * i, 64), np.float16), np.float32))
        for i in range(whole, n):
            out[i] = half(w, 2 * i)

    @staticmethod
    def pack(quant, x, w, n):
        whole = n // 32 * 32
        for i in range(0, whole, 32):
            store(w, 2 * i, view(astype(load(x, i, 32), np.float16), np.uint8))
        for i in range(whole, n):
            store(w, 2 * i, view(astype(load(x, i, 1), np.float16), np.uint8))
