"""Q2_K: 256 weights in 84 bytes: sixteen bytes of (4-bit scale, 4-bit minimum), 64 bytes of 2-bit quants, d, dmin float16.

Weight 128c + 32k + i is bits 2k of byte 32c + i; sub-block j of 16 weights: d·scale_j·q − dmin·min_j.
"""

from typing import NamedTuple

import numpy as np

from .vectors import astype, half_lanes, lane, load, store, total, zeros


class Q2_K(NamedTuple):
    id = 10
    block = 256
    nbytes = 84

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
    def dot(quant, w, x, n):
        acc = zeros(16)
        for b in range(n // 256):
            o = 84 * b
            packed = load(w, o, 16)
            scales = astype(packed & 15, np.float32) * half_lanes(w, o + 80, 16)
            mins = astype(packed >> 4, np.float32) * half_lanes(w, o + 82, 16)
            for j in range(0, 16, 8):
                for h in range(2):
                    q = load(w, o + 16 + 4 * j + 16 * h, 16)
                    for s in range(j + h, j + 8, 2):
                        acc += (astype(q & 3, np.float32) * lane(scales, s) - lane(mins, s)) * load(x, 256 * b + 16 * s, 16)
                        q = q >> 2
        return total(acc)

    @staticmethod
    def unpack(quant, w, out, n):
        for b in range(n // 256):
            o = 84 * b
            packed = load(w, o, 16)
            scales = astype(packed & 15, np.float32) * half_lanes(w, o + 80, 16)
            mins = astype(packed >> 4, np.float32) * half_lanes(w, o + 82, 16)
            for j in range(0, 16, 8):
                for h in range(2):
                    q = load(w, o + 16 + 4 * j + 16 * h, 16)
                    for s in range(j + h, j + 8, 2):
                        store(out, 256 * b + 16 * s, astype(q & 3, np.float32) * lane(scales, s) - lane(mins, s))
                        q = q >> 2
