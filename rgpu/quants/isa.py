"""Instruction sets: how Σ of four adjacent products of bytes is computed, one class per way a processor offers.

A set is an empty named tuple, a compile-time tag as the quantisation types are. Its class names the LLVM features it needs and
emits the sum for its own vector length; `multiply_add` cuts longer vectors into that. `Plain` needs nothing and is the twin
that every other set must equal: all of them are exact.
"""

from typing import NamedTuple

from llvmlite import ir
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from .vectors import call, concatenate, shuffle

I8, I16, I32 = (ir.IntType(bits) for bits in (8, 16, 32))


def _full(value, element, count):
    return ir.Constant(ir.VectorType(element, count), [value] * count)


class Plain(NamedTuple):
    """Generic vector code for any processor."""

    arch, features, lanes = "", (), 4

    @staticmethod
    def emit(builder, top, acc, a, b):
        wide = ir.VectorType(I32, a.type.count)
        products = builder.mul(builder.zext(a, wide), builder.sext(b, wide))
        for first in range(4):
            acc = builder.add(acc, shuffle(builder, products, products, range(first, a.type.count, 4)))
        return acc


class AVX2(NamedTuple):
    """Pairs of products in 16 bits (vpmaddubsw, which saturates), then pairs of pairs in 32 (vpmaddwd by ones)."""

    arch, features, lanes = "x86", ("avx2",), 8

    @staticmethod
    def emit(builder, top, acc, a, b):
        # Up to 127 a pair is at most 2·127·128 = 32512. A larger byte is its low seven bits and its top bit, apart: a pair of
        # 128s gives -32768 to 2·128·127 = 32512. Both fit 16 bits.
        for part in [a] if top <= 127 else [builder.and_(a, _full(127, I8, 32)), builder.and_(a, _full(128, I8, 32))]:
            pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), part, b)
            acc = builder.add(acc, call(builder, "llvm.x86.avx2.pmadd.wd", acc.type, pairs, _full(1, I16, 16)))
        return acc


def _vpdpbusd(builder, acc, a, b):
    # LLVM 22 has given the two factors byte types; it still accepts the older form, which all versions know.
    name = f"llvm.x86.avx512.vpdpbusd.{32 * acc.type.count}"
    return call(builder, name, acc.type, acc, builder.bitcast(a, acc.type), builder.bitcast(b, acc.type))


class AVX_VNNI(NamedTuple):
    """vpdpbusd on 256 bits: the whole sum in one instruction."""

    arch, features, lanes = "x86", ("avxvnni",), 8

    @staticmethod
    def emit(builder, top, acc, a, b):
        return _vpdpbusd(builder, acc, a, b)


class AVX512_VNNI(NamedTuple):
    """vpdpbusd on 512 bits."""

    arch, features, lanes = "x86", ("avx512bw", "avx512vl", "avx512vnni"), 16

    @staticmethod
    def emit(builder, top, acc, a, b):
        return _vpdpbusd(builder, acc, a, b)


class NEON_DOT(NamedTuple):
    """sdot takes signed bytes: a larger one is its low seven bits and its top bit, apart."""

    arch, features, lanes = "aarch64", ("dotprod",), 4

    @staticmethod
    def emit(builder, top, acc, a, b):
        def dot(acc, a):
            return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, a, b)

        if top <= 127:
            return dot(acc, a)
        high = dot(_full(0, I32, 4), builder.lshr(a, _full(7, I8, 16)))
        return builder.add(dot(acc, builder.and_(a, _full(127, I8, 16))), builder.shl(high, _full(7, I32, 4)))


class NEON_I8MM(NamedTuple):
    """usdot takes an unsigned and a signed byte, as here."""

    arch, features, lanes = "aarch64", ("dotprod", "i8mm"), 4

    @staticmethod
    def emit(builder, top, acc, a, b):
        return call(builder, "llvm.aarch64.neon.usdot.v4i32.v16i8", acc.type, acc, a, b)


SETS = (AVX512_VNNI(), AVX_VNNI(), AVX2(), NEON_I8MM(), NEON_DOT(), Plain())  # the best first


def supported() -> list[tuple]:
    """The sets that functions compiled by Numba in this process may use, best first."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()  # NUMBA_CPU_FEATURES and the like are in it
    arch = triple.split("-")[0].replace("arm64", "aarch64")
    enabled = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    return [isa for isa in SETS if arch.startswith(isa.arch) and enabled.issuperset(isa.features)]


def best() -> tuple:
    """The set to compile kernels for."""
    return supported()[0]


def emit_multiply_add(builder, isa, top, acc, a, b):
    """The IR of `multiply_add`: `isa` a class of this file, `top` the largest byte that `a` can hold."""
    count, step = acc.type.count, min(acc.type.count, isa.lanes)
    assert count % step == 0 and a.type.count == b.type.count == 4 * count
    parts = []
    for first in range(0, count, step):
        lanes, fours = range(first, first + step), range(4 * first, 4 * (first + step))
        part = [shuffle(builder, vector, vector, chosen) for vector, chosen in ((acc, lanes), (a, fours), (b, fours))]
        parts.append(isa.emit(builder, top, *part))
    return concatenate(builder, parts)


@intrinsic
def multiply_add(typingctx, isa, quant, acc, a, b):
    """acc + Σ of 4 adjacent products per lane: int32 [m], uint8 [4m] as in `quant`'s integers, int8 [4m]; m is 8, 16 or 32."""

    def codegen(context, builder, sig, args):
        return emit_multiply_add(builder, isa.instance_class, quant.instance_class.top, *args[2:])

    return acc(isa, quant, acc, a, b), codegen
