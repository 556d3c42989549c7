"""Q4_1: 32 weights in 20 bytes, `d`, `m` float16 then 16 bytes of nibbles (first half low, second half high); value = d·q + m."""

from typing import NamedTuple

import numpy as np

from .vectors import astype, half_lanes, join, load, store, total, zeros


class Q4_1(NamedTuple):
    id = 3
    block = 32
    nbytes = 20

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 20] -> float32 [n, 32]."""
        d, m = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]
        qs = blocks[:, 4:]
        return d * np.concatenate([qs & 15, qs >> 4], axis=1).astype(np.float32) + m

    @staticmethod
    def dot(quant, w, x, n):
        acc = zeros(32)
        for b in range(n // 32):
            qs = load(w, 20 * b + 4, 16)
            q = astype(join(qs & 15, qs >> 4), np.float32)
            acc += (q * half_lanes(w, 20 * b, 32) + half_lanes(w, 20 * b + 2, 32)) * load(x, 32 * b, 32)
        return total(acc)

    @staticmethod
    def unpack(quant, w, out, n):
        for b in range(n // 32):
            qs = load(w, 20 * b + 4, 16)
            q = astype(join(qs & 15, qs >> 4), np.float32)
            store(out, 32 * b, q * half_lanes(w, 20 * b, 32) + half_lanes(w, 20 * b + 2, 32))
