"""Short vectors for Numba: a value type that is one LLVM vector, and the verbs from which the types write their loops.

LLVM maps generic vectors to every processor (32 floats: two registers of AVX-512, four of AVX2, eight of SSE or NEON), so
nothing here names an instruction set. Plain loops over blocks of 16 or 32 run at a third to a tenth of this: LLVM unrolls
them before it would vectorise. Floating-point flags are those of the function that uses a verb: `dot` may fuse, `unpack` not.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

ELEMENTS = {
    types.uint8: ir.IntType(8),
    types.int8: ir.IntType(8),
    types.uint16: ir.IntType(16),
    types.uint32: ir.IntType(32),
    types.int32: ir.IntType(32),
    types.float16: ir.HalfType(),
    types.float32: ir.FloatType(),
}
OPERATORS = {  # operator -> LLVM instruction for (unsigned) integers, for floats
    operator.add: ("add", "fadd"),
    operator.iadd: ("add", "fadd"),
    operator.sub: ("sub", "fsub"),
    operator.isub: ("sub", "fsub"),
    operator.mul: ("mul", "fmul"),
    operator.and_: ("and_", None),
    operator.or_: ("or_", None),
    operator.lshift: ("shl", None),
    operator.rshift: ("lshr", None),
}
INDEX = ir.IntType(32)
# A function without flags of its own inherits its caller's: with these it gives the same bits in any kernel.
EXACT = {"fastmath": False}


class Vector(types.Type):
    """`count` lanes of a Numba scalar type `dtype`."""

    def __init__(self, dtype, count):
        self.dtype, self.count = dtype, count
        super().__init__(f"Vector({dtype} x {count})")

    @property
    def key(self):
        return self.dtype, self.count

    @property
    def llvm(self):
        return ir.VectorType(ELEMENTS[self.dtype], self.count)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, vector):
        super().__init__(dmm, vector, vector.llvm)


def shuffle(builder, a, b, lanes):
    """IR: these lanes of `a` followed by `b`."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INDEX, len(lanes)), list(lanes)))


def concatenate(builder, vectors):
    """IR: the lanes of a power of two of equal vectors, one after the other."""
    while len(vectors) > 1:
        both = range(2 * vectors[0].type.count)
        vectors = [shuffle(builder, vectors[i], vectors[i + 1], both) for i in range(0, len(vectors), 2)]
    return vectors[0]


def call(builder, name, result, *args, fastmath=()):
    """IR: a call of an LLVM intrinsic."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args, fastmath=fastmath)


def _splat(builder, value, count):
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, value, INDEX(0)), undefined, [0] * count)


def address_of(context, builder, array_type, array, index, vector):
    """Pointer to the lanes at element `index` of an array, without bounds check or wrap-around."""
    assert array_type.ndim == 1 and array_type.layout == "C"
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.llvm.as_pointer())


def emit_fma(builder, a, b, c):
    """IR of `fma`."""
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


def _define(symbol, instructions):
    """`vector symbol vector` and `vector symbol scalar`; a scalar is cast to the vector's element type."""

    @type_callable(symbol)
    def typing(context):
        def typer(a, b):
            if isinstance(a, Vector) and (a == b or isinstance(b, types.Number)):
                return a

        return typer

    def emit(builder, vector, a, b):
        return getattr(builder, instructions[isinstance(vector.dtype, types.Float)])(a, b)

    @lower_builtin(symbol, Vector, Vector)
    def with_vector(context, builder, sig, args):
        return emit(builder, sig.return_type, *args)

    @lower_builtin(symbol, Vector, types.Number)
    def with_scalar(context, builder, sig, args):
        vector = sig.return_type
        scalar = context.cast(builder, args[1], sig.args[1], vector.dtype)
        return emit(builder, vector, args[0], _splat(builder, scalar, vector.count))


for _symbol, _instructions in OPERATORS.items():
    _define(_symbol, _instructions)


@intrinsic(prefer_literal=True)
def load(typingctx, array, index, count):
    """`count` (a literal) lanes from element `index` of a contiguous 1-D array, of its dtype; any alignment of bytes."""
    vector = Vector(array.dtype, count.literal_value)

    def codegen(context, builder, sig, args):
        address = address_of(context, builder, sig.args[0], args[0], args[1], vector)
        return builder.load(address, align=context.get_abi_sizeof(ELEMENTS[array.dtype]))

    return vector(array, types.int64, count), codegen


