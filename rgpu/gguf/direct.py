"""Reads ranges of a model's files into memory of one's own, past the system's page cache where the file system lets it.

What is read this way is in memory once, and counts against nobody else.
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import GGUFError
from .shard import TensorInfo

PAGE = mmap.PAGESIZE
PIECE = 1 << 23  # bytes of one system call, at most: a thread that reads more could not be interrupted for long


class DirectFiles:
    """The files of a model, opened for reading in whole pages. Any number of threads may read."""

    def __init__(self, paths: Sequence[Path]):
        self.paths, self.files, self.cached = list(paths), [], []
        try:
            for path in self.paths:
                file, cached = _open(path)
                self.files.append(file)
                self.cached.append(cached)
        except GGUFError:
            self.close()
            raise

    def read(self, shard: int, offset: int, needed: int, memory: np.ndarray) -> None:
        """Fill `memory` (uint8, at a page's start, whole pages) from the byte `offset`, the start of a page of the file.

        The file may end within the last page, but not before `needed` bytes. Raises GGUFError if it does, or cannot be read.
        """
        assert offset % PAGE == 0 and len(memory) % PAGE == 0 and memory.ctypes.data % PAGE == 0 and needed <= len(memory)
        path, file, done = self.paths[shard], self.files[shard], 0
        view = memoryview(memory)
        while done < needed:
            try:
                count = os.preadv(file, [view[done : min(done + PIECE, len(memory))]], offset + done)
            except OSError as error:
                raise GGUFError(f"{path}: cannot be read at byte {offset + done}: {error.strerror}") from error
            # A file system gives less than whole pages at the file's end only.
            if count == 0 or (count % PAGE and done + count < needed):
                raise GGUFError(f"{path}: ends at byte {os.fstat(file).st_size}: it is shorter than when it was opened")
            done += count
        if self.cached[shard]:
            os.posix_fadvise(file, offset, len(memory), os.POSIX_FADV_DONTNEED)

    def bytes(self, info: TensorInfo) -> np.ndarray:
        """A tensor's stored bytes, uint8 [nbytes], in memory of their own. Raises GGUFError."""
        end = info.offset + info.nbytes
        offset, size = pages(info.offset, end)
        memory = room(size)
        self.read(info.shard, offset, end - offset, memory)
        return memory[info.offset - offset : end - offset]

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files = []


def pages(begin: int, end: int) -> tuple[int, int]:
    """The whole pages that hold these bytes: where they begin, and their number of bytes."""
    first = begin // PAGE * PAGE
    return first, -((first - end) // PAGE) * PAGE


def room(nbytes: int) -> np.ndarray:
    """Memory that begins with a page, uint8 [nbytes]; a page of it is taken when it is first written."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)[:nbytes]


def _open(path: Path) -> tuple[int, bool]:
    """A file descriptor, and whether what is read through it stays in the page cache."""
    try:
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT), False
        except (AttributeError, OSError):  # another system; or a file system without it, as tmpfs was
            return os.open(path, os.O_RDONLY), True
    except OSError as error:
        raise GGUFError(f"{path}: cannot be opened: {error.strerror}") from error
