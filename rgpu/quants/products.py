"""What every type of blocks gets from its integer view: `unpack`, `expand`, `dot`, and `dot_int8` with quantised activations.

The view: weight = scale·q − minimum, q unsigned bytes up to `top` (a type's `integers`), scale and minimum per `group` of 16 or
32 weights (its `scales`). A type without minima has the q that means 0 instead (`zero`): its minima are zero·scale. Products walk
a row by units of 256 weights, one block of 256 or eight of 32, so that the scales too are vectors.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload, register_jitable

from .isa import emit_multiply_add
from .vectors import (
    EXACT,
    INDEX,
    Vector,
    address_of,
    concatenate,
    emit_fma,
    fma,
    load,
    prefetch,
    repeat,
    shuffle,
    store,
    total,
    view,
    zeros,
)

# Bytes to prefetch ahead. Rows follow each other in memory, but the processor's own prefetching stops at the end of a page;
# from two pages ahead the address translation is ready in time too (measured: a tenth faster than from 1 KB ahead, or from 0).
AHEAD = 8192


def dot_int8(quant, isa, w, x, n):
    """Σ weight·activation over a row: `w` its bytes, `x` an activation row of `n` columns -> float32. Numba only."""
    raise TypeError("dot_int8() runs inside Numba kernels only")


def expand(quant, w, q, scales, mins, n):
    """Write a row's integer view: uint8 `q` [n], float32 `scales` and `mins` [n / group]. Numba only."""
    raise TypeError("expand() runs inside Numba kernels only")


def integers(quant, w, o):
    """The quants of the block at byte `o` in order: a tuple of equal uint8 vectors of 32, 64 or 128 lanes. Numba only."""


@overload(integers, jit_options=EXACT)
def _integers(quant, w, o):
    return quant.instance_class.integers


def scales(quant, w, o, count):
    """Float32 scales of `count` (a literal) blocks from byte `o`, a lane per group; (scales, minima) where there are minima.

    Numba only. A type of 256 weights is asked for one block at a time.
    """


@overload(scales, jit_options=EXACT, prefer_literal=True)
def _scales(quant, w, o, count):
    return quant.instance_class.scales


def factors(quant, w, o, count):
    """(scales, minima) for any type. Numba only."""


@overload(factors, jit_options=EXACT, prefer_literal=True)
def _factors(quant, w, o, count):
    zero = np.float32(quant.instance_class.zero)

    def from_zero(quant, w, o, count):
        scale = scales(quant, w, o, count)
        return scale, scale * zero

    return from_zero if zero else lambda quant, w, o, count: scales(quant, w, o, count)


def sizes(tag):
    """Weights and bytes of a block, weights of a group, blocks of a unit."""
    return tag.block, tag.nbytes, tag.group, 256 // tag.block


def unit(quant, w, o):
    """`integers` of the 256 weights from byte `o`. Numba only."""


@overload(unit, jit_options=EXACT)
def _unit(quant, w, o):
    if quant.instance_class.block == 256:
        return lambda quant, w, o: integers(quant, w, o)
    b1 = quant.instance_class.nbytes
    b2, b3, b4, b5, b6, b7 = (i * b1 for i in range(2, 8))

    def eight_blocks(quant, w, o):
        return (
            integers(quant, w, o) + integers(quant, w, o + b1) + integers(quant, w, o + b2) + integers(quant, w, o + b3)
            + integers(quant, w, o + b4) + integers(quant, w, o + b5) + integers(quant, w, o + b6) + integers(quant, w, o + b7)
        )  # fmt: skip

    return eight_blocks


