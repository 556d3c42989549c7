"""The three things a kernel does with a row of blocks, and the scalar loads that the types build them from.

`dot`, `unpack` and `pack` are resolved at compile time by the type's tag: `dot(Q4_K(), w, x, n)` becomes `Q4_K.dot`,
compiled into the kernel and called once a row. `row` turns an address of the mapped file into bytes a kernel can index.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload, register_jitable

from . import products
from .vectors import EXACT

# Sums may be re-ordered into vector lanes; NaN and infinity keep their meaning (attention masks with -inf).
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}


def dot(quant, w, x, n):
    """Σ w[i]·x[i] over one row: `w` uint8 bytes of the row, `x` float32 [n] -> float32. Numba only."""
    raise TypeError("dot() runs inside Numba kernels only")


def unpack(quant, w, out, n):
    """Write the row's `n` weights to float32 `out`. Numba only."""
    raise TypeError("unpack() runs inside Numba kernels only")


def pack(quant, x, w, n):
    """Quantise float32 `x` [n] into the bytes `w` of one row. Numba only."""
    raise TypeError("pack() runs inside Numba kernels only")


@overload(dot, jit_options={"fastmath": FASTMATH})
def _dot(quant, w, x, n):
    return quant.instance_class.dot if quant.instance_class.block == 1 else products.dot(quant.instance_class)


@overload(unpack, jit_options=EXACT)
def _unpack(quant, w, out, n):
    return quant.instance_class.unpack if quant.instance_class.block == 1 else products.unpack(quant.instance_class)


@overload(pack, jit_options=EXACT)
def _pack(quant, x, w, n):
    return quant.instance_class.pack


@intrinsic
def _pointer(typingctx, address):
    signature = types.CPointer(types.uint8)(types.int64)
    return signature, lambda context, builder, sig, args: builder.inttoptr(args[0], ir.IntType(8).as_pointer())


@register_jitable
def row(address, nbytes):
    """The `nbytes` bytes at `address` (int64) as a uint8 array; nothing is copied or kept alive."""
    return numba.carray(_pointer(address), nbytes, np.uint8)


@intrinsic
def from_half(typingctx, bits):
    """float16 bits (uint16) -> float32: one hardware instruction where there is F16C."""

    def codegen(context, builder, sig, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def to_half(typingctx, value):
    """float32 -> float16 bits (uint16), rounded to nearest even."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


def _load(element, result):
    """An intrinsic (w, o) -> the little-endian scalar at byte `o` of a uint8 array, at any alignment."""

    @intrinsic
    def load(typingctx, w, o):
        def codegen(context, builder, sig, args):
            data = context.make_array(sig.args[0])(context, builder, args[0]).data
            return builder.load(builder.bitcast(builder.gep(data, [args[1]]), element.as_pointer()), align=1)

        return result(w, types.int64), codegen

    return load


u16 = _load(ir.IntType(16), types.uint16)
u32 = _load(ir.IntType(32), types.uint32)
f32 = _load(ir.FloatType(), types.float32)


@register_jitable
def half(w, o):
    """float16 at byte `o`, as float32."""
    return from_half(u16(w, o))


@intrinsic
def from_bits(typingctx, bits):
    """The float32 with these bits (uint32)."""
    return types.float32(types.uint32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())
