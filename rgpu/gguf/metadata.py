"""The key-value pairs of one GGUF file: located when the file is opened, decoded when asked for.

Owns the value types, their bytes and every check on them. Does not know what a key means, nor tensors, nor splits.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import GGUFError

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
# GGUF value type -> how its bytes are read. A bool is one byte; any non-zero one is true.
DTYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", UINT32: "<u4", 5: "<i4", 6: "<f4", BOOL: "u1", 10: "<u8", 11: "<i8", 12: "<f8"}
MAX_KEY = 65535  # bytes; the format's own limit
MIN_PAIR = 13  # bytes of the smallest pair: an empty key, the value type, one byte of value
U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")
# What unpack_from raises beyond the end of the buffer, by how far beyond.
BEYOND = (struct.error, IndexError, OverflowError)


class Entry(NamedTuple):
    """Where one value lies in the file (absolute offsets in bytes)."""

    start: int  # of the value type
    value: int  # of the value, or of an array's first element
    end: int
    type: int
    element: int | None  # element type of an array
    count: int  # elements; 1 for a scalar


class Metadata(Mapping[str, Any]):
    """Read-only mapping from key to value: int, float, bool, str, NumPy array (own memory, read-only) or list[str].

    Values are decoded on first access and kept: treat a returned list as read-only. A string that is not UTF-8 raises
    GGUFError naming the key, as does any access to a value after close().
    """

    def __init__(self, path, buffer, entries: dict[str, Entry]):
        self._path = path
        self._buffer = buffer
        self._entries = entries
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        entry = self._entries[key]
        buffer = self._open_buffer()
        if key not in self._values:
            self._values[key] = self._decode(buffer, key, entry)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def type_of(self, key: str) -> tuple[int, int | None]:
        """Value type of a key and, for an array, its element type, in the format's numbers: 4 u32, 8 string, 9 array."""
        entry = self._entries[key]
        return entry.type, entry.element

    def raw(self, key: str) -> bytes:
        """The stored bytes of a pair after its key: value type and value, ready to be written behind the same or another key."""
        entry = self._entries[key]
        return bytes(self._open_buffer()[entry.start : entry.end])

    def close(self) -> None:
        self._buffer = None
        self._values = {}

    def _open_buffer(self):
        if self._buffer is None:
            raise GGUFError(f"{self._path}: the file is closed")
        return self._buffer

    def _decode(self, buffer, key: str, entry: Entry) -> Any:
        kind = entry.type if entry.element is None else entry.element
        if kind == STRING:
            texts = self._decode_strings(buffer, key, entry)
            return texts if entry.type == ARRAY else texts[0]
        numbers = np.frombuffer(buffer, DTYPES[kind], entry.count, entry.value)
        numbers = numbers != 0 if kind == BOOL else numbers.copy()
        if entry.type != ARRAY:
            return numbers[0].item()
        numbers.flags.writeable = False
        return numbers

    def _decode_strings(self, buffer, key: str, entry: Entry) -> list[str]:
        unpack, position, texts = U64.unpack_from, entry.value, []
        try:
            for _ in range(entry.count):
                begin = position + 8
                position = begin + unpack(buffer, position)[0]
                texts.append(buffer[begin:position].decode())
        except UnicodeDecodeError as error:
            where = f"string {len(texts)} of key {key!r}" if entry.type == ARRAY else f"the string of key {key!r}"
            raise GGUFError(f"{self._path}: {where} (offset {begin}) is not UTF-8") from error
        return texts


def brief(value: Any) -> str:
    """A value on one short line, for messages."""
    return " ".join(repr(value)[:200].split())[:60]


def read_metadata(path, buffer, position: int, n_pairs: int) -> tuple[Metadata, int]:
    """Locates `n_pairs` pairs that begin at `position` of a mapped file; returns them and the offset behind the last.

    The caller has checked that the file could hold n_pairs * MIN_PAIR bytes. Raises GGUFError naming key and offset.
    """
    entries: dict[str, Entry] = {}
    size = len(buffer)
    for i in range(n_pairs):
        label = f"key-value pair {i} at offset {position}"
        try:
            length = U64.unpack_from(buffer, position)[0]
            if length > MAX_KEY:
                raise GGUFError(f"{path}: {label} has a key of {length} bytes, {MAX_KEY} are allowed")
            start = position + 8 + length
            key = buffer[position + 8 : start].decode()
            label = f"key {key[:80]!r} at offset {position}"
            if key in entries:
                raise GGUFError(f"{path}: {label} occurs twice")
            entry = entries[key] = _locate(f"{path}: {label}", buffer, start)
        except BEYOND:
            raise GGUFError(f"{path}: the file ends ({size} bytes) inside {label}") from None
        except UnicodeDecodeError as error:
            raise GGUFError(f"{path}: {label} has a key that is not UTF-8") from error
        position = entry.end
    return Metadata(path, buffer, entries), position


def _locate(label: str, buffer, start: int) -> Entry:
    """The extent of the value whose type is at `start`. Raises GGUFError beginning with `label`, or one of BEYOND."""
    kind = U32.unpack_from(buffer, start)[0]
    value, element, count = start + 4, None, 1
    if kind == ARRAY:
        element, count, value = U32.unpack_from(buffer, start + 4)[0], U64.unpack_from(buffer, start + 8)[0], start + 16
        if element == ARRAY:
            raise GGUFError(f"{label} is an array of arrays, which is not supported")
    item = kind if element is None else element
    if item != STRING and item not in DTYPES:
        raise GGUFError(f"{label} has the unknown value type {item}")
    width = 8 if item == STRING else np.dtype(DTYPES[item]).itemsize  # of a string: its length
    left = len(buffer) - value
    if element is not None and count > left // width:
        raise GGUFError(f"{label} claims {count} elements, but only {left} bytes of the file follow")
    end = _skip_strings(buffer, value, count) if item == STRING else value + count * width
    if end > len(buffer):
        raise IndexError  # the last value is cut off, like those where unpack_from noticed
    return Entry(start, value, end, kind, element, count)


def _skip_strings(buffer, position: int, count: int) -> int:
    """The offset behind `count` strings. A vocabulary makes this the hot loop of opening, so it checks nothing: after a
    length that leads beyond the file the next unpack raises, and the caller looks at the end."""
    unpack = U64.unpack_from
    for _ in range(count):
        position += unpack(buffer, position)[0] + 8
    return position
