"""What the kernels' inner loops share: float32 views of addresses, and transcendental functions that vectorise.

Numba calls libm's expf once per element; this one is plain arithmetic, so LLVM turns a loop over it into vector code.
"""

import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import piece


@intrinsic
def _pointer_to(typingctx, address, dtype):
    """`address` (int64) as a pointer to `dtype`, a Numba number class."""
    element = dtype.dtype

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(element).as_pointer())

    return types.CPointer(element)(types.int64, dtype), codegen


@intrinsic
def _bits_to_float(typingctx, bits):
    signature = types.float32(types.int32)
    return signature, lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@piece
def floats(address, n):
    """float32 [n] at `address`."""
    return numba.carray(_pointer_to(address, np.float32), n, np.float32)


@piece
def ints(address, n):
    """int32 [n] at `address`."""
    return numba.carray(_pointer_to(address, np.int32), n, np.int32)


@piece
def longs(address, n):
    """int64 [n] at `address`."""
    return numba.carray(_pointer_to(address, np.int64), n, np.int64)


LOG2_E = np.float32(1 / math.log(2))
# ln 2 in two parts: the first has few bits, so that n·LN2_HIGH is exact and x - n·ln 2 keeps full precision.
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
C2, C3, C4, C5, C6, C7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))


@piece
def exp(x):
    """float32 e**x within 2 ulp: x = n·ln 2 + r, |r| <= ln 2 / 2, Taylor to r**7, exponent added as bits.

    0 below -87, e**88 above 88; NaN stays NaN, so that a broken weight can't turn into a plausible answer.
    """
    clamped = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(clamped * LOG2_E + np.float32(0.5))
    r = (clamped - n * LN2_HIGH) - n * LN2_LOW
    p = C2 + r * (C3 + r * (C4 + r * (C5 + r * (C6 + r * C7))))
    value = (np.float32(1) + r + r * r * p) * _bits_to_float(np.int32(np.int32(n) + np.int32(127)) << np.int32(23))
    return value if x >= np.float32(-87) else (np.float32(0) if x < np.float32(-87) else x)


@piece
def sigmoid(x):
    return np.float32(1) / (np.float32(1) + exp(-x))


@piece
def silu(x):
    return x / (np.float32(1) + exp(-x))
