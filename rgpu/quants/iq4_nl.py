"""IQ4_NL: 32 weights in 18 bytes, laid out as Q4_0, but a nibble chooses from a table of unequal steps; value = d·T[q]."""

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from .vectors import astype, half_lanes, join, load, lookup, store, total, view, zeros

# ggml's kvalues_iq4nl; bytes, because a byte shuffle looks them up.
TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8).view(np.uint8)


def table_values(table, qs):
    """int8 table as uint8 [16], nibbles uint8 [..., 16] -> float32 [..., 32]: low nibbles first, then high."""
    return table.view(np.int8)[np.concatenate([qs & 15, qs >> 4], axis=-1)].astype(np.float32)


@register_jitable
def table_lanes(table, w, o):
    """32 float32 lanes: the table's entries for the 16 bytes of nibbles at `o`."""
    entries, qs = load(table, 0, 16), load(w, o, 16)
    return astype(view(join(lookup(entries, qs & 15), lookup(entries, qs >> 4)), np.int8), np.float32)


class IQ4_NL(NamedTuple):
    id = 20
    block = 32
    nbytes = 18

    @staticmethod
    def dequantize(blocks):
        """uint8 [n, 18] -> float32 [n, 32]."""
        return blocks[:, :2].copy().view(np.float16).astype(np.float32) * table_values(TABLE, blocks[:, 2:])

    @staticmethod
    def dot(quant, w, x, n):
        acc = zeros(32)
        for b in range(n // 32):
            acc += table_lanes(TABLE, w, 18 * b + 2) * load(x, 32 * b, 32) * half_lanes(w, 18 * b, 32)
        return total(acc)

    @staticmethod
    def unpack(quant, w, out, n):
        for b in range(n // 32):
            store(out, 32 * b, table_lanes(TABLE, w, 18 * b + 2) * half_lanes(w, 18 * b, 32))
