"""out[t] = W · x[t] for few tokens: each row of W is read once, as it lies in the file, and multiplied with every token's input.

A product reads its input as the type of W wants it: int8 activation rows (quants/activations.py) for types of blocks, float32
for F32, F16 and BF16. For more tokens than FEW, tile.py is faster.
"""

from numba.extending import overload

from ..quants import activations
from ..quants.blocks import dot, row
from ..quants.products import dot_int8
from . import kernel, piece
from .scalar import floats

FEW = 3


def row_bytes(quant, cols):
    """Bytes of a row of W. Numba only."""


@overload(row_bytes)
def _row_bytes(quant, cols):
    block, nbytes = quant.instance_class.block, quant.instance_class.nbytes
    return lambda quant, cols: cols // block * nbytes


def input_bytes(quant, cols):
    """Bytes of a row of the input. Numba only."""


@overload(input_bytes)
def _input_bytes(quant, cols):
    if quant.instance_class.block == 1:
        return lambda quant, cols: 4 * cols
    return lambda quant, cols: activations.row_bytes(cols)


def row_product(quant, isa, w, x, cols):
    """The row of W at address `w` by the input row at address `x`. Numba only."""


@overload(row_product)
def _row_product(quant, isa, w, x, cols):
    if quant.instance_class.block == 1:
        return lambda quant, isa, w, x, cols: dot(quant, row(w, row_bytes(quant, cols)), floats(x, cols), cols)

    def integer(quant, isa, w, x, cols):
        return dot_int8(quant, isa, row(w, row_bytes(quant, cols)), row(x, activations.row_bytes(cols)), cols)

    return integer


@piece
def share(n, part, parts):
    """First and last + 1 of the items 0 … n - 1 that `part` does."""
    return n * part // parts, n * (part + 1) // parts


@kernel("iiiii")
def quantize(rows, x, x_stride, n_rows, n, part, parts):
    """Activation rows of float32 x [n_rows, n], whose rows are `x_stride` floats apart."""
    first, last = share(n_rows, part, parts)
    nbytes = activations.row_bytes(n)
    for r in range(first, last):
        activations.quantize(floats(x + 4 * r * x_stride, n), row(rows + r * nbytes, nbytes))


@kernel("qqiiiiii")
def matmul(quant, isa, out, weight, x, n_tokens, rows, cols, part, parts):
    """out [n_tokens, rows] = W [rows, cols] · x[t]; `parts` share the rows."""
    first, last = share(rows, part, parts)
    w_bytes, x_bytes = row_bytes(quant, cols), input_bytes(quant, cols)
    for r in range(first, last):
        for t in range(n_tokens):
            floats(out + 4 * (t * rows + r), 1)[0] = row_product(quant, isa, weight + r * w_bytes, x + t * x_bytes, cols)
