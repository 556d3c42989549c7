"""What the kernels' inner loops share: views of addresses, and transcendental functions of a number or of a vector's lanes.

Numba calls libm's expf once per element; this one is plain arithmetic, which works on lanes and lets LLVM vectorise a loop.
"""

import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..quants.vectors import call, fma, load, total, zeros
from . import piece

LINE = 64  # bytes of a cache line: vectors that cross from one to the next cost twice
LANES = 32  # of a vector, where a loop goes by explicit lanes: two registers of AVX-512, four of AVX2


@intrinsic
def _pointer_to(typingctx, address, dtype):
    """`address` (int64) as a pointer to `dtype`, a Numba number class."""
    element = dtype.dtype

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(element).as_pointer())

    return types.CPointer(element)(types.int64, dtype), codegen


@piece
def floats(address, n):
    """float32 [n] at `address`."""
    return numba.carray(_pointer_to(address, np.float32), n, np.float32)


@piece
def matrix(address, m, n):
    """float32 [m, n] at `address`."""
    return numba.carray(_pointer_to(address, np.float32), (m, n), np.float32)


@piece
def take(memory, m, n):
    """float32 [m, n] at address `memory`, from a whole cache line on, and the address after it: how scratch is divided."""
    start = (memory + LINE - 1) // LINE * LINE
    return matrix(start, m, n), start + 4 * m * n


@piece
def release(memory):
    """The end of an array that was used by its address: Numba frees it after its last mention."""


@piece
def ints(address, n):
    """int32 [n] at `address`."""
    return numba.carray(_pointer_to(address, np.int32), n, np.int32)


@piece
def longs(address, n):
    """int64 [n] at `address`."""
    return numba.carray(_pointer_to(address, np.int64), n, np.int64)


# ln 2 in two parts: the first has few bits, so that n·LN2_HIGH is exact and x - n·ln 2 keeps full precision.
LOG2_E, LN2_HIGH, LN2_LOW = 1 / math.log(2), 0.693359375, -2.12194440e-4
LOWEST, HIGHEST = -87.0, 88.0
TAYLOR = [1 / math.factorial(n) for n in range(8)]


def _constant(like, value):
    """IR: a number as a value of this type, in every lane of a vector."""
    lanes = isinstance(like, ir.VectorType)
    element = like.element if lanes else like
    number = float(np.float32(value)) if isinstance(element, ir.FloatType) else value
    return ir.Constant(like, [number] * like.count if lanes else number)


def _emit_exp(builder, x):
    kind = x.type
    whole = ir.VectorType(ir.IntType(32), kind.count) if isinstance(kind, ir.VectorType) else ir.IntType(32)
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"

    def constant(value):
        return _constant(kind, value)

    def multiply_add(a, b, c):
        return call(builder, f"llvm.fmuladd.{suffix}", kind, a, b, c)

    low, high = constant(LOWEST), constant(HIGHEST)
    clamped = builder.select(builder.fcmp_ordered("<", x, high), x, high)
    clamped = builder.select(builder.fcmp_ordered(">", clamped, low), clamped, low)
    n = call(builder, f"llvm.floor.{suffix}", kind, multiply_add(clamped, constant(LOG2_E), constant(0.5)))
    r = multiply_add(n, constant(-LN2_HIGH), clamped)
    r = multiply_add(n, constant(-LN2_LOW), r)
    p = constant(TAYLOR[7])
    for factor in TAYLOR[6::-1]:
        p = multiply_add(p, r, constant(factor))
    exponent = builder.add(builder.fptosi(n, whole), _constant(whole, 127))
    value = builder.fmul(p, builder.bitcast(builder.shl(exponent, _constant(whole, 23)), kind))
    other = builder.select(builder.fcmp_ordered("<", x, low), constant(0), x)
    return builder.select(builder.fcmp_ordered(">=", x, low), value, other)


@intrinsic
def exp(typingctx, x):
    """e**x of a float32 or of float32 lanes within 2 ulp: x = n·ln 2 + r, |r| <= ln 2 / 2, Taylor to r**7, exponent as bits.

    0 below -87, e**88 above 88; NaN stays NaN, so that a broken weight can't turn into a plausible answer.
    """
    return x(x), lambda context, builder, sig, args: _emit_exp(builder, args[0])


@intrinsic
def sigmoid(typingctx, x):
    """1 / (1 + e**-x) of a float32 or of float32 lanes."""

    def codegen(context, builder, sig, args):
        one = _constant(args[0].type, 1)
        return builder.fdiv(one, builder.fadd(one, _emit_exp(builder, builder.fneg(args[0]))))

    return x(x), codegen


@piece
def silu(x):
    return x * sigmoid(x)


@intrinsic
def maximum(typingctx, lanes):
    """The largest of float32 lanes that is not NaN."""

    def codegen(context, builder, sig, args):
        return call(builder, f"llvm.vector.reduce.fmax.v{lanes.count}f32", ir.FloatType(), args[0])

    return types.float32(lanes), codegen


@piece
def squares(x):
    """Σ x² of a float32 array."""
    sums, whole = zeros(LANES), x.size - x.size % LANES
    for i in range(0, whole, LANES):
        sums = fma(load(x, i, LANES), load(x, i, LANES), sums)
    rest = np.float32(0)
    for i in range(whole, x.size):
        rest += x[i] * x[i]
    return total(sums) + rest
