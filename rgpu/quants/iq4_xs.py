"""IQ4_XS: 256 weights in 136 bytes: d float16, eight 6-bit scales (high pairs in a uint16, low nibbles in 4 bytes), 128 bytes.

Sub-block j of 32 weights is 16 of those bytes, nibbles as in IQ4_NL; value = d·(scale_j − 32)·T[q].
"""

from typing import NamedTuple

import numpy as np

from .blocks import u16, u32
from .iq4_nl import TABLE, VALUES, table_lanes, table_values
from .vectors import astype, full, halves, load, view

NIBBLES, PAIRS = np.arange(0, 32, 4, dtype=np.uint32), np.arange(0, 16, 2, dtype=np.uint32)  # where each scale's bits begin


class IQ4_XS(NamedTuple):
    id = 23
    block = 256
    nbytes = 136
    group, zero, top = 32, 128, 241

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 136] -> float32 [n, 256]."""
        n = len(blocks)
        d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        high = blocks[:, 2:4].copy().view(np.uint16) >> PAIRS & 3
        low = blocks[:, 4:8].copy().view(np.uint32) >> NIBBLES & 15
        scales = d * ((low | high << 4).astype(np.float32) - np.float32(32))
        return (scales[..., None] * table_values(VALUES, blocks[:, 8:].reshape(n, 8, 16))).reshape(n, 256)

    @staticmethod
    def integers(quant, w, o):
        return (
            table_lanes(TABLE, w, o + 8), table_lanes(TABLE, w, o + 24),
            table_lanes(TABLE, w, o + 40), table_lanes(TABLE, w, o + 56),
            table_lanes(TABLE, w, o + 72), table_lanes(TABLE, w, o + 88),
            table_lanes(TABLE, w, o + 104), table_lanes(TABLE, w, o + 120),
        )  # fmt: skip

    @staticmethod
    def scales(quant, w, o, count):
        low = full(u32(w, o + 4), 8) >> load(NIBBLES, 0, 8) & 15
        high = full(np.uint32(u16(w, o + 2)), 8) >> load(PAIRS, 0, 8) & 3
        return astype(view((low | high << 4) - 32, np.int32), np.float32) * halves(full(u16(w, o), 8))
