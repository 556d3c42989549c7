"""One GGUF file, mapped and checked: its header, its key-value pairs, its tensor directory.

Owns every check that one file allows, done once at open and before anything is allocated. Splits and access by name
are in reader.py, values of metadata in metadata.py.
"""

import contextlib
import math
import mmap
import stat
import struct
from pathlib import Path
from typing import NamedTuple

from ..errors import GGUFError
from .metadata import BEYOND, MIN_PAIR, U32, U64, UINT32, Metadata, brief, read_metadata

HEADER = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of key-value pairs
MAX_NAME = 1024  # bytes; ggml allows 63, some writers more
MIN_TENSOR = 32  # bytes of the smallest directory entry: an empty name and one dimension
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32


class TensorInfo(NamedTuple):
    """One directory entry: where a tensor lies and how it is stored."""

    name: str
    quant: str  # ggml type name, "Q4_K"
    shape: tuple[int, ...]  # slowest axis first, as many axes as the file says
    shard: int
    offset: int  # absolute in the shard's file, bytes
    nbytes: int


class Shard(NamedTuple):
    """One opened file of a model: a whole GGUF of its own."""

    path: Path
    buffer: mmap.mmap
    version: int
    alignment: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]

    def check(self) -> None:
        """GGUFError if the file was shortened after it was mapped: to touch what it has lost would kill the process."""
        size = self.buffer.size()
        if size < len(self.buffer):
            raise GGUFError(f"{self.path}: has been shortened to {size} bytes, of {len(self.buffer)}, while it is in use")

    def close(self) -> None:
        self.metadata.close()
        # Views that are still in use keep the mapping: it goes with the last of them.
        with contextlib.suppress(BufferError):
            self.buffer.close()


