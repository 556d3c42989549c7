"""MXFP4: 32 weights in 17 bytes, an E8M0 exponent then 16 bytes of E2M1 nibbles as Q4_0 (OCP Microscaling Formats v1.0).

The table holds doubled E2M1 values, hence value = 2^(e − 128)·T[q]; as in ggml, code 8 is plain zero and not −0.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .iq4_nl import table_lanes, table_values
from .vectors import astype, every, view

VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
TABLE = (VALUES + 12).astype(np.uint8)


@register_jitable
def powers(e):
    """uint8 lanes -> float32 lanes of 2^(e − 128), as two factors, because 2^-127 and 2^-128 are no normal numbers."""
    e = astype(e, np.uint32)
    half = e >> 1
    return view((half + 63) << 23, np.float32) * view((e - half + 63) << 23, np.float32)


class MXFP4(NamedTuple):
    id = 39
    block = 32
    nbytes = 17
    group, zero, top = 32, 12, 24

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 17] -> float32 [n, 32]."""
        return np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128) * table_values(VALUES, blocks[:, 1:])

    @staticmethod
    def integers(quant, w, o):
        return (table_lanes(TABLE, w, o + 1),)

    @staticmethod
    def scales(quant, w, o, count):
        return powers(every(w, o, 17, count, np.uint8))
