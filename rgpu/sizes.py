"""Sizes in bytes, as people write and read them: "6.3G" is 6,300,000,000 bytes, "6GiB" 6 · 2**30."""

import re

from .errors import RgpuError

SCALES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def nbytes(size: str | int, what: str) -> int:
    """Bytes of "6.3G", "500 MB", "6GiB" or a number of bytes; RgpuError names `what` it was meant for."""
    if isinstance(size, int) and size > 0:
        return size
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([KMGT]?I?)B?\s*", str(size).upper())
    if isinstance(size, str) and found and found[2] in SCALES and float(found[1]) > 0:
        return int(float(found[1]) * SCALES[found[2]])
    raise RgpuError(f"{what} is {size!r}, but must be a size such as 6.3G, 800M or 6GiB")


def text(n: float) -> str:
    """6.3 GB, 63.2 MB, 9.85 kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n / 1e3:.3g} kB"
