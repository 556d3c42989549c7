"""out[t] = W · x[t] for many tokens: W is unpacked once per BATCH of tokens and multiplied from vector registers.

ROWS rows of W lie side by side: four columns of a row are the four bytes of a lane, so one instruction multiplies 16 rows by four
columns of a token, which are spread to all lanes straight from its activation row (quants/activations.py). Two such vectors by a
few tokens stay in registers: integers within a group of 16 or 32 columns, float32 over the groups. Tokens may lie anywhere, so
those of an expert need no packing. Weights of F32, F16 and BF16 meet float32 inputs in the same way, a column at a time.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from ..quants.blocks import row, unpack
from ..quants.isa import emit_multiply_add
from ..quants.products import expand
from ..quants.vectors import Vector, emit_fma, prefetch, shuffle
from . import kernel, piece
from .matmul import input_bytes, row_bytes, share
from .microkernel import SQUARE, transpose
from .scalar import floats, longs

LANES, VECTORS = SQUARE, 2
ROWS = LANES * VECTORS  # also the length of a block of activations: experts.py makes one of each tile
BATCH = 128  # tokens: their inputs stay in the L2 cache while W passes
COLUMNS = 256  # unpacked at a time: with 12 KB, the L1 cache keeps them while the batch passes
WORDS = COLUMNS // 4 + 2 * COLUMNS // 16  # of 4 bytes: a row's quants, its scales and its minima (one each for 16 at most)

# Scratch of a part, in bytes from its start: words of unpacked rows [LANES, WORDS]; of rows side by side [WORDS, ROWS]; the
# addresses of the batch's inputs; its sums [BATCH, ROWS].
UNPACKED, LINES, INPUTS, SUMS = np.cumsum([0, 4 * LANES * WORDS, 4 * WORDS * ROWS, 8 * BATCH]).tolist()
SUMS_BYTES = 4 * ROWS * BATCH

I32, I64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES, INTEGERS, FLOATS = ir.VectorType(ir.IntType(8), 4 * LANES), ir.VectorType(I32, LANES), ir.VectorType(FLOAT, LANES)


def tile_tokens(isa):
    """Tokens of a tile: in 32 registers of 16 lanes, 8 sums of integers and 8 of floats fit beside the operands."""
    return 4 if isa.instance_class.lanes == LANES else 2


# ---- the tile in registers ----


def _load(builder, address, offset, kind, align):
    return builder.load(builder.inttoptr(builder.add(address, I64(offset)), kind.as_pointer()), align=align)


def _vectors(builder, address, offset, kind):
    """A line of ROWS words."""
    return [_load(builder, address, offset + 4 * LANES * v, kind, 64) for v in range(VECTORS)]


def _everywhere(builder, address, offset, kind):
    """The word at an address, in every lane."""
    vector = ir.Constant(ir.VectorType(kind, LANES), ir.Undefined)
    vector = builder.insert_element(vector, _load(builder, address, offset, kind, 4), I32(0))
    return shuffle(builder, vector, vector, [0] * LANES)


@intrinsic
def _next_inputs(typingctx, isa, addresses):
    """The int64 addresses of a tile's tokens as a tuple."""
    result = types.UniTuple(types.int64, tile_tokens(isa))

    def codegen(context, builder, sig, args):
        return cgutils.pack_array(builder, [_load(builder, args[1], 8 * i, I64, 8) for i in range(result.count)])

    return result(isa, types.int64), codegen


@intrinsic
def _load_sums(typingctx, isa, address):
    """A tile as a tuple of vectors: those of the first token, of the second, …"""
    result = types.UniTuple(Vector(types.float32, LANES), VECTORS * tile_tokens(isa))

    def codegen(context, builder, sig, args):
        return cgutils.pack_array(builder, [_load(builder, args[1], 4 * LANES * i, FLOATS, 64) for i in range(result.count)])

    return result(isa, types.int64), codegen


@intrinsic
def _store_sums(typingctx, address, sums):
    def codegen(context, builder, sig, args):
        for i, vector in enumerate(cgutils.unpack_tuple(builder, args[1])):
            target = builder.add(args[0], I64(4 * LANES * i))
            builder.store(vector, builder.inttoptr(target, FLOATS.as_pointer()), align=64)
        return context.get_dummy_value()

    return types.void(types.int64, sums), codegen


