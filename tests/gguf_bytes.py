"""GGUF files put together by hand, byte by byte, so that they may also lie, and what opening a liar must do.

The bytes come from the format's description alone: nothing here writes through rgpu or gguf-py.
"""

import struct
import tracemalloc
from pathlib import Path

import gguf.constants  # noqa: F401  (the reader imports it when first used; not to be counted as memory of an open)
import pytest

from rgpu.errors import GGUFError
from rgpu.gguf import GGUFFile

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A stored string; `length` is what it claims."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if length is None else length) + data


def scalar(kind: int, value) -> bytes:
    return string(value) if kind == STRING else struct.pack("<" + FORMATS[kind], value)


def pair(key: str | bytes, kind: int, value) -> bytes:
    return string(key) + struct.pack("<I", kind) + scalar(kind, value)


def array(key: str, kind: int, values, count: int | None = None) -> bytes:
    """A pair with an array; `count` is what it claims."""
    head = struct.pack("<IIQ", ARRAY, kind, len(values) if count is None else count)
    return string(key) + head + b"".join(scalar(kind, value) for value in values)


def tensor(name: str | bytes, ne: tuple[int, ...], type_id: int, offset: int, n_dims: int | None = None) -> bytes:
    """A directory entry; `ne` with the contiguous dimension first, `offset` from the data section, `n_dims` as claimed."""
    n_dims = len(ne) if n_dims is None else n_dims
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", n_dims, *ne, type_id, offset)


def model(pairs=(), tensors=(), data=b"", *, alignment=32, version=3, n_tensors=None, n_pairs=None) -> bytes:
    """A whole file. The caller adds general.alignment to `pairs`; the counts may be lies."""
    counts = len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def file_with(folder: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def refuse(path: Path, *words: str) -> None:
    """Opening raises one GGUFError line that names the file and says all of `words`, allocating next to nothing."""
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError) as caught:
            GGUFFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600
    for word in words:
        assert word in message
    assert peak < 1 << 20  # bytes, for files of at most 64 KiB