@intrinsic
def store(typingctx, array, index, vector):
    """Write the lanes to a contiguous 1-D array of the same dtype, from element `index`."""
    assert vector.dtype == array.dtype

    def codegen(context, builder, sig, args):
        address = address_of(context, builder, sig.args[0], args[0], args[1], vector)
        builder.store(args[2], address, align=context.get_abi_sizeof(ELEMENTS[array.dtype]))
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), codegen


@intrinsic
def halves(typingctx, vector):
    """The low 16 bits of integer lanes, read as float16 numbers, as float32.

    To spread one number, spread its bits and convert them all: the conversion of a scalar may be given a register that still
    waits for an accumulator (measured: half the speed).
    """
    result = Vector(types.float32, vector.count)

    def codegen(context, builder, sig, args):
        words = ir.VectorType(ir.IntType(16), vector.count)
        low = args[0] if args[0].type == words else builder.trunc(args[0], words)
        return builder.fpext(builder.bitcast(low, ir.VectorType(ir.HalfType(), vector.count)), result.llvm)

    return result(vector), codegen


@intrinsic(prefer_literal=True)
def zeros(typingctx, count):
    """`count` (a literal) float32 zeros: an accumulator."""
    vector = Vector(types.float32, count.literal_value)
    return vector(count), lambda context, builder, sig, args: ir.Constant(vector.llvm, [0.0] * vector.count)


@intrinsic(prefer_literal=True)
def full(typingctx, value, count):
    """A scalar in each of `count` (a literal) lanes."""
    result = Vector(types.unliteral(value), count.literal_value)
    return result(value, count), lambda context, builder, sig, args: _splat(builder, args[0], result.count)


@intrinsic
def view(typingctx, vector, dtype):
    """The same bits as lanes of another dtype (NumPy's `view`)."""
    bits = ELEMENTS[vector.dtype], ELEMENTS[dtype.dtype]
    sizes = [getattr(element, "width", 16 if element == ir.HalfType() else 32) for element in bits]
    result = Vector(dtype.dtype, vector.count * sizes[0] // sizes[1])
    return result(vector, dtype), lambda context, builder, sig, args: builder.bitcast(args[0], result.llvm)


@intrinsic
def astype(typingctx, vector, dtype):
    """The same values in another dtype: wider or narrower integers, integers <-> float32 (towards zero), float16 <-> float32."""
    result = Vector(dtype.dtype, vector.count)
    match isinstance(vector.dtype, types.Float), isinstance(result.dtype, types.Float):
        case False, False:
            wider = result.dtype.bitwidth > vector.dtype.bitwidth
            name = ("sext" if vector.dtype.signed else "zext") if wider else "trunc"
        case False, True:
            name = "sitofp" if vector.dtype.signed else "uitofp"
        case True, False:
            name = "fptosi" if result.dtype.signed else "fptoui"
        case True, True:
            name = "fpext" if vector.dtype == types.float16 else "fptrunc"
    return result(vector, dtype), lambda context, builder, sig, args: getattr(builder, name)(args[0], result.llvm)


@intrinsic
def join(typingctx, a, b):
    """The lanes of `a`, then those of `b`."""
    result = Vector(a.dtype, 2 * a.count)
    return result(a, b), lambda context, builder, sig, args: shuffle(builder, *args, range(result.count))


@intrinsic
def bits(typingctx, word):
    """The 32 bits of a uint32 as 32 uint8 lanes of 0 or 1, lowest first."""
    result = Vector(types.uint8, 32)

    def codegen(context, builder, sig, args):
        return builder.zext(builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 32)), result.llvm)

    return result(types.uint32), codegen


