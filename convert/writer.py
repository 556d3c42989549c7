"""The file being written: its GGUF header as bytes, and a target that appears under its name only when it is complete.

Owns layout on disk, free-space check, temporary file, syncing, progress. Does not know where tensors come from.
"""

import contextlib
import math
import os
import shutil
import stat
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from rgpu.errors import ConvertError
from rgpu.gguf.metadata import ARRAY, BOOL, DTYPES, STRING

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # no such locks: temporary files of killed runs are then left for the user to delete
    flock = None

GGUF_VERSION = 3
# Besides the file itself: directory entries, journal, and so that a full disk does not stop everything else.
DISK_MARGIN = 64 << 20
# Bytes per read and write: measured on ext4 as fast as cp, 1.4 times as fast as copy_file_range, which splices page by page.
PIECE = 1 << 20
VALUE_TYPES = {np.dtype(dtype): kind for kind, dtype in DTYPES.items() if kind != BOOL} | {np.dtype(bool): BOOL}


class Entry(NamedTuple):
    """One tensor to be written; shape in NumPy order."""

    name: str
    quant: str
    shape: tuple[int, ...]
    nbytes: int


Pairs = list[tuple[str, bytes]]  # metadata: key, and value type with value as stored


def encode(value: Any) -> bytes:
    """Value type and value as GGUF stores them: str, lists of str, NumPy scalars and arrays by dtype; int is u32, float f32."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(_string(text) for text in value)
    default = {bool: np.bool_, int: np.uint32, float: np.float32}.get(type(value))
    array = np.asarray(value if default is None else default(value))
    kind = VALUE_TYPES[array.dtype]
    if array.ndim == 0:
        return struct.pack("<I", kind) + array.tobytes()
    assert array.ndim == 1
    return struct.pack("<IIQ", ARRAY, kind, array.size) + array.tobytes()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def header(pairs: Pairs, entries: list[Entry], alignment: int) -> tuple[bytes, list[int], int]:
    """A GGUF's bytes before its data, each tensor's absolute offset, and the size of the whole file.

    Tensors lie densely in the order given, each at a multiple of the alignment; so does the end of the file.
    """
    from gguf.constants import GGMLQuantizationType

    parts = [struct.pack("<4sIQQ", b"GGUF", GGUF_VERSION, len(entries), len(pairs))]
    for key, value in pairs:
        parts += (_string(key), value)
    relative, offsets = 0, []
    for entry in entries:
        rank = len(entry.shape)
        numbers = (rank, *reversed(entry.shape), GGMLQuantizationType[entry.quant].value, relative)
        parts += (_string(entry.name), struct.pack(f"<I{rank}QIQ", *numbers))
        offsets.append(relative)
        relative += _padded(entry.nbytes, alignment)
    head = b"".join(parts)
    head += bytes(_padded(len(head), alignment) - len(head))
    return head, [len(head) + offset for offset in offsets], len(head) + relative


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def size_text(n: float) -> str:
    """"1.5 GB" from a number of bytes."""
    unit = min(int(math.log10(max(n, 1))) // 3, 4)
    digits = 1 if unit else 0
    return f"{n / 1000**unit:.{digits}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[unit]}"


class Target:
    """OUT while it is written: `OUT.partial-PID` beside it, renamed when complete and synced, deleted on any exception.

    Parts of the file that are never written read as zeros. Raises ConvertError for everything the system refuses.
    """

    def __init__(self, path: str | os.PathLike, *, force: bool = False, sources: Iterable[Path] = ()):
        # A link is followed, so that the file it names is replaced and not the link.
        self.path = Path(os.path.realpath(path))
        self._check(Path(path), force, sources)
        self.temporary = self.path.with_name(f"{self.path.name}.partial-{os.getpid()}")
        self._fd = -1
        self._sources: dict[tuple[Path, int], int] = {}
        self._buffer = memoryview(bytearray(PIECE))
        self._bar: tqdm | None = None
        self._size = 0

    def _check(self, given: Path, force: bool, sources: Iterable[Path]) -> None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                raise ConvertError(f"cannot write {given}: there is no folder {self.path.parent}") from None
            return
        except OSError as error:
            raise self._refusal(error) from error
        if not stat.S_ISREG(found.st_mode):
            raise ConvertError(f"cannot write {given}: it exists and is not a regular file")
        if any(os.path.samefile(self.path, source) for source in sources):
            raise ConvertError(f"cannot write {given}: it is the file that is being converted; choose another name")
        if not force:
            raise ConvertError(f"{given} exists already; add --force to replace it")

    def __enter__(self) -> "Target":
        _remove_stale(self.path)
        try:
            self._fd = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
            if flock:
                with contextlib.suppress(OSError):  # some network file systems have no locks
                    flock(self._fd, LOCK_EX | LOCK_NB)
        except OSError as error:
            self._discard()
            raise self._refusal(error) from error
        return self

    def __exit__(self, kind, error, trace) -> bool:
        try:
            if kind is None:
                self._complete()
        except OSError as failure:
            raise self._refusal(failure) from failure
        finally:
            self._discard()
        if isinstance(error, OSError):
            raise self._refusal(error) from error
        return False

    def begin(self, head: bytes, size: int) -> None:
        """Writes the header of a file of `size` bytes and starts the progress bar, if the disk has room for it."""
        free = shutil.disk_usage(self.path.parent).free
        if size + DISK_MARGIN > free:
            raise ConvertError(
                f"cannot write {self.path}: it needs {size_text(size)} and {size_text(DISK_MARGIN)} to spare, "
                f"but the disk has {size_text(free)} free"
            )
        self._size = size
        # Not a terminal: a line now and then is enough for a log.
        interval = 0.2 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(total=size, unit="B", unit_scale=True, desc=self.path.name, file=sys.stderr, mininterval=interval)
        self.write(0, head)

    def write(self, offset: int, data) -> None:
        """Puts bytes (any C-contiguous buffer) at an absolute offset."""
        view = memoryview(data).cast("B")
        while len(view):
            n = os.pwrite(self._fd, view, offset)
            view, offset = view[n:], offset + n
            self._bar.update(n)

    def copy(self, offset: int, source: Path, start: int, n: int, stream: int = 0) -> None:
        """Copies n bytes of a file from `start` on to an absolute offset.

        Each `stream` opens the source once more: the kernel reads ahead per open file, so ranges that are read in turn
        from several places should be several streams.
        """
        key = (source, stream)
        if key not in self._sources:
            self._sources[key] = os.open(source, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        while n:
            piece = self._buffer[: min(n, PIECE)]
            done = os.preadv(self._sources[key], [piece], start)
            if done == 0:
                raise ConvertError(f"{source} ended at byte {start} while it was being copied")
            self.write(offset, piece[:done])
            offset, start, n = offset + done, start + done, n - done

    def _complete(self) -> None:
        os.ftruncate(self._fd, self._size)
        if self._bar is not None:
            self._bar.n = self._size
            self._bar.set_postfix_str("syncing to disk")
        os.fsync(self._fd)
        os.replace(self.temporary, self.path)
        if self._bar is not None:
            self._bar.set_postfix_str("done")
        # The name is safe only once its folder is on disk, too; some file systems can't sync one.
        with contextlib.suppress(OSError):
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _discard(self) -> None:
        """Deletes the temporary file, if it is still there, and closes everything."""
        if self._fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.temporary)
            os.close(self._fd)
            self._fd = -1
        for fd in self._sources.values():
            os.close(fd)
        self._sources = {}
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _refusal(self, error: OSError) -> ConvertError:
        reason = f"{error.strerror or error}"
        if error.filename and os.fspath(error.filename) != os.fspath(self.temporary):
            return ConvertError(f"{error.filename}: {reason}")
        return ConvertError(f"cannot write {self.path}: {reason}")


def _remove_stale(path: Path) -> None:
    """Deletes what killed runs left beside OUT: their lock is gone, a living one's is not."""
    if flock is None:
        return
    for stale in path.parent.glob(f"{_literal(path.name)}.partial-*"):
        if not stale.name.rpartition("-")[2].isdecimal():
            continue
        with contextlib.suppress(OSError):
            fd = os.open(stale, os.O_RDWR)
            try:
                flock(fd, LOCK_EX | LOCK_NB)
                os.unlink(stale)
                print(f"removed {stale}, left by a run that was killed", file=sys.stderr)
            finally:
                os.close(fd)


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
