"""Q4_K: 256 weights in 144 bytes: d, dmin float16, 12 bytes of eight 6-bit (scale, minimum) pairs, 128 bytes of nibbles.

Weight n of sub-block j = n // 32 is d·scale_j·q - dmin·min_j; bytes 32c .. 32c+31 of the nibbles hold sub-block 2c in
their low halves and 2c+1 in their high halves.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .blocks import u16
from .vectors import astype, fields, full, halves, join, load


def scales_and_mins(packed):
    """uint8 [n, 12] -> two uint8 arrays [n, 8]: the 6-bit scales and minima that Q4_K and Q5_K share."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    mins = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scales, mins


@register_jitable
def scale_and_min_lanes(w, o):
    """8 float32 lanes of d·scale and 8 of dmin·min, from the block at `o` (d, dmin and the 12 packed bytes)."""
    a, b, c = load(w, o + 4, 4), load(w, o + 8, 4), load(w, o + 12, 4)
    scales = join(a & 63, c & 15 | (a >> 6) << 4)
    mins = join(b & 63, c >> 4 | (b >> 6) << 4)
    return astype(scales, np.float32) * halves(full(u16(w, o), 8)), astype(mins, np.float32) * halves(full(u16(w, o + 2), 8))


class Q4_K(NamedTuple):
    id = 12
    block = 256
    nbytes = 144
    group, zero, top = 32, 0, 15

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 144] -> float32 [n, 256]."""
        n = len(blocks)
        d, dmin = blocks[:, 0:4].copy().view(np.float16).astype(np.float32).T
        scales, mins = scales_and_mins(blocks[:, 4:16])
        qs = blocks[:, 16:].reshape(n, 4, 1, 32)
        q = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(n, 8, 32).astype(np.float32)
        scale = d[:, None] * scales.astype(np.float32)
        minimum = dmin[:, None] * mins.astype(np.float32)
        return (scale[..., None] * q - minimum[..., None]).reshape(n, 256)

    @staticmethod
    def integers(quant, w, o):
        return (
            fields(load(w, o + 16, 32), 4, 2), fields(load(w, o + 48, 32), 4, 2),
            fields(load(w, o + 80, 32), 4, 2), fields(load(w, o + 112, 32), 4, 2),
        )  # fmt: skip

    @staticmethod
    def scales(quant, w, o, count):
        return scale_and_min_lanes(w, o)
