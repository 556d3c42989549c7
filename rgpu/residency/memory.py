"""How much memory this process has, and giving back what it does not need."""

import contextlib
import ctypes
import os


def resident() -> int:
    """Bytes of the process that are in memory, mapped files included; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def trim() -> None:
    """Give memory that was freed back to the system, where the C library can: a compiler has left much of it."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
