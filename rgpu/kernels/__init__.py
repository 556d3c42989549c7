"""By which loops: the Numba kernels of the CPU backend, one module per family.

A kernel takes the tags of the types it reads, then addresses and sizes (int64), then at most one float64, and last which part
of the work to do and of how many: no arrays and no threads of its own, so that a recorded row can repeat it (pool.py). Its
argument list is declared with it, so that it is compiled for exactly the types a model needs, before the first token.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from threading import Lock

import numba
from numba.core import event
from numba.extending import register_jitable

from ..quants.blocks import FASTMATH
from .pool import LOOPS, Pool, shape_of

_building = Lock()  # the permission to compile is a flag of the kernel, which all threads share

# A piece of a kernel: compiled into it, with a kernel's floating-point rules (they do not carry over by themselves).
piece = register_jitable(fastmath=FASTMATH, error_model="numpy")


class Kernel:
    """A compiled loop. Called from Python, it does all of its work as one part."""

    def __init__(self, function: Callable, arguments: str):
        self.dispatcher = numba.njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")(function)
        self.name, self.arguments, self.shape = function.__name__, arguments, shape_of(arguments)
        self.addresses: dict[tuple[str, ...], int] = {}

    def __call__(self, *arguments) -> None:
        self.dispatcher(*arguments, 0, 1)

    def signature(self, tags: Iterable[tuple]) -> tuple:
        """The types of its arguments when it is compiled for these tags."""
        tag_types = iter([numba.typeof(tag) for tag in tags])
        letters = {"i": numba.int64, "f": numba.float64}
        return (*(next(tag_types) if a == "q" else letters[a] for a in self.arguments), numba.int64, numba.int64)

    def address(self, *tags: tuple) -> int:
        """Where the native code for these tags lies; it must have been built."""
        names = tuple(type(tag).__name__ for tag in tags)
        if names not in self.addresses:
            compiled = self.dispatcher.overloads[self.signature(tags)]
            self.addresses[names] = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
        return self.addresses[names]


def kernel(arguments: str) -> Callable:
    """Decorate a kernel; `arguments` has a letter each: q a type's tag, i an int64 (address, size), f a float64.

    The function's last two parameters, which have no letter, are `part` and `parts`.
    """
    return lambda function: Kernel(function, arguments)


def build(needed: Iterable[tuple], progress: Callable[[int, int, str], None] | None = None) -> None:
    """Compile (or load from the disk cache) kernels: `needed` holds tuples (kernel, tag, tag, …).

    `progress(done, total, name)` is called before each real compilation, and once at the end with done = total.
    """
    with _building:
        _build(list(needed), progress)


def _build(jobs: list[tuple], progress) -> None:
    for done, (kernel, *tags) in enumerate(jobs):
        signature = kernel.signature(tags)
        if signature in kernel.dispatcher.overloads:
            continue
        name = " ".join([kernel.name, *(type(tag).__name__ for tag in tags)])
        with event.install_listener("numba:compile", _Announce(progress, done, len(jobs), name)):
            _compile(kernel.dispatcher, signature)
    for loop, n in LOOPS:
        if not loop.signatures:
            _compile(loop, (numba.int64,) * n)
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
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


__all__ = ["Kernel", "Pool", "build", "kernel", "most_threads", "piece"]
