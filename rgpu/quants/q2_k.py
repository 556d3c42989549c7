"""Q2_K: 256 weights in 84 bytes: sixteen bytes of (4-bit scale, 4-bit minimum), 64 bytes of 2-bit quants, d, dmin float16.

Weight 128c + 32k + i is bits 2k of byte 32c + i; sub-block j of 16 weights: d·scale_j·q − dmin·min_j.
"""

from typing import NamedTuple

import numpy as np

from .blocks import u16
from .vectors import astype, fields, full, halves, load


class Q2_K(NamedTuple):
    id = 10
    block = 256
    nbytes = 84
    group, zero, top = 16, 0, 3

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 84] -> float32 [n, 256]."""
        n = len(blocks)
        d, dmin = blocks[:, 80:].copy().view(np.float16).astype(np.float32).T[..., None]
        scales = d * (blocks[:, :16] & 15).astype(np.float32)
        mins = dmin * (blocks[:, :16] >> 4).astype(np.float32)
        qs = blocks[:, 16:80].reshape(n, 2, 1, 32)
        q = np.concatenate([qs >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(n, 16, 16).astype(np.float32)
        return (scales[..., None] * q - mins[..., None]).reshape(n, 256)

    @staticmethod
    def integers(quant, w, o):
        return fields(load(w, o + 16, 32), 2, 4), fields(load(w, o + 48, 32), 2, 4)

    @staticmethod
    def scales(quant, w, o, count):
        packed = load(w, o, 16)
        scales = astype(packed & 15, np.float32) * halves(full(u16(w, o + 80), 16))
        return scales, astype(packed >> 4, np.float32) * halves(full(u16(w, o + 82), 16))
