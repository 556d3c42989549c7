"""How a running table and a thread outside of the pool tell each other things: numbers in a box, a count says they are new."""

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import kernel
from .pool import SPINS, pause, yield_
from .scalar import ints

WORD = ir.IntType(32)


@intrinsic
def _store(typingctx, address, value):
    """Store an int32; who reads it with `_load` sees everything written before."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], WORD.as_pointer())
        builder.store_atomic(builder.trunc(args[1], WORD), pointer, "release", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _load(typingctx, address):
    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], WORD.as_pointer())
        return builder.sext(builder.load_atomic(pointer, "acquire", 4), ir.IntType(64))

    return types.int64(types.int64), codegen


@kernel("iiii")
def post(box, ids, n, table, part, parts):
    """box[2:] = ids, box[1] = n, and last box[0] += 1, all int32; done by one part.

    With a `table` (its address is not 0): only those of the ids that have no slot in it, and only if there are any.
    """
    if part > 0:
        return
    out, chosen = ints(box, 2 + n), ints(ids, n)
    count = 0
    for i in range(n):
        if table == 0 or ints(table, chosen[i] + 1)[chosen[i]] < 0:
            out[2 + count] = chosen[i]
            count += 1
    if table == 0 or count > 0:
        out[1] = count
        _store(box, out[0] + 1)


@kernel("ii")
def wait(box, answer, part, parts):
    """Until answer[0] has reached box[0], both int32: who counts there is done with what the box asks for."""
    spins = 0
    while _load(answer) < _load(box):
        spins += 1
        if spins < SPINS:
            pause()
        else:
            yield_()


@numba.njit(nogil=True, cache=True)
def publish(address, count):
    """Store a count from Python, after everything that the calling thread has written."""
    _store(address, count)
