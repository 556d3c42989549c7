"""Threads that run tables of kernel calls without returning to Python: one row per call, the parts of a row shared out by need.

Owns the rows' layout, the order between rows and the waiting of idle threads; knows nothing of what the kernels compute. Nobody
waits for a thread, only for parts that one has taken: a thread that the system holds up leaves the rest to the others, and
finds on its return that they are further on.
"""

import os
import platform
import threading
import time
import weakref

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

# A row: where the native code lies, how many arguments of each kind, into how many parts the work is split, whether all rows
# before must be finished first, how many parts these have, the next part that nobody has taken, then the arguments (floats as
# bits). Parts are taken by number of the run and part, so that a thread that comes late to a finished run takes nothing.
FUNCTION, SHAPE, PARTS, WAIT, BEFORE, NEXT, ARGUMENTS = range(7)
ROW = 24  # words of 8 bytes
MOST_INTEGERS = ROW - ARGUMENTS - 1
RUN_BITS = 20  # a run's number stands above so many bits for a part

# The words that the threads of a pool share, each on a cache line of its own. JOB is odd while a run is on.
LINE = 8
JOB, DONE, INSIDE, FAILED = 0, LINE, 2 * LINE, 3 * LINE
TABLE, FIRST, LAST = 4 * LINE, 4 * LINE + 1, 4 * LINE + 2
PARKED = 5 * LINE  # one line per thread
COUNT = (1 << 32) - 1  # of DONE: the parts that are finished; the run's number stands above

# A waiting thread spins, then offers its processor to others: a pure spin on a busy machine costs the thread that is waited for
# its time slice. Between two tokens a worker waits for longer than sampling takes; then it sleeps until it is called.
SPINS = 500  # about 10 microseconds
PATIENCE = 30000  # yields of an idle worker, some 15 milliseconds
KEPT_TABLES = 8


# ---- what Numba lacks: atomic words, hints to the processor, calls by address ----

WORD = ir.IntType(64)


def _pointer(builder, address):
    return builder.inttoptr(address, WORD.as_pointer())


@intrinsic
def _read(typingctx, address):
    """The word at `address`, and everything that was written before it was."""
    signature = types.int64(types.int64)
    return signature, lambda context, builder, sig, args: builder.load_atomic(_pointer(builder, args[0]), "acquire", 8)


