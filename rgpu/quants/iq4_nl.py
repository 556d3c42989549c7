"""IQ4_NL: 32 weights in 18 bytes, laid out as Q4_0, but a nibble chooses from a table of unequal steps; value = d·T[q]."""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .vectors import every, fields, halves, load, lookup

# ggml's kvalues_iq4nl, and the same as unsigned bytes (zero is 128), which a byte shuffle looks up.
VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
TABLE = (VALUES + 128).astype(np.uint8)


def table_values(values, qs):
    """float32 [16], nibbles uint8 [..., 16] -> float32 [..., 32]: low nibbles first, then high."""
    return values[np.concatenate([qs & 15, qs >> 4], axis=-1)]


@register_jitable
def table_lanes(table, w, o):
    """32 uint8 lanes: the table's entries for the 16 bytes of nibbles at `o`."""
    return lookup(load(table, 0, 16), fields(load(w, o, 16), 4, 2))


class IQ4_NL(NamedTuple):
    id = 20
    block = 32
    nbytes = 18
    group, zero, top = 32, 128, 241

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 18] -> float32 [n, 32]."""
        return blocks[:, :2].copy().view(np.float16).astype(np.float32) * table_values(VALUES, blocks[:, 2:])

    @staticmethod
    def integers(quant, w, o):
        return (table_lanes(TABLE, w, o + 2),)

    @staticmethod
    def scales(quant, w, o, count):
        return halves(every(w, o, 18, count, np.uint16))
