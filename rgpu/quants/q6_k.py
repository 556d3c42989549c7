"""Q6_K: 256 weights in 210 bytes: 128 bytes of low nibbles, 64 of high pairs of bits, sixteen int8 scales, d float16 last.

In each half of 128 weights, run k of 32: nibble k // 2 of low byte 32(k % 2) + i, bits 2k of high byte i.
Sub-block j of 16 weights: d·scale_j·(q − 32).
"""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .vectors import astype, half_lanes, lane, load, store, total, view, zeros


@register_jitable
def centred(q):
    """Lanes of 6 bits -> float32 lanes less 32."""
    return astype(view(q - 32, np.int8), np.float32)


class Q6_K(NamedTuple):
    id = 14
    block = 256
    nbytes = 210

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 210] -> float32 [n, 256]."""
        n = len(blocks)
        ql = blocks[:, :128].reshape(n, 2, 1, 64)
        qh = blocks[:, 128:192].reshape(n, 2, 1, 32)
        low = np.concatenate([ql & 15, ql >> 4], axis=2).reshape(n, 16, 16)
        high = np.concatenate([qh >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(n, 16, 16)
        d = blocks[:, 208:].copy().view(np.float16).astype(np.float32)
        scales = d * blocks[:, 192:208].view(np.int8).astype(np.float32)
        return (scales[..., None] * ((low | high << 4).astype(np.float32) - np.float32(32))).reshape(n, 256)

    @staticmethod
    def dot(quant, w, x, n):
        acc = zeros(16)
        for b in range(n // 256):
            o = 210 * b
            scales = astype(view(load(w, o + 192, 16), np.int8), np.float32) * half_lanes(w, o + 208, 16)
            for j in range(0, 16, 8):
                for s in range(j, j + 2):
                    p, i = o + 8 * j + 16 * (s - j), 256 * b + 16 * s
                    a, c, high = load(w, p, 16), load(w, p + 32, 16), load(w, o + 128 + 4 * j + 16 * (s - j), 16)
                    acc += centred(a & 15 | (high & 3) << 4) * load(x, i, 16) * lane(scales, s)
                    acc += centred(c & 15 | (high & 12) << 2) * load(x, i + 32, 16) * lane(scales, s + 2)
                    acc += centred(a >> 4 | high & 48) * load(x, i + 64, 16) * lane(scales, s + 4)
                    acc += centred(c >> 4 | (high & 192) >> 2) * load(x, i + 96, 16) * lane(scales, s + 6)
        return total(acc)

    @staticmethod
    def unpack(quant, w, out, n):
        for b in range(n // 256):
            o = 210 * b
            scales = astype(view(load(w, o + 192, 16), np.int8), np.float32) * half_lanes(w, o + 208, 16)
            for j in range(0, 16, 8):
                for s in range(j, j + 2):
                    p, i = o + 8 * j + 16 * (s - j), 256 * b + 16 * s
                    a, c, high = load(w, p, 16), load(w, p + 32, 16), load(w, o + 128 + 4 * j + 16 * (s - j), 16)
                    store(out, i, centred(a & 15 | (high & 3) << 4) * lane(scales, s))
                    store(out, i + 32, centred(c & 15 | (high & 12) << 2) * lane(scales, s + 2))
                    store(out, i + 64, centred(a >> 4 | high & 48) * lane(scales, s + 4))
                    store(out, i + 96, centred(c >> 4 | (high & 192) >> 2) * lane(scales, s + 6))