def open_shard(path: Path, number: int) -> Shard:
    """Maps and checks one file; `number` is what its TensorInfo entries carry. Raises GGUFError, at the first fault."""
    buffer = _map(path)
    version, n_tensors, n_pairs = _read_header(path, buffer)
    metadata, position = read_metadata(path, buffer, HEADER.size, n_pairs)
    alignment = _alignment(path, metadata)
    entries, position = _read_directory(path, buffer, position, n_tensors)
    data = -(-position // alignment) * alignment
    tensors = _place(path, entries, number, data, alignment, len(buffer))
    return Shard(path, buffer, version, alignment, metadata, tensors)


def _map(path: Path) -> mmap.mmap:
    try:
        # A pipe would block in open(), so look first.
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise GGUFError(f"{path}: is a directory, expected a GGUF file")
        if not stat.S_ISREG(found.st_mode):
            raise GGUFError(f"{path}: is not a regular file")
        if found.st_size == 0:
            raise GGUFError(f"{path}: the file is empty")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise GGUFError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error


def _read_header(path: Path, buffer: mmap.mmap) -> tuple[int, int, int]:
    """Version, number of tensors, number of pairs; refuses counts that the file is too short for."""
    size = len(buffer)
    if buffer[:4] != b"GGUF":
        raise GGUFError(f"{path}: is not a GGUF file: it begins with {buffer[:4]!r}, not b'GGUF'")
    if size < HEADER.size:
        raise GGUFError(f"{path}: the file ends ({size} bytes) inside the header of {HEADER.size} bytes")
    _, version, n_tensors, n_pairs = HEADER.unpack_from(buffer)
    if version and version & 0xFFFF == 0:
        raise GGUFError(f"{path}: is a big-endian GGUF file; only little-endian ones are supported")
    if version not in (2, 3):
        raise GGUFError(f"{path}: GGUF version {version} is not supported, only 2 and 3 are")
    for count, least, what in ((n_tensors, MIN_TENSOR, "tensors"), (n_pairs, MIN_PAIR, "key-value pairs")):
        if count > (size - HEADER.size) // least:
            raise GGUFError(f"{path}: the header claims {count} {what}, which a file of {size} bytes cannot hold")
    return version, n_tensors, n_pairs


def _alignment(path: Path, metadata: Metadata) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    alignment = metadata[key]
    if metadata.type_of(key) != (UINT32, None) or alignment <= 0 or alignment & (alignment - 1):
        raise GGUFError(f"{path}: {key} should be a u32 and a power of two, found {brief(alignment)}")
    return alignment


def _read_directory(path: Path, buffer: mmap.mmap, position: int, n_tensors: int) -> tuple[list[tuple], int]:
    """The directory as stored, [(name, (ne0, ..., type id, relative offset))], and the offset behind it."""
    u32, u64 = U32.unpack_from, U64.unpack_from
    rest = [struct.Struct(f"<{n_dims}QIQ") for n_dims in range(MAX_DIMS + 1)]
    readers = [(fields.unpack_from, fields.size) for fields in rest]
    entries = []
    try:
        for i in range(n_tensors):
            begin = position
            length = u64(buffer, position)[0]
            if length > MAX_NAME:
                raise GGUFError(f"{path}: the name of tensor {i} at offset {begin} has {length} bytes, {MAX_NAME} are allowed")
            position += 8 + length
            name = buffer[begin + 8 : position].decode()
            n_dims = u32(buffer, position)[0]
            if not 1 <= n_dims <= MAX_DIMS:
                raise GGUFError(f"{path}: tensor {name!r} at offset {begin} has {n_dims} dimensions, 1 to {MAX_DIMS} are allowed")
            unpack, width = readers[n_dims]
            entries.append((name, unpack(buffer, position + 4)))
            position += 4 + width
    except BEYOND:
        raise GGUFError(f"{path}: the file ends ({len(buffer)} bytes) inside tensor info {i} at offset {begin}") from None
    except UnicodeDecodeError as error:
        raise GGUFError(f"{path}: the name of tensor {i} at offset {begin} is not UTF-8") from error
    return entries, position


def _place(path: Path, entries: list[tuple], number: int, data: int, alignment: int, size: int) -> dict[str, TensorInfo]:
    """Checks every entry against its type and the file's size; `data` is where relative offsets count from.

    Any order and gaps are fine (llama.cpp demands dense packing), overlaps and names that occur twice are not.
    """
    tensors: dict[str, TensorInfo] = {}
    extents: dict[tuple, tuple] = {}  # thousands of experts share a few shapes: work each out once
    previous_end, ordered = data, True
    for name, fields in entries:
        relative = fields[-1]
        stored = fields[:-1]
        if stored not in extents:
            extents[stored] = _extent(f"{path}: tensor {name!r}", stored)
        quant, shape, nbytes = extents[stored]
        if relative % alignment:
            raise GGUFError(f"{path}: tensor {name!r} has the offset {relative}, not a multiple of the alignment {alignment}")
        offset = data + relative
        if offset + nbytes > size:
            raise GGUFError(f"{path}: tensor {name!r} ({nbytes} bytes at offset {offset}) passes the file's end ({size} bytes)")
        if name in tensors:
            raise GGUFError(f"{path}: tensor {name!r} occurs twice")
        if offset < previous_end:
            ordered = False
        previous_end = offset + nbytes
        tensors[name] = TensorInfo(name, quant, shape, number, offset, nbytes)
    if not ordered:
        _refuse_overlaps(path, tensors)
    return tensors


def _extent(label: str, stored: tuple[int, ...]) -> tuple[str, tuple[int, ...], int]:
    """Type name, shape and bytes of a tensor stored as (ne0, ..., type id). Raises GGUFError beginning with `label`."""
    from gguf.constants import GGML_QUANT_SIZES  # here, because importing gguf takes about as long as opening a file

    *ne, type_id = stored
    quant = next((each for each in GGML_QUANT_SIZES if each == type_id), None)
    if quant is None:
        raise GGUFError(f"{label} has the unknown type id {type_id}")
    block, block_nbytes = GGML_QUANT_SIZES[quant]
    n_elements = math.prod(ne)
    if ne[0] % block or not n_elements:
        raise GGUFError(f"{label} has the dimensions {ne}; {quant.name} needs the first divisible by {block} and none zero")
    return quant.name, tuple(ne[::-1]), n_elements // block * block_nbytes


def _refuse_overlaps(path: Path, tensors: dict[str, TensorInfo]) -> None:
    by_offset = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in zip(by_offset, by_offset[1:], strict=False):
        if after.offset < before.offset + before.nbytes:
            raise GGUFError(f"{path}: tensors {before.name!r} and {after.name!r} overlap at offset {after.offset}")
