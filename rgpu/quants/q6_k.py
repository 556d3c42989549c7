"""Q6_K: 256 weights in 210 bytes: 128 bytes of low nibbles, 64 of high pairs of bits, sixteen int8 scales, d float16 last.

In each half of 128 weights, run k of 32: nibble k // 2 of low byte 32(k % 2) + i, bits 2k of high byte i.
Sub-block j of 16 weights: d·scale_j·(q − 32).
"""

from typing import NamedTuple

import numpy as np

from .blocks import u16
from .vectors import astype, fields, full, halves, load, view


class Q6_K(NamedTuple):
    id = 14
    block = 256
    nbytes = 210
    group, zero, top = 16, 32, 63

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
    def integers(quant, w, o):
        return (
            fields(load(w, o, 64), 4, 2) | fields(load(w, o + 128, 32), 2, 4) << 4,
            fields(load(w, o + 64, 64), 4, 2) | fields(load(w, o + 160, 32), 2, 4) << 4,
        )

    @staticmethod
    def scales(quant, w, o, count):
        return astype(view(load(w, o + 192, 16), np.int8), np.float32) * halves(full(u16(w, o + 208), 16))
