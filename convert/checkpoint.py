"""A hub folder: config.json and its safetensors files, mapped and checked; tensors by name as float32 slices.

Owns the safetensors format (8 bytes of length, a JSON header, data) and finding the files. Knows no architecture.
"""

import contextlib
import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rgpu.errors import ConvertError

from .values import DTYPES, float32

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_DIMS = 8


class HubTensor(NamedTuple):
    """One entry of a safetensors header: where a tensor lies and how it is stored."""

    name: str
    dtype: str  # "BF16"
    shape: tuple[int, ...]
    file: int
    offset: int  # absolute in its file, bytes
    nbytes: int


class Checkpoint:
    """An opened folder: `config`, and `tensors` by name in file order. Whatever is wrong with it raises ConvertError."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_json(folder / "config.json")
        if self.config is None:
            raise ConvertError(f"{folder} is not a model folder: it has no config.json")
        self.paths, listed = _find_files(folder)
        self._maps: list[mmap.mmap] = []
        self.tensors: dict[str, HubTensor] = {}
        for number, path in enumerate(self.paths):
            self._open(path, number)
        if absent := [name for name in listed if name not in self.tensors]:
            raise ConvertError(f"{folder / INDEX} lists {some(absent)}, which no file holds")

    def _open(self, path: Path, number: int) -> None:
        try:
            with path.open("rb") as file:
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise ConvertError(f"{path} can't be opened: {getattr(error, 'strerror', None) or error}") from error
        for tensor in _read_header(path, self._maps[-1], number):
            if tensor.name in self.tensors:
                other = self.paths[self.tensors[tensor.name].file].name
                raise ConvertError(f"{path}: the tensor {tensor.name} is in {other} as well")
            self.tensors[tensor.name] = tensor

    def view(self, name: str) -> np.ndarray:
        """The stored values in their shape and type, nothing copied; BF16 as its 16 bits (uint16)."""
        tensor = self.tensors[name]
        stored = np.frombuffer(self._maps[tensor.file], DTYPES[tensor.dtype], math.prod(tensor.shape), tensor.offset)
        return stored.reshape(tensor.shape)

    def read(self, name: str, part: Any = ...) -> np.ndarray:
        """float32 copy of `view(name)[part]`."""
        return float32(self.view(name)[part], self.tensors[name].dtype)

    def release(self, name: str) -> None:
        """Lets the system drop the pages of a tensor that has been read: the resident set stays small."""
        tensor = self.tensors[name]
        begin = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
        with contextlib.suppress(AttributeError, OSError):  # only a hint, and not every system takes it
            self._maps[tensor.file].madvise(mmap.MADV_DONTNEED, begin, tensor.offset + tensor.nbytes - begin)


def read_json(path: Path) -> dict | None:
    """The object in a JSON file, None if there is no such file; ConvertError if it is not a JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except OSError as error:
        raise ConvertError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConvertError(f"{path} should hold a JSON object, found {type(found).__name__}")
    return found


def some(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def _find_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The safetensors files of a folder, and the tensors that its index lists (none without an index)."""
    index = read_json(folder / INDEX)
    if index is None:
        found = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
        if not found:
            raise ConvertError(f"{folder} has no .safetensors files (other formats of weights are not supported)")
        return found, []
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ConvertError(f"{folder / INDEX} has no usable weight_map")
    files = sorted(set(listed.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise ConvertError(f"{folder / INDEX} names {some(outside)}, which is not a plain file name")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ConvertError(f"{folder}: {len(missing)} of {len(files)} files are missing: {some(missing)}")
    return [folder / name for name in files], list(listed)


def _read_header(path: Path, buffer: mmap.mmap, number: int) -> list[HubTensor]:
    size = len(buffer)
    length = struct.unpack_from("<Q", buffer)[0] if size >= 8 else 0
    if length < 2 or length > min(MAX_HEADER, size - 8):
        raise ConvertError(f"{path} is not a safetensors file: {size} bytes, header of {length} bytes")
    try:
        header = json.loads(buffer[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ConvertError(f"{path}: the header should be a JSON object, found {type(header).__name__}")
    header.pop("__metadata__", None)
    return [_entry(path, name, entry, number, 8 + length, size) for name, entry in header.items()]


def _entry(path: Path, name: str, entry: Any, number: int, data: int, size: int) -> HubTensor:
    """One checked entry of a header; `data` is the offset of the data section."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = isinstance(dtype, str) and len(shape) <= MAX_DIMS and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise ConvertError(f"{path}: the entry of {name} is malformed: {str(entry)[:100]}")
    if dtype not in DTYPES:
        raise ConvertError(f"{path}: {name} is {dtype}, which is not supported (supported: {', '.join(DTYPES)})")
    needed = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if end - begin != needed or data + end > size:
        raise ConvertError(
            f"{path}: {name} ({dtype} {shape}) should be {needed} bytes within a file of {size}, "
            f"but its data_offsets are {begin} to {end} behind a header of {data} bytes"
        )
    return HubTensor(name, dtype, tuple(shape), number, data + begin, needed)
