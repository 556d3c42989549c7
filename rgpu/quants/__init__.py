"""How a weight is stored: one class per ggml type, discovered by existing as a file of this folder.

A type is an empty named tuple. Its class holds the ggml id, the block geometry, NumPy `dequantize` and Numba sources: of blocks,
what their bytes mean as integers and scales (`products` makes the rest of that); without blocks, `dot` and `unpack`; where a KV
cache may use it, `pack`. Its instance is the compile-time tag by which one kernel driver becomes a kernel per type (`blocks.dot`
and friends). Nothing outside this folder looks at ids.
"""

import atexit
import contextlib
import hashlib
import importlib
import os
import pkgutil
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import numba

from ..cache import cache_dir

PACKAGE = Path(__file__).parent.parent
STALE = 30 * 86400  # seconds without a start after which kernels of other sources are deleted


def _source_hash() -> str:
    """Digest of all that gets compiled: Numba's own cache does not notice an edit in an imported file."""
    digest = hashlib.sha256()
    for pattern in ("rgpu/quants/*.py", "rgpu/kernels/*.py", "convert/quantize.py"):
        for path in sorted(PACKAGE.parent.glob(pattern)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _kernel_folder() -> Path:
    """Where kernels of these very sources are kept; a folder of this process alone, with a warning, if that can't be written."""
    folder = cache_dir() / f"numba-{_source_hash()}"
    if folder.is_dir() and os.access(folder, os.R_OK | os.X_OK):
        with contextlib.suppress(OSError):  # it may be complete and read-only
            os.utime(folder)  # this start
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(
            f"kernels can't be kept in {folder.parent} ({error.strerror}): they are compiled at every start; "
            "set RGPU_CACHE_DIR to a writable folder",
            stacklevel=2,
        )
        folder = Path(tempfile.mkdtemp(prefix="rgpu-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder
    for other in folder.parent.glob("numba-*"):
        with contextlib.suppress(OSError):  # another process may be cleaning up too
            if time.time() - other.stat().st_mtime > STALE:
                shutil.rmtree(other, ignore_errors=True)
    return folder


# Before any kernel is decorated: Numba fixes a function's cache folder at that moment.
numba.config.CACHE_DIR = str(_kernel_folder())

from .blocks import dot, pack, unpack  # noqa: E402 (the types below and every kernel need the folder set first)


def _discover() -> dict[str, tuple]:
    """One tag per class in this folder that carries a ggml id, by the class's name."""
    types = {}
    for module in pkgutil.iter_modules(__path__):
        found = vars(importlib.import_module(f"{__name__}.{module.name}"))
        types |= {name: cls() for name, cls in found.items() if isinstance(cls, type) and hasattr(cls, "id")}
    return dict(sorted(types.items(), key=lambda item: item[1].id))


TYPES = _discover()  # "Q4_K" -> Q4_K()

__all__ = ["TYPES", "dot", "pack", "unpack"]
