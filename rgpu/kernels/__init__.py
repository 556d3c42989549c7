"""By which loops: the Numba kernels of the CPU backend, one module per family.

A kernel takes the tags of the types it reads, then addresses (int64) and sizes (int64, float64): no arrays, so that a call
costs little and a recorded step can repeat it. Its argument list is declared with it, so that it is compiled for exactly the
types a model needs, before the first token; a call with another type's tag is an error instead of a silent compilation.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterable

# Threads that meet at the end of a parallel loop spin for some microseconds, then sleep. GNU OpenMP's default is to spin for
# milliseconds, which on a machine with another busy process costs three times the whole step. Read when the pool starts.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numba  # noqa: E402
from numba.core import event
from numba.extending import register_jitable

from ..quants.blocks import FASTMATH

_building = threading.Lock()  # the permission to compile is a flag of the kernel, which all threads share

# A piece of a kernel: compiled into it, with a kernel's floating-point rules (they do not carry over by themselves). Bodies of
# parallel loops are such pieces too, because Numba's parallel pass may drop writes through an address as dead.
piece = register_jitable(fastmath=FASTMATH, error_model="numpy")


def kernel(arguments: str, parallel: bool = False) -> Callable:
    """Decorate a kernel; `arguments` has a letter each: q a type's tag, i an int64 (address, size), f a float64."""

    def decorate(function):
        dispatcher = numba.njit(nogil=True, cache=True, parallel=parallel, fastmath=FASTMATH, error_model="numpy")(function)
        dispatcher.arguments = arguments
        return dispatcher

    return decorate


def build(needed: Iterable[tuple], progress: Callable[[int, int, str], None] | None = None) -> None:
    """Compile (or load from the disk cache) kernels: `needed` holds tuples (kernel, tag, tag, …).

    `progress(done, total, name)` is called before each real compilation, and once at the end with done = total.
    """
    with _building:
        _build(list(needed), progress)


def _build(jobs: list[tuple], progress) -> None:
    for done, (dispatcher, *tags) in enumerate(jobs):
        tag_types = iter(numba.typeof(tag) for tag in tags)
        letters = {"i": numba.int64, "f": numba.float64}
        signature = tuple(next(tag_types) if a == "q" else letters[a] for a in dispatcher.arguments)
        if signature in dispatcher.overloads:
            continue
        name = " ".join([dispatcher.py_func.__name__, *(type(tag).__name__ for tag in tags)])
        with event.install_listener("numba:compile", _Announce(progress, done, len(jobs), name)):
            _compile(dispatcher, signature)
    if progress:
        progress(len(jobs), len(jobs), "")


def _compile(dispatcher, signature) -> None:
    """Load a kernel from the cache or compile it; a cache that is damaged or can't be written costs time, never the start."""
    dispatcher.disable_compile(False)
    try:
        try:
            dispatcher.compile(signature)
        except OSError as error:
            if signature not in dispatcher.overloads:  # reading failed, not keeping
                raise
            folder = numba.config.CACHE_DIR
            warnings.warn(f"kernels can't be kept in {folder} ({error.strerror}): they are compiled at every start", stacklevel=4)
        except Exception:
            dispatcher._cache.flush()  # a write that was cut off: forget what is kept of this kernel
            dispatcher.compile(signature)
    finally:
        if dispatcher.signatures:  # none after a Ctrl-C
            dispatcher.disable_compile()


class _Announce(event.Listener):
    """Reports the start of a compilation; loading from the cache raises no such event."""

    def __init__(self, progress, done, total, name):
        self.report = (lambda: progress(done, total, name)) if progress else None

    def on_start(self, event):
        if self.report:
            self.report()
            self.report = None  # the functions a kernel calls are compiled within it

    def on_end(self, event):
        pass


def most_threads() -> int:
    """The threads that Numba's pool has: one for each processor this process may use."""
    return numba.config.NUMBA_NUM_THREADS


def set_threads(n: int) -> None:
    """How many threads the parallel loops of the calling thread use from now on; it is not set back."""
    if numba.get_num_threads() != n:  # asking is cheaper than telling: 4 microseconds, a quarter of a small kernel
        numba.set_num_threads(n)
