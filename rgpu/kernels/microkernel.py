"""Small float32 products at the speed of the registers, and the transposed copies they need: for attention and delta rule.

A tile of `out` stays in vector registers while `a` is read a number at a time and `b` a row of lanes at a time. Numba's own
loops do not hold a tile: LLVM vectorises the innermost loop only and stores every sum after each step.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..quants.isa import best
from ..quants.vectors import call, emit_fma, shuffle
from . import piece
from .scalar import LINE

ROWS, LANES = 8, 32  # the granularity of `out`: callers pad to it
# A register tile: rows, vectors and lanes of a vector. 16 of the 32 registers of AVX-512; 8 of the 16 of AVX2, so that two
# vectors of `b` and one number of `a` fit beside them.
TILE_ROWS, TILE_VECTORS, VECTOR = (8, 2, 16) if best().lanes == 16 else (4, 2, 8)

FLOAT, LONG = ir.FloatType(), ir.IntType(64)
SQUARE = 16  # a block of a transposed copy


def _at(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _fetch(builder, row, offset, far, width):
    """IR: ask for the next cache line of rows that are `far` bytes apart and `width` long."""
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    here, done = builder.load(row), builder.load(offset)
    line = builder.inttoptr(builder.add(here, done), byte)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), line, number(0), number(3), number(1))
    done = builder.add(done, LONG(LINE))
    whole = builder.icmp_signed(">=", done, width)
    builder.store(builder.select(whole, LONG(0), done), offset)
    builder.store(builder.select(whole, builder.add(here, far), here), row)


def _tile_function(module):
    """IR: a function of its own, so that LLVM does not copy and optimise the tile at every place that multiplies."""
    name = "rgpu_tile"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [LONG] * 11), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    out, out_row, a, a_row, a_step, b, b_row, k, ahead, far, width = function.args
    lanes = ir.VectorType(FLOAT, VECTOR)

    def rows_of(address, distance):
        return [builder.add(address, builder.mul(LONG(r), distance)) for r in range(TILE_ROWS)]

    def vectors_at(address):
        return [_at(builder, builder.add(address, LONG(4 * VECTOR * v)), lanes) for v in range(TILE_VECTORS)]

    targets = [pointer for row in rows_of(out, out_row) for pointer in vectors_at(row)]
    sums = [cgutils.alloca_once(builder, lanes) for _ in targets]
    for target, total in zip(targets, sums, strict=True):
        builder.store(builder.load(target, align=4), total)
    a_rows = rows_of(a, a_row)
    fetched, offset = cgutils.alloca_once_value(builder, ahead), cgutils.alloca_once_value(builder, LONG(0))
    with cgutils.for_range(builder, k) as loop:
        _fetch(builder, fetched, offset, far, width)
        values = [builder.load(pointer, align=4) for pointer in vectors_at(builder.add(b, builder.mul(loop.index, b_row)))]
        at = builder.mul(loop.index, a_step)
        for r, row in enumerate(a_rows):
            factor = builder.load(_at(builder, builder.add(row, at), FLOAT), align=4)
            factor = builder.insert_element(ir.Constant(lanes, ir.Undefined), factor, ir.IntType(32)(0))
            factor = shuffle(builder, factor, factor, [0] * VECTOR)
            for v, value in enumerate(values):
                total = sums[r * TILE_VECTORS + v]
                builder.store(emit_fma(builder, factor, value, builder.load(total)), total)
    for target, total in zip(targets, sums, strict=True):
        builder.store(builder.load(total), target, align=4)
    builder.ret_void()
    return function


@intrinsic
def _tile(typingctx, out, out_row, a, a_row, a_step, b, b_row, k, ahead, far, width):
    """out[r, lanes] += Σ_i a[r, i] · b[i, lanes] for one register tile; addresses, and distances in bytes."""

    def codegen(context, builder, sig, args):
        builder.call(_tile_function(builder.module), args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), codegen


@piece
def add_product(out, a, b, ahead=0, far=0, width=0):
    """out [m, n] += a [m, k] · b [k, n]; m a multiple of ROWS, n of LANES. Rows of out and b are contiguous, `a` lies anyhow.

    In passing it asks for memory that is needed next: rows at `ahead`, `far` bytes apart and `width` long, a line per step.
    """
    out_row, a_row, a_step, b_row, k = out.strides[0], a.strides[0], a.strides[1], b.strides[0], b.shape[0]
    for c in range(0, 4 * out.shape[1], 4 * TILE_VECTORS * VECTOR):
        column = b.ctypes.data + c
        for r in range(0, out.shape[0], TILE_ROWS):
            fetch = width > 0 and r == 0
            _tile(
                out.ctypes.data + r * out_row + c, out_row, a.ctypes.data + r * a_row, a_row, a_step, column, b_row, k,
                ahead if fetch else column, far if fetch else 0, width if fetch else 0,
            )  # fmt: skip
        ahead += k // max((width + LINE - 1) // LINE, 1) * far


@intrinsic
def _transpose(typingctx, out, out_row, x, x_row):
    """SQUARE rows of SQUARE floats at `x` become the columns at `out`; addresses, and distances in bytes."""
    lanes = ir.VectorType(FLOAT, SQUARE)

    def codegen(context, builder, sig, args):
        out, out_row, x, x_row = args
        rows = []
        for i in range(SQUARE):
            rows.append(builder.load(_at(builder, builder.add(x, builder.mul(LONG(i), x_row)), lanes), align=4))
        step = 1
        while step < SQUARE:  # exchange the off-diagonal blocks of step x step, then of twice the size
            low = [i if not i & step else i - step + SQUARE for i in range(SQUARE)]
            high = [i + step if not i & step else i + SQUARE for i in range(SQUARE)]
            for i in range(SQUARE):
                if not i & step:
                    a, b = rows[i], rows[i + step]
                    rows[i], rows[i + step] = shuffle(builder, a, b, low), shuffle(builder, a, b, high)
            step *= 2
        for i, row in enumerate(rows):
            builder.store(row, _at(builder, builder.add(out, builder.mul(LONG(i), out_row)), lanes), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@piece
def transpose(out, x):
    """out [n, m] = xᵀ for x [m, n]: both multiples of SQUARE, rows contiguous."""
    for i in range(0, x.shape[0], SQUARE):
        for j in range(0, x.shape[1], SQUARE):
            _transpose(
                out.ctypes.data + j * out.strides[0] + 4 * i, out.strides[0], x.ctypes.data + i * x.strides[0] + 4 * j,
                x.strides[0],
            )  # fmt: skip