@intrinsic
def _write(typingctx, address, value):
    """Store a word; who reads it sees everything written before."""

    def codegen(context, builder, sig, args):
        builder.store_atomic(args[1], _pointer(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _exchange(operation):
    @intrinsic
    def exchange(typingctx, address, value):
        def codegen(context, builder, sig, args):
            return builder.atomic_rmw(operation, _pointer(builder, args[0]), args[1], "seq_cst")

        return types.int64(types.int64, types.int64), codegen

    return exchange


@intrinsic
def _replace(typingctx, address, old, new):
    """Store `new` if the word is still `old`; whether it was."""

    def codegen(context, builder, sig, args):
        address, old, new = args
        return builder.extract_value(builder.cmpxchg(_pointer(builder, address), old, new, "seq_cst", "monotonic"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


_add = _exchange("add")  # both return what was there before
_swap = _exchange("xchg")


@intrinsic
def pause(typingctx):
    """Tell the processor that this is a waiting loop."""

    def codegen(context, builder, sig, args):
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            name, hint = "llvm.x86.sse2.pause", []
        elif machine in ("aarch64", "arm64"):
            name, hint = "llvm.aarch64.hint", [ir.IntType(32)(1)]
        else:
            return context.get_dummy_value()
        signature = ir.FunctionType(ir.VoidType(), [value.type for value in hint])
        builder.call(cgutils.get_or_insert_function(builder.module, signature, name), hint)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_(typingctx):
    """Let another thread have the processor."""

    def codegen(context, builder, sig, args):
        name = "SwitchToThread" if os.name == "nt" else "sched_yield"
        signature = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _transfer(name):
    """libc's read or write of a word through a file: a thread that reads from an empty one sleeps."""
    name = f"_{name}" if os.name == "nt" else name

    @intrinsic
    def transfer(typingctx, file):
        def codegen(context, builder, sig, args):
            word = cgutils.alloca_once_value(builder, WORD(1))
            signature = ir.FunctionType(WORD, [ir.IntType(32), word.type, WORD])
            call = cgutils.get_or_insert_function(builder.module, signature, name)
            builder.call(call, [builder.trunc(args[0], ir.IntType(32)), word, WORD(8)])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return transfer


_sleep = _transfer("read")
_wake = _transfer("write")


def shape_of(arguments: str) -> int:
    """A kernel's SHAPE from its argument letters: integers, then at most one float."""
    letters = arguments.replace("q", "")
    n_integers, n_floats = letters.count("i"), letters.count("f")
    assert letters == "i" * n_integers + "f" * n_floats and n_floats <= 1 and n_integers <= MOST_INTEGERS, arguments
    return 2 * n_integers + n_floats


@intrinsic
def _invoke(typingctx, row, part, parts):
    """Call the function of the row at address `row`; 0, or Numba's status when it failed to allocate memory."""

    def codegen(context, builder, sig, args):
        words = _pointer(builder, args[0])
        part, parts = args[1:]

        def word(i):
            return builder.load(builder.gep(words, [ir.IntType(32)(i)]))

        status = cgutils.alloca_once(builder, ir.IntType(32))
        done = builder.append_basic_block("done")
        unknown = builder.append_basic_block("unknown")
        switch = builder.switch(word(SHAPE), unknown)
        for n in range(2 * MOST_INTEGERS + 2):
            n_integers, n_floats = divmod(n, 2)
            block = builder.append_basic_block()
            switch.add_case(WORD(n), block)
            with builder.goto_block(block):
                kinds = [types.int64] * n_integers + [types.float64] * n_floats
                values = [word(ARGUMENTS + i) for i in range(len(kinds))]
                if n_floats:
                    values[-1] = builder.bitcast(values[-1], ir.DoubleType())
                kinds, values = kinds + [types.int64] * 2, values + [part, parts]
                function = context.call_conv.get_function_type(types.none, kinds).as_pointer()
                address = builder.inttoptr(word(FUNCTION), function)
                outcome, _ = context.call_conv.call_function(builder, address, types.none, kinds, values)
                builder.store(outcome.code, status)
                builder.branch(done)
        with builder.goto_block(unknown):
            builder.unreachable()
        builder.position_at_end(done)
        return builder.zext(builder.load(status), WORD)

    return types.int64(types.int64, types.int64, types.int64), codegen


# ---- the threads' side ----

entry = numba.njit(nogil=True, cache=True)


@register_jitable
def _take(next, run, parts):
    """The next part of a row in this run; `parts` when none is left."""
    while True:
        word = _read(next)
        number = word >> RUN_BITS
        part = word - (run << RUN_BITS) if number == run else 0
        if number > run or part >= parts:
            return parts
        if _replace(next, word, (run << RUN_BITS) + part + 1):
            return part


@register_jitable
def _finished(control, run, parts):
    """Wait until `parts` parts of the run are finished; False if the whole run is."""
    spins = 0
    while True:
        done = _read(control + 8 * DONE)
        if done >> 32 != run:
            return False
        if done & COUNT >= parts:
            return True
        spins += 1
        if spins < SPINS:
            pause()
        else:
            yield_()


@register_jitable
def _rows(control, table, first, last, run):
    """A thread's share of rows first..last. When it returns, the thread has nothing to do in this run; others may."""
    start = _read(table + 8 * (ROW * first + BEFORE))
    for r in range(first, last):
        row = table + 8 * ROW * r
        if _read(row + 8 * WAIT) and not _finished(control, run, _read(row + 8 * BEFORE) - start):
            return
        parts, next = _read(row + 8 * PARTS), row + 8 * NEXT
        part = _take(next, run, parts)
        while part < parts:
            if _invoke(row, part, parts) != 0:
                _write(control + 8 * FAILED, 1)
            _add(control + 8 * DONE, 1)
            part = _take(next, run, parts)


@register_jitable
def _job(control, seen, parked, bell):
    """The number of a run that is on and is not `seen`; asleep (reading from `bell`) when none has come for long."""
    while True:
        job = seen
        for i in range(SPINS + PATIENCE):
            job = _read(control + 8 * JOB)
            if job != seen and job & 1:
                return job
            if i < SPINS:
                pause()
            else:
                yield_()
        _swap(parked, 1)
        # Whoever has a job finds `parked` set and rings; if it came just before, the bell is not needed, or already rung.
        if _read(control + 8 * JOB) == job or _swap(parked, 0) == 0:
            _sleep(bell)


@entry
def _serve(control, thread, bell):
    """A worker's life, until it is given the table 0."""
    job = 0
    while True:
        job = _job(control, job, control + 8 * (PARKED + LINE * thread), bell)
        # A table stays where it is while a thread is inside; if the run is over by now, it may be gone, or be another.
        _add(control + 8 * INSIDE, 1)
        words = control + 8 * TABLE
        table, first, last = _read(words), _read(words + 8), _read(words + 16)
        if _read(control + 8 * JOB) == job:
            if table == 0:
                return
            _rows(control, table, first, last, job)
        _add(control + 8 * INSIDE, -1)


@register_jitable
def _publish(control, table, first, last, threads, bells):
    """Begin a run; `bells`: address of a file for each thread."""
    run = _read(control + 8 * JOB) + 1
    _write(control + 8 * TABLE, table)
    _write(control + 8 * FIRST, first)
    _write(control + 8 * LAST, last)
    _write(control + 8 * DONE, run << 32)
    if threads > 1:
        _add(control + 8 * JOB, 1)
        for thread in range(1, threads):
            if _swap(control + 8 * (PARKED + LINE * thread), 0):
                _wake(_read(bells + 8 * thread))
    return run


@entry
def _run(control, table, first, last, threads, bells):
    """The caller's side: a whole run.

    One call, so that no signal handler of Python's can come between and leave the others waiting.
    """
    if first >= last:
        return
    run = _publish(control, table, first, last, threads, bells)
    _rows(control, table, first, last, run)
    end = table + 8 * ROW * (last - 1)
    parts = _read(end + 8 * BEFORE) + _read(end + 8 * PARTS) - _read(table + 8 * (ROW * first + BEFORE))
    _finished(control, run, parts)
    _add(control + 8 * JOB, 1 if threads > 1 else 2)


@entry
def _dismiss(control, threads, bells):
    """Send the threads home."""
    _publish(control, 0, 0, 0, threads, bells)


LOOPS = ((_run, 6), (_serve, 3), (_dismiss, 3))  # what must be compiled before a pool starts, and the number of its arguments


# ---- Python's side ----


def _bell() -> tuple[int, int]:
    """A file to sleep on and one to wake it. An eventfd where there is one: a pipe puts the sleeper on its waker's processor."""
    if hasattr(os, "eventfd"):
        file = os.eventfd(0)
        return file, file
    return os.pipe()


def _worker(control: np.ndarray, thread: int, bell: int) -> None:
    """A thread's only step in Python; `control` lives as long as it is used."""
    _serve(control.ctypes.data, thread, bell)


def _close(control: np.ndarray, bells: np.ndarray, threads: list[threading.Thread], files: set[int]) -> None:
    """The end of a pool that is forgotten."""
    _dismiss(control.ctypes.data, len(bells), bells.ctypes.data)
    for thread in threads:
        thread.join()
    for file in files:
        os.close(file)


class Pool:
    """`n_threads` threads, the caller's among them. One caller at a time."""

    def __init__(self, n_threads: int):
        self.threads = n_threads
        self.control = np.zeros(PARKED + LINE * n_threads, np.int64)
        bells = [_bell() for _ in range(1, n_threads)]
        self.bells = np.array([-1, *(wake for _, wake in bells)], np.int64)
        self.tables: dict[int, np.ndarray] = {}  # that a thread may still be in
        self.address, self.bells_at = self.control.ctypes.data, self.bells.ctypes.data
        workers = []
        for thread, (sleep, _) in enumerate(bells, 1):
            arguments = (self.control, thread, sleep)
            workers.append(threading.Thread(target=_worker, args=arguments, name=f"rgpu-{thread}", daemon=True))
            workers[-1].start()
        # The threads keep the shared words alive, not the pool: they leave when it is forgotten.
        weakref.finalize(self, _close, self.control, self.bells, workers, {file for bell in bells for file in bell})

    def run(self, table: np.ndarray, first: int, last: int, threads: int | None = None) -> None:
        """Run rows first..last of an int64 table [n, ROW]; with `threads` = 1 by the caller alone.

        Raises MemoryError if a kernel found none for its scratch.
        """
        self.tables[id(table)] = table
        _run(self.address, table.ctypes.data, first, last, threads or self.threads, self.bells_at)
        while self.control[INSIDE] and len(self.tables) > KEPT_TABLES:
            time.sleep(0)
        if not self.control[INSIDE]:
            self.tables.clear()
        if self.control[FAILED]:
            self.control[FAILED] = 0
            raise MemoryError("no memory for the scratch of a kernel")

