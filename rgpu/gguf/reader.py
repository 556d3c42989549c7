"""A model's GGUF file or files, opened as one: tensors by name, metadata, mappings.

Owns splits and access; holds no tensor data. One file's structure and its checks are in shard.py, values of metadata
in metadata.py; names are given meaning in names.py, expert records in layout.py.
"""

import os
import re
from pathlib import Path

import numpy as np

from ..errors import GGUFError
from .metadata import brief
from .shard import Shard, TensorInfo, open_shard

__all__ = ["GGUFFile", "TensorInfo"]

MAX_SPLITS = 65535  # split.count is a u16
SPLIT_NAME = re.compile(r"(?P<prefix>.*)-[0-9]{5}-of-[0-9]{5}\.gguf")


class GGUFFile:
    """A GGUF file (version 2 or 3, little-endian), or all files of a split one, mapped for reading.

    `path` may name any shard. `tensors` maps names to TensorInfo in file order, shard after shard; `metadata`, `version`
    and `alignment` are those of the first shard. Opening reads headers only and touches no tensor page. Whatever is
    wrong with the files raises GGUFError. A file that another program shortens while it is mapped kills the process at
    the next access (SIGBUS), which Python can't catch: whoever reads for long calls `check` now and then.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._shards = _open_all(self.path)
        self.tensors = _merge(self._shards)
        self._mappings = [np.frombuffer(shard.buffer, np.uint8) for shard in self._shards]
        self.paths = [shard.path for shard in self._shards]
        first = self._shards[0]
        self.version, self.alignment, self.metadata = first.version, first.alignment, first.metadata

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends access through this object; views handed out before stay valid until they are dropped."""
        self._mappings = []
        for shard in self._shards:
            shard.close()
        self._shards = []

    def check(self) -> None:
        """GGUFError if a file has become shorter than it was: a microsecond for each."""
        for shard in self._shards:
            shard.check()

    def mapping(self, shard: int = 0) -> np.ndarray:
        """Read-only uint8 view of one whole shard file."""
        if not self._mappings:
            raise GGUFError(f"{self.path}: the file is closed")
        return self._mappings[shard]

    def bytes(self, name: str) -> np.ndarray:
        """Read-only uint8 view [nbytes] of a tensor's stored bytes; nothing is copied. Raises GGUFError if there is none."""
        info = self._info(name)
        return self.mapping(info.shard)[info.offset : info.offset + info.nbytes]

    def dequantize(self, name: str) -> np.ndarray:
        """A tensor's values as float32 in its shape, through gguf.quants: slow, for tools and tests. Raises GGUFError."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        info = self._info(name)
        rows = self.bytes(name).reshape(*info.shape[:-1], -1)
        try:
            values = dequantize(rows, GGMLQuantizationType[info.quant])
        except NotImplementedError:
            raise GGUFError(f"{self.path}: tensor {name!r}: the gguf package does not dequantise {info.quant}") from None
        return np.require(values.reshape(info.shape), np.float32, "W")  # of F32 it returns a view of the mapping

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer key of any width; a per-layer array will do if all its entries are equal.

        Raises GGUFError if the key is missing and there is no default, is no integer, or varies between layers.
        """
        if key not in self.metadata and default is not None:
            return default
        values = self._integers(key)
        if len(set(values)) != 1:
            raise GGUFError(f"{self.path}: key {key!r} should hold one number, found {brief(values)}")
        return values[0]

    def integers(self, key: str, n: int) -> list[int]:
        """An integer key with n entries, one per layer; a scalar holds for every layer. Raises GGUFError."""
        values = self._integers(key)
        if isinstance(self.metadata[key], int):
            return values * n
        if len(values) != n:
            raise GGUFError(f"{self.path}: key {key!r} should have {n} entries, found {len(values)}")
        return values

    def _integers(self, key: str) -> list[int]:
        if key not in self.metadata:
            raise GGUFError(f"{self.path}: the key {key!r} is missing")
        value = self.metadata[key]
        if isinstance(value, int):
            return [int(value)]
        if isinstance(value, np.ndarray) and value.dtype.kind in "iub":
            return [int(entry) for entry in value]
        raise GGUFError(f"{self.path}: key {key!r} should be an integer, found {brief(value)}")

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise GGUFError(f"{self.path}: there is no tensor {name!r}")
        return self.tensors[name]


def _open_all(path: Path) -> list[Shard]:
    """The file and, if it is one of a split, the others, in the order of their numbers."""
    opened = open_shard(path, 0)
    number, count = _split_key(opened, "split.no"), _split_key(opened, "split.count")
    if count <= 1:
        return [opened]
    paths = _split_paths(path, number, count)
    # It was opened as number 0, before its own was known.
    opened = opened._replace(tensors={name: info._replace(shard=number) for name, info in opened.tensors.items()})
    shards = []
    for i, each in enumerate(paths):
        shard = opened if i == number else open_shard(each, i)
        found = _split_key(shard, "split.no"), _split_key(shard, "split.count")
        if found != (i, count):
            raise GGUFError(f"{each}: split.no and split.count are {found[0]} and {found[1]}, expected {i} and {count}")
        shards.append(shard)
    return shards


def _split_paths(path: Path, number: int, count: int) -> list[Path]:
    """All files of the split that `path` belongs to, by the naming rule; a missing one is named in the GGUFError."""
    if number >= count:
        raise GGUFError(f"{path}: split.no is {number}, which is not below split.count {count}")
    ending = f"-{number + 1:05d}-of-{count:05d}.gguf"
    match = SPLIT_NAME.fullmatch(path.name)
    if not match or not path.name.endswith(ending):
        raise GGUFError(f"{path}: is file {number + 1} of a split into {count}, so its name should end in {ending}")
    paths = [path.with_name(f"{match['prefix']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    missing = [str(each) for each in paths if not each.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise GGUFError(f"{path}: {len(missing)} of {count} files of this split are missing: {', '.join(missing[:3])}{more}")
    return paths


def _split_key(shard: Shard, key: str) -> int:
    value = shard.metadata.get(key, 0)
    if not isinstance(value, int) or not 0 <= value <= MAX_SPLITS:
        raise GGUFError(f"{shard.path}: {key} should be an integer from 0 to {MAX_SPLITS}, found {brief(value)}")
    return value


def _merge(shards: list[Shard]) -> dict[str, TensorInfo]:
    """One directory of all shards; checks that no name recurs and the total that each shard states."""
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name in tensors.keys() & shard.tensors.keys():
            raise GGUFError(f"{shard.path}: tensor {name!r} occurs in an earlier file of the split too")
        tensors |= shard.tensors
    for shard in shards:
        total = shard.metadata.get("split.tensors.count", len(tensors))
        if len(shards) > 1 and total != len(tensors):
            raise GGUFError(f"{shard.path}: split.tensors.count is {brief(total)}, but the files hold {len(tensors)} tensors")
    return tensors