@intrinsic
def _add_integers(typingctx, quant, isa, sums, w, scales, mins, inputs, q, d, s):
    """sums + 32 columns: of W the lines from address `w` on, with `scales` and `mins`; of the inputs' rows bytes q, d and s."""
    set_, top, group = isa.instance_class, quant.instance_class.top, quant.instance_class.group

    def codegen(context, builder, sig, args):
        sums, inputs = cgutils.unpack_tuple(builder, args[2]), cgutils.unpack_tuple(builder, args[6])
        w, scales, mins = args[3:6]
        quants, factors, offsets = ([builder.add(x, plane) for x in inputs] for plane in args[7:])
        factors = [_everywhere(builder, x, 0, FLOAT) for x in factors]
        for g in range(32 // group):
            products = [ir.Constant(INTEGERS, [0] * LANES)] * len(sums)
            for c in range(g * group, (g + 1) * group, 4):
                weights = _vectors(builder, w, ROWS * c, BYTES)
                for t, x in enumerate(quants):
                    four = builder.bitcast(_everywhere(builder, x, c, I32), BYTES)
                    for v, weight in enumerate(weights, VECTORS * t):
                        products[v] = emit_multiply_add(builder, set_, top, products[v], weight, four)
            pairs = zip(*(_vectors(builder, plane, 4 * ROWS * g, FLOATS) for plane in (scales, mins)), strict=True)
            for i, (scale, minimum) in enumerate(pairs):
                for t, factor in enumerate(factors):
                    v = VECTORS * t + i
                    offset = builder.fneg(_everywhere(builder, offsets[t], 4 * g, FLOAT))
                    product = builder.fmul(builder.sitofp(products[v], FLOATS), scale)
                    sums[v] = emit_fma(builder, minimum, offset, emit_fma(builder, product, factor, sums[v]))
        return cgutils.pack_array(builder, sums)

    return sums(quant, isa, sums, *[types.int64] * 3, inputs, *[types.int64] * 3), codegen


@intrinsic
def _add_floats(typingctx, sums, w, inputs, offset):
    """sums + one column: of W the line at address `w`, of the inputs' rows the float at byte `offset`."""

    def codegen(context, builder, sig, args):
        sums, inputs = cgutils.unpack_tuple(builder, args[0]), cgutils.unpack_tuple(builder, args[2])
        weights = _vectors(builder, args[1], 0, FLOATS)
        for t, x in enumerate(inputs):
            factor = _everywhere(builder, builder.add(x, args[3]), 0, FLOAT)
            for v, weight in enumerate(weights, VECTORS * t):
                sums[v] = emit_fma(builder, weight, factor, sums[v])
        return cgutils.pack_array(builder, sums)

    return sums(sums, types.int64, inputs, types.int64), codegen


# ---- some columns of ROWS rows, for a batch ----


@piece
def _interleave(scratch, first, words):
    """LANES unpacked rows become the columns from `first` on of the lines."""
    lines = (words + SQUARE - 1) // SQUARE * SQUARE
    unpacked = floats(scratch + UNPACKED, LANES * WORDS).reshape(LANES, WORDS)
    transpose(floats(scratch + LINES + 4 * first, ROWS * lines).reshape(lines, ROWS)[:, :LANES], unpacked[:, :lines])


def _place(quant, scratch, w, w_bytes, n_rows, n):
    """Unpack `n` columns of `n_rows` rows, which begin at address `w`, and lay the rows side by side. Numba only.

    The lines are n / 4 of quants, then n / group of scales and as many of minima; or n of floats.
    """


@overload(_place)
def _place_of(quant, scratch, w, w_bytes, n_rows, n):
    def integers(quant, scratch, w, w_bytes, n_rows, n):
        groups = n // group
        for first in range(0, n_rows, LANES):
            for i in range(min(LANES, n_rows - first)):
                packed, q = row(w + (first + i) * w_bytes, row_bytes(quant, n)), scratch + UNPACKED + 4 * WORDS * i
                expand(quant, packed, row(q, n), floats(q + n, groups), floats(q + n + 4 * groups, groups), n)
            _interleave(scratch, first, n // 4 + 2 * groups)

    def singles(quant, scratch, w, w_bytes, n_rows, n):
        for first in range(0, n_rows, LANES):
            for i in range(min(LANES, n_rows - first)):
                packed, unpacked = row(w + (first + i) * w_bytes, row_bytes(quant, n)), scratch + UNPACKED + 4 * WORDS * i
                unpack(quant, packed, floats(unpacked, n), n)
            _interleave(scratch, first, n)

    if quant.instance_class.block == 1:
        return singles
    group = quant.instance_class.group
    return integers


def _add_columns(quant, isa, tile, scratch, inputs, cols, first, n):
    """tile + the placed columns, which are first … first + n - 1 of `cols`. Numba only."""


@overload(_add_columns)
def _add_columns_of(quant, isa, tile, scratch, inputs, cols, first, n):
    def integers(quant, isa, tile, scratch, inputs, cols, first, n):
        # In the inputs' rows d follows the quants, then the sums of 32 columns, then those of 16.
        d, s = cols + first // 8, cols + (cols + first) // 8 if group == 32 else cols + (cols + first) // 4
        w, scales, mins = scratch + LINES, scratch + LINES + ROWS * n, scratch + LINES + ROWS * n + 4 * ROWS * (n // group)
        for c in range(0, n, 32):
            g = c // group
            scale, minimum = scales + 4 * ROWS * g, mins + 4 * ROWS * g
            tile = _add_integers(quant, isa, tile, w + ROWS * c, scale, minimum, inputs, first + c, d + c // 8, s + 4 * g)
        return tile

    def singles(quant, isa, tile, scratch, inputs, cols, first, n):
        for c in range(n):
            tile = _add_floats(tile, scratch + LINES + 4 * ROWS * c, inputs, 4 * (first + c))
        return tile

    if quant.instance_class.block == 1:
        return singles
    group = quant.instance_class.group
    return integers


# ---- whole products ----


@piece
def _fetch(address, nbytes):
    memory = row(address, nbytes)
    for o in range(0, nbytes, 64):
        prefetch(memory, o)


def _steps(quant, isa):
    """Columns that are unpacked at a time, tokens of a tile. Numba only."""


@overload(_steps)
def _steps_of(quant, isa):
    steps = WORDS if quant.instance_class.block == 1 else COLUMNS, tile_tokens(isa)
    return lambda quant, isa: steps


@piece
def product(quant, isa, scratch, sums, w, n_rows, cols, n, ahead, ahead_bytes):
    """float32 sums [n, ROWS] = `n_rows` rows of W, which begin at address `w`, by the n inputs whose addresses lie at INPUTS.

    `sums` has room for BATCH tokens; what is written beyond row n_rows and token n has no meaning. On the way, the `ahead_bytes`
    from address `ahead` on, which are wanted next, are asked for: the processor itself does not foresee rows of a matrix.
    """
    columns, tokens = _steps(quant, isa)
    w_bytes, padded = row_bytes(quant, cols), (n + tokens - 1) // tokens * tokens
    inputs, tiles = longs(scratch + INPUTS, BATCH), floats(sums, ROWS * BATCH)
    inputs[n:padded] = inputs[n - 1]
    tiles[: ROWS * padded] = 0
    n_tiles = (cols + columns - 1) // columns * (padded // tokens)
    ahead_bytes = (ahead_bytes // n_tiles + 63) // 64 * 64  # at a time
    for first in range(0, cols, columns):
        n_columns = min(columns, cols - first)
        _place(quant, scratch, w + row_bytes(quant, first), w_bytes, n_rows, n_columns)
        for j in range(0, n, tokens):
            _fetch(ahead, ahead_bytes)
            ahead += ahead_bytes
            tile, chosen = _load_sums(isa, sums + 4 * ROWS * j), _next_inputs(isa, scratch + INPUTS + 8 * j)
            _store_sums(sums + 4 * ROWS * j, _add_columns(quant, isa, tile, scratch, chosen, cols, first, n_columns))


@piece
def aligned(memory):
    """The address of the first multiple of 64 in a byte array."""
    return (memory.ctypes.data + 63) // 64 * 64


@kernel("qqiiiiii")
def matmul_many(quant, isa, out, weight, x, n_tokens, rows, cols, part, parts):
    """out [n_tokens, rows] = W [rows, cols] · x[t]; `parts` share the blocks of ROWS rows by BATCH tokens."""
    memory = np.empty(SUMS + SUMS_BYTES + 63, np.uint8)
    scratch = aligned(memory)
    inputs, sums = longs(scratch + INPUTS, BATCH), floats(scratch + SUMS, ROWS * BATCH)
    w_bytes, x_bytes = row_bytes(quant, cols), input_bytes(quant, cols)
    blocks, batches = (rows + ROWS - 1) // ROWS, (n_tokens + BATCH - 1) // BATCH
    begin, end = share(blocks * batches, part, parts)
    for item in range(begin, end):
        token, first = item // blocks * BATCH, item % blocks * ROWS
        n, n_rows = min(BATCH, n_tokens - token), min(ROWS, rows - first)
        for j in range(n):
            inputs[j] = x + (token + j) * x_bytes
        w = weight + first * w_bytes
        product(quant, isa, scratch, scratch + SUMS, w, n_rows, cols, n, w + ROWS * w_bytes, ROWS * w_bytes)
        for j in range(n):
            o = floats(out + 4 * ((token + j) * rows + first), n_rows)
            for r in range(n_rows):
                o[r] = sums[ROWS * j + r]
