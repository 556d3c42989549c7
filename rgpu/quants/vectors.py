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


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INDEX, len(lanes)), lanes))


def _splat(builder, value, count):
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    return _shuffle(builder, builder.insert_element(undefined, value, INDEX(0)), undefined, [0] * count)


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


def _address(context, builder, array_type, array, index, vector):
    """Pointer to the lanes at element `index` of an array, without bounds check or wrap-around."""
    assert array_type.ndim == 1 and array_type.layout == "C"
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.llvm.as_pointer())


@intrinsic(prefer_literal=True)
def load(typingctx, array, index, count):
    """`count` (a literal) lanes from element `index` of a contiguous 1-D array, of its dtype; any alignment of bytes."""
    vector = Vector(array.dtype, count.literal_value)

    def codegen(context, builder, sig, args):
        address = _address(context, builder, sig.args[0], args[0], args[1], vector)
        return builder.load(address, align=context.get_abi_sizeof(ELEMENTS[array.dtype]))

    return vector(array, types.int64, count), codegen


@intrinsic
def store(typingctx, array, index, vector):
    """Write the lanes to a contiguous 1-D array of the same dtype, from element `index`."""
    assert vector.dtype == array.dtype

    def codegen(context, builder, sig, args):
        address = _address(context, builder, sig.args[0], args[0], args[1], vector)
        builder.store(args[2], address, align=context.get_abi_sizeof(ELEMENTS[array.dtype]))
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), codegen


@intrinsic(prefer_literal=True)
def half_lanes(typingctx, w, o, count):
    """The float16 at byte `o`, as float32, in each of `count` (a literal) lanes.

    Spread before widening: a scalar conversion may be given a register that still waits for the accumulator (measured: half
    the speed), and spreading 16-bit lanes straight from memory is one instruction less.
    """
    result = Vector(types.float32, count.literal_value)

    def codegen(context, builder, sig, args):
        address = _address(context, builder, sig.args[0], args[0], args[1], Vector(types.float16, 1))
        half = builder.extract_element(builder.load(address, align=1), INDEX(0))
        return builder.fpext(_splat(builder, half, result.count), result.llvm)

    return result(w, types.int64, count), codegen


@intrinsic(prefer_literal=True)
def zeros(typingctx, count):
    """`count` (a literal) float32 zeros: an accumulator."""
    vector = Vector(types.float32, count.literal_value)
    return vector(count), lambda context, builder, sig, args: ir.Constant(vector.llvm, [0.0] * vector.count)


@intrinsic
def view(typingctx, vector, dtype):
    """The same bits as lanes of another dtype (NumPy's `view`)."""
    bits = ELEMENTS[vector.dtype], ELEMENTS[dtype.dtype]
    sizes = [getattr(element, "width", 16 if element == ir.HalfType() else 32) for element in bits]
    result = Vector(dtype.dtype, vector.count * sizes[0] // sizes[1])
    return result(vector, dtype), lambda context, builder, sig, args: builder.bitcast(args[0], result.llvm)


@intrinsic
def astype(typingctx, vector, dtype):
    """The same values in another dtype: wider integers, integers <-> float32 (towards zero), float16 <-> float32."""
    result = Vector(dtype.dtype, vector.count)
    match isinstance(vector.dtype, types.Float), isinstance(result.dtype, types.Float):
        case False, False:
            name = "sext" if vector.dtype.signed else "zext"
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
    return result(a, b), lambda context, builder, sig, args: _shuffle(builder, *args, list(range(result.count)))


@intrinsic
def lane(typingctx, vector, index):
    """One lane as a scalar."""
    return vector.dtype(vector, types.int32), lambda context, builder, sig, args: builder.extract_element(*args)


@intrinsic
def bits(typingctx, word):
    """The 32 bits of a uint32 as 32 uint8 lanes of 0 or 1, lowest first."""
    result = Vector(types.uint8, 32)

    def codegen(context, builder, sig, args):
        return builder.zext(builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 32)), result.llvm)

    return result(types.uint32), codegen


@intrinsic
def lookup(typingctx, table, index):
    """table[index] per lane: both of 16 bytes, indices below 16. LLVM makes one byte shuffle of it where there is one."""

    def codegen(context, builder, sig, args):
        result = ir.Constant(table.llvm, ir.Undefined)
        for i in range(16):
            chosen = builder.zext(builder.extract_element(args[1], INDEX(i)), INDEX)
            result = builder.insert_element(result, builder.extract_element(args[0], chosen), INDEX(i))
        return result

    return table(table, index), codegen


@intrinsic
def total(typingctx, vector):
    """The sum of float32 lanes, in any order."""

    def codegen(context, builder, sig, args):
        signature = ir.FunctionType(ir.FloatType(), [ir.FloatType(), vector.llvm])
        add = cgutils.get_or_insert_function(builder.module, signature, f"llvm.vector.reduce.fadd.v{vector.count}f32")
        return builder.call(add, [ir.FloatType()(-0.0), args[0]], fastmath=["reassoc"])

    return types.float32(vector), codegen


@intrinsic
def largest(typingctx, vector):
    """The largest of uint32 lanes."""

    def codegen(context, builder, sig, args):
        signature = ir.FunctionType(ir.IntType(32), [vector.llvm])
        umax = cgutils.get_or_insert_function(builder.module, signature, f"llvm.vector.reduce.umax.v{vector.count}i32")
        return builder.call(umax, args)

    return types.uint32(vector), codegen
