"""F32: plain float32, little-endian. Norms, routers and small tensors stay in it; also a KV cache type, hence `pack`."""

from typing import NamedTuple

import numpy as np

from .blocks import f32
from .vectors import load, store, total, view, zeros


class F32(NamedTuple):
    id = 0
    block = 1
    nbytes = 4

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 4] -> float32 [n, 1]."""
        return blocks.copy().view(np.float32)

    @staticmethod
    def dot(quant, w, x, n):
        acc = zeros(32)
        whole = n // 32 * 32
        for i in range(0, whole, 32):
            acc += view(load(w, 4 * i, 128), np.float32) * load(x, i, 32)
        tail = np.float32(0)
        for i in range(whole, n):
            tail += f32(w, 4 * i) * x[i]
        return total(acc) + tail

    @staticmethod
    def unpack(quant, w, out, n):
        for i in range(n):
            out[i] = f32(w, 4 * i)

    @staticmethod
    def pack(quant, x, w, n):
        whole = n // 32 * 32
        for i in range(0, whole, 32):
            store(w, 4 * i, view(load(x, i, 32), np.uint8))
        for i in range(whole, n):
            store(w, 4 * i, view(load(x, i, 1), np.uint8))
