"""MXFP4: 32 weights in 17 bytes, an E8M0 exponent then 16 bytes of E2M1 nibbles as Q4_0 (OCP Microscaling Formats v1.0).

The table holds doubled E2M1 values, hence value = 2^(e − 128)·T[q]; as in ggml, code 8 is plain zero and not −0.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .blocks import from_bits
from .iq4_nl import table_lanes, table_values
from .vectors import load, store, total, zeros

TABLE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8).view(np.uint8)


@register_jitable
def scale(e):
    """2^(e − 128) as float32: the exponents 0 and 1 are subnormal numbers."""
    e = np.uint32(e)
    return from_bits(np.uint32(0x200000) << e if e < 2 else (e - np.uint32(1)) << np.uint32(23))


class MXFP4(NamedTuple):
    id = 39
    block = 32
    nbytes = 17

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 17] -> float32 [n, 32]."""
        return np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128) * table_values(TABLE, blocks[:, 1:])

    @staticmethod
    def dot(quant, w, x, n):
        acc = zeros(32)
        for b in range(n // 32):
            acc += table_lanes(TABLE, w, 17 * b + 1) * load(x, 32 * b, 32) * scale(w[17 * b])
        return total(acc)

    @staticmethod
    def unpack(quant, w, out, n):
        for b in range(n // 32):
            store(out, 32 * b, table_lanes(TABLE, w, 17 * b + 1) * scale(w[17 * b]))