@intrinsic(prefer_literal=True)
def fields(typingctx, vector, width, count):
    """Bits 0 .. width-1 of all uint8 lanes, then the next `width` bits of all, `count` times (literals)."""
    shifts = [field * width.literal_value for field in range(count.literal_value) for _ in range(vector.count // 4)]
    result = Vector(types.uint8, vector.count * count.literal_value)

    def codegen(context, builder, sig, args):
        copies = shuffle(builder, args[0], args[0], [lane % vector.count for lane in range(result.count)])
        # Four bytes at a time, as processors shift by a different count per lane only from 32 bits on.
        words = ir.VectorType(INDEX, len(shifts))
        shifted = builder.lshr(builder.bitcast(copies, words), ir.Constant(words, shifts))
        mask = ir.Constant(result.llvm, [(1 << width.literal_value) - 1] * result.count)
        return builder.and_(builder.bitcast(shifted, result.llvm), mask)

    return result(vector, width, count), codegen


@intrinsic(prefer_literal=True)
def every(typingctx, w, o, stride, count, dtype):
    """`count` lanes of `dtype` from byte `o` of a uint8 array, `stride` bytes apart (literals)."""
    element = ELEMENTS[dtype.dtype]
    result = Vector(dtype.dtype, count.literal_value)

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        lanes = ir.Constant(result.llvm, ir.Undefined)
        for i in range(result.count):
            at = builder.add(args[1], ir.Constant(args[1].type, i * stride.literal_value))
            pointer = builder.bitcast(builder.gep(data, [at]), element.as_pointer())
            lanes = builder.insert_element(lanes, builder.load(pointer, align=1), INDEX(i))
        return lanes

    return result(w, types.int64, stride, count, dtype), codegen


def emit_lookup(builder, triple, features, table, index):
    """The IR of `lookup` for a target: LLVM finds the byte shuffle of a processor in generic code only at times."""
    width = 32 if "+avx2" in features and index.type.count % 32 == 0 else 16
    parts = []
    for first in range(0, index.type.count, width):
        part = shuffle(builder, index, index, range(first, first + width))
        entries = shuffle(builder, table, table, [lane % 16 for lane in range(width)])
        if "+ssse3" in features:
            name = "llvm.x86.avx2.pshuf.b" if width == 32 else "llvm.x86.ssse3.pshuf.b.128"
            parts.append(call(builder, name, part.type, entries, part))
        elif triple.startswith(("aarch64", "arm64")):
            parts.append(call(builder, "llvm.aarch64.neon.tbl1.v16i8", part.type, entries, part))
        else:
            chosen = part
            for i in range(width):
                position = builder.zext(builder.extract_element(part, INDEX(i)), INDEX)
                chosen = builder.insert_element(chosen, builder.extract_element(entries, position), INDEX(i))
            parts.append(chosen)
    return concatenate(builder, parts)


@intrinsic
def lookup(typingctx, table, index):
    """table[index] per lane: a table of 16 bytes, a multiple of 16 indices below 16."""

    def codegen(context, builder, sig, args):
        triple, _, features = context.codegen().magic_tuple()  # what this function is compiled for
        return emit_lookup(builder, triple, features, *args)

    return index(table, index), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """a·b + c of float32 lanes: one rounding where the processor can do it in one instruction, whatever the caller's flags."""
    assert a == b == c
    return a(a, b, c), lambda context, builder, sig, args: emit_fma(builder, *args)


@intrinsic(prefer_literal=True)
def repeat(typingctx, vector, times):
    """Each lane `times` (a literal) times."""
    n = times.literal_value
    result = Vector(vector.dtype, vector.count * n)
    lanes = [lane // n for lane in range(result.count)]
    return result(vector, times), lambda context, builder, sig, args: shuffle(builder, args[0], args[0], lanes)


@intrinsic
def prefetch(typingctx, w, o):
    """Ask for the cache line at byte `o` of a uint8 array; it may lie anywhere."""

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        call(builder, "llvm.prefetch.p0i8", ir.VoidType(), builder.gep(data, [args[1]]), INDEX(0), INDEX(3), INDEX(1))
        return context.get_dummy_value()

    return types.void(w, types.int64), codegen


@intrinsic
def total(typingctx, vector):
    """The sum of float32 lanes, in any order."""

    def codegen(context, builder, sig, args):
        name, zero = f"llvm.vector.reduce.fadd.v{vector.count}f32", ir.FloatType()(-0.0)
        return call(builder, name, zero.type, zero, args[0], fastmath=["reassoc"])

    return types.float32(vector), codegen


@intrinsic
def largest(typingctx, vector):
    """The largest of uint32 lanes."""

    def codegen(context, builder, sig, args):
        return call(builder, f"llvm.vector.reduce.umax.v{vector.count}i32", INDEX, args[0])

    return types.uint32(vector), codegen
