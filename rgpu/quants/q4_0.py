"""Q4_0: 32 weights in 18 bytes, `d` float16 then 16 bytes of nibbles (first half low, second half high); value = d·(q − 8)."""

from typing import NamedTuple

import numpy as np

from .vectors import astype, half_lanes, join, load, store, total, view, zeros


class Q4_0(NamedTuple):
    id = 2
    block = 32
    nbytes = 18

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 18] -> float32 [n, 32]."""
        d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        qs = blocks[:, 2:]
        q = np.concatenate([qs & 15, qs >> 4], axis=1).astype(np.float32)
        return d * (q - np.float32(8))

    @staticmethod
    def dot(quant, w, x, n):
        acc = zeros(32)
        for b in range(n // 32):
            qs = load(w, 18 * b + 2, 16)
            q = astype(view(join(qs & 15, qs >> 4) - 8, np.int8), np.float32)
            acc += q * load(x, 32 * b, 32) * half_lanes(w, 18 * b, 32)
        return total(acc)

    @staticmethod
    def unpack(quant, w, out, n):
        for b in range(n // 32):
            qs = load(w, 18 * b + 2, 16)
            q = astype(view(join(qs & 15, qs >> 4) - 8, np.int8), np.float32)
            store(out, 32 * b, q * half_lanes(w, 18 * b, 32))