@intrinsic
def add_products(typingctx, isa, quant, acc, q, scale, x, i):
    """acc + Σ scale·q·x over the vectors `q` and the int8 from byte `i` of `x`; a lane of `scale` per group.

    Each lane of acc sums 4 weights in turn, so that with more lanes than a register has, several additions are under way.
    """
    set_, tag = isa.instance_class, quant.instance_class
    length, step = q.dtype.count, 4 * acc.count
    signed = Vector(types.int8, step)

    def codegen(context, builder, sig, args):
        result, vectors, factors, row, start = args[2:]
        for first in range(0, q.count * length, step):
            parts = [builder.extract_value(vectors, k) for k in range(first // length, (first + step) // length)]
            at = builder.add(start, ir.Constant(start.type, first))
            activations = builder.load(address_of(context, builder, x, row, at, signed), align=1)
            nothing = ir.Constant(ir.VectorType(INDEX, acc.count), [0] * acc.count)
            sums = emit_multiply_add(builder, set_, tag.top, nothing, concatenate(builder, parts), activations)
            spread = shuffle(builder, factors, factors, [(first + 4 * lane) // tag.group for lane in range(acc.count)])
            result = emit_fma(builder, builder.sitofp(sums, acc.llvm), spread, result)
        return result

    return acc(isa, quant, acc, q, scale, x, types.int64), codegen


# Inlined: a call for each row would cost as much as a few blocks.
@overload(dot_int8, jit_options=EXACT | {"forceinline": True})
def _dot_int8(quant, isa, w, x, n):
    _, nbytes, group, count = sizes(quant.instance_class)
    size, groups, sums_at, sums_size, per_scale = count * nbytes, 256 // group, group // 4, 1024 // group, 32 // group
    ahead = AHEAD

    def units(quant, isa, w, x, n):
        acc, low = zeros(32), zeros(groups)
        for i in range(0, n - 255, 256):
            o = i // 256 * size
            for line in range(0, size, 64):
                prefetch(w, o + ahead + line)
            scale, minimum = factors(quant, w, o, count)
            d = repeat(view(load(x, n + i // 8, 32), np.float32), per_scale)
            acc = add_products(isa, quant, acc, unit(quant, w, o), scale * d, x, i)
            sums = view(load(x, n + n // sums_at + i // group * 4, sums_size), np.float32)
            low = fma(minimum, sums, low)
        return total(acc) - total(low)

    def units_and_blocks(quant, isa, w, x, n):
        acc, low = zeros(8), zeros(1)
        for i in range(n // 256 * 256, n, 32):
            o = i // 32 * nbytes
            scale, minimum = factors(quant, w, o, 1)
            d = view(load(x, n + i // 8, 4), np.float32)
            acc = add_products(isa, quant, acc, integers(quant, w, o), scale * d, x, i)
            low = fma(minimum, view(load(x, n + n // 8 + i // 8, 4), np.float32), low)
        return whole(quant, isa, w, x, n) + (total(acc) - total(low))

    whole = register_jitable(**EXACT, forceinline=True)(units)
    return units if count == 1 else units_and_blocks


@intrinsic
def store_weights(typingctx, quant, out, i, q, pair):
    """Write float32 weights, made of the vectors `q` and (scales, minima), to `out` from element `i`; rounded as `dequantize`."""
    tag, length = quant.instance_class, q.dtype.count
    weights = Vector(types.float32, length)

    def codegen(context, builder, sig, args):
        scale, minimum = (builder.extract_value(args[4], k) for k in range(2))
        zero = ir.Constant(q.dtype.llvm, [tag.zero] * length)
        for k in range(q.count):
            groups = [(k * length + lane) // tag.group for lane in range(length)]
            value = builder.sub(builder.extract_value(args[3], k), zero)
            # Less its zero a byte is signed; without one it stays unsigned.
            value = (builder.sitofp if tag.zero else builder.uitofp)(value, weights.llvm)
            value = builder.fmul(value, shuffle(builder, scale, scale, groups))
            if not tag.zero:
                value = builder.fsub(value, shuffle(builder, minimum, minimum, groups))
            at = builder.add(args[2], ir.Constant(args[2].type, k * length))
            builder.store(value, address_of(context, builder, out, args[1], at, weights), align=4)
        return context.get_dummy_value()

    return types.void(quant, out, types.int64, q, pair), codegen


@intrinsic
def store_integers(typingctx, out, i, q):
    """Write the vectors `q` to uint8 `out` from element `i`."""

    def codegen(context, builder, sig, args):
        for k in range(q.count):
            at = builder.add(args[1], ir.Constant(args[1].type, k * q.dtype.count))
            builder.store(builder.extract_value(args[2], k), address_of(context, builder, out, args[0], at, q.dtype), align=1)
        return context.get_dummy_value()

    return types.void(out, types.int64, q), codegen


@overload(expand, jit_options=EXACT)
def _expand(quant, w, q, scales, mins, n):
    block, nbytes, group, _ = sizes(quant.instance_class)

    def impl(quant, w, q, scales, mins, n):
        for i in range(0, n, block):
            o = i // block * nbytes
            scale, minimum = factors(quant, w, o, 1)
            store(scales, i // group, scale)
            store(mins, i // group, minimum)
            store_integers(q, i, integers(quant, w, o))

    return impl


def unpack(tag):
    """`blocks.unpack` of a type of blocks: the function to compile."""
    block, nbytes, _, _ = sizes(tag)

    def impl(quant, w, out, n):
        for i in range(0, n, block):
            o = i // block * nbytes
            store_weights(quant, out, i, integers(quant, w, o), factors(quant, w, o, 1))

    return impl


def dot(tag):
    """`blocks.dot` of a type of blocks: plain, because nothing that runs often multiplies these with float32 activations."""
    weights_of = register_jitable(**EXACT)(unpack(tag))

    def impl(quant, w, x, n):
        weights, result = np.empty(n, np.float32), np.float32(0)
        weights_of(quant, w, weights, n)
        for i in range(n):
            result += weights[i] * x[i]
        return result

    return impl
