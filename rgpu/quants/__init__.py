"""How a weight is stored: one class per ggml type, discovered by existing as a file of this folder.

A type is an empty named tuple. Its class holds the ggml id, the block geometry, NumPy `dequantize` and the Numba source of
`dot`, `unpack` (and `pack`, where a KV cache may use it); its instance is the compile-time tag by which one kernel driver
becomes a kernel per type (`blocks.dot` and friends). Nothing outside this folder looks at ids.
"""

import hashlib
import importlib
import os
import pkgutil
from pathlib import Path

import numba

PACKAGE = Path(__file__).parent.parent


def cache_dir() -> Path:
    """The folder that keeps compiled kernels: `RGPU_CACHE_DIR`, or `rgpu` in the user's cache directory."""
    if root := os.environ.get("RGPU_CACHE_DIR"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rgpu"


def _source_hash() -> str:
    """Digest of all that gets compiled: Numba's own cache does not notice an edit in an imported file."""
    digest = hashlib.sha256()
    for folder in (PACKAGE / "quants", PACKAGE / "kernels", PACKAGE.parent / "convert"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


# Before any kernel is decorated: Numba fixes a function's cache folder at that moment.
numba.config.CACHE_DIR = str(cache_dir() / f"numba-{_source_hash()}")

from .blocks import dot, pack, unpack  # noqa: E402 (the types below and every kernel need the folder set first)


def _discover() -> dict[str, tuple]:
    """One tag per class in this folder that carries a ggml id, by the class's name."""
    types = {}
    for module in pkgutil.iter_modules(__path__):
        found = vars(importlib.import_module(f"{__name__}.{module.name}"))
        types |= {name: cls() for name, cls in found.items() if isinstance(cls, type) and hasattr(cls, "id")}
    return dict(sorted(types.items(), key=lambda item: item[1].id))


TYPES = _discover()  # "Q4_K" -> Q4_K()

__all__ = ["TYPES", "cache_dir", "dot", "pack", "unpack"]
