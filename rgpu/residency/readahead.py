"""Asks the system for weights that are not in its page cache, in the order of need, while a step computes with others.

Otherwise each missing page stops the thread that touches it, one disk access after the other. Knows addresses in mapped files
and what the layers post; reads no weight itself and pins none: what stays in memory is the system's decision.
"""

import ctypes
import math
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..ops import Array, Bank, Slots

try:
    import resource
except ImportError:  # Windows
    resource = None

Range = tuple[int, int]  # address, bytes

UNIT = 1 << 21  # bytes that are looked at together
PIECE = 1 << 17  # bytes of one request: Linux drops what goes beyond a device's read-ahead, which is this by default
DEPTH = 2  # layers whose dense weights are requested before the one that computes
POLL = 1e-4  # seconds between two looks at a layer's box
IDLE = 1.0  # seconds between two forwards in which others may have taken the memory
SAMPLES = 256  # matrices of experts that are looked at then


def supported() -> bool:
    """Whether the system takes such requests and says who waited for storage."""
    return resource is not None and hasattr(mmap, "MADV_WILLNEED")


class PageCache:
    """What of some mapped files is in memory, and requests for what is not."""

    def __init__(self, paths: Sequence[Path]):
        libc = ctypes.CDLL(None)
        self._mincore = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)(("mincore", libc))
        self._madvise = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)(("madvise", libc))
        # Linux answers those who own a file or may write it; others are told that all is there.
        self.tells = all(os.access(path, os.W_OK) or path.stat().st_uid == os.geteuid() for path in paths)
        self.pages = np.ones(UNIT // mmap.PAGESIZE + 1, np.uint8)  # a unit that begins within a page has one more

    def missing(self, address: int, nbytes: int) -> Range | None:
        """The part of up to UNIT bytes, in whole pages, that lacks in memory; all of it where the system does not tell."""
        begin = address // mmap.PAGESIZE * mmap.PAGESIZE
        n_pages = -((begin - address - nbytes) // mmap.PAGESIZE)
        if not self.tells or self._mincore(begin, n_pages * mmap.PAGESIZE, self.pages.ctypes.data):
            return begin, n_pages * mmap.PAGESIZE
        absent = np.flatnonzero(self.pages[:n_pages] & 1 == 0)
        if not len(absent):
            return None
        first, last = int(absent[0]), int(absent[-1])
        return begin + first * mmap.PAGESIZE, (last + 1 - first) * mmap.PAGESIZE

    def request(self, address: int, nbytes: int) -> None:
        """Have what is missing of up to UNIT bytes read. Waits for nothing but a place in the device's queue."""
        begin, size = self.missing(address, nbytes) or (address, 0)
        for start in range(begin, begin + size, PIECE):
            self.advise(start, min(PIECE, begin + size - start), mmap.MADV_WILLNEED)

    def advise(self, begin: int, nbytes: int, advice: int) -> None:
        """Tell the system something about whole pages; should it refuse, nothing but time is lost."""
        self._madvise(begin, nbytes, advice)


class ReadAhead:
    """`with readahead:` around a forward. While all weights are in memory, nothing happens.

    A forward after one that waited for storage, or after a pause in which pages were lost, has a thread beside it that requests
    the dense weights of the next layers, and a layer's experts as soon as their ids are posted in its box (see the verb `post`).
    """

    def __init__(self, cache: PageCache, boxes: Array, banks: Sequence[Bank], dense: Sequence[Sequence[Range]]):
        """`dense`: what each layer reads whatever is routed, in order of use; the last item is what follows the layers."""
        assert len(boxes) == len(banks) == len(dense) - 1
        self.cache, self.boxes, self.banks, self.dense = cache, boxes, banks, dense
        self.extents = [extent for bank in banks for slots in bank for extent in _extents(slots)]
        self.scattered = False
        self.thread: threading.Thread | None = None
        self.over = threading.Event()
        self.sample = self._sample()
        self.cold, self.waited, self.ended = False, (0, 0), -math.inf

    def __enter__(self) -> None:
        if time.monotonic() - self.ended > IDLE:
            self.cold = any(self.cache.missing(address, 1) for address in self.sample)
            self.waited = _waited()
        self.scatter(self.cold)
        if self.cold:
            self.over.clear()
            seen = self.boxes[:, 0].copy()
            self.thread = threading.Thread(target=self._follow, args=(seen,), name="rgpu-readahead", daemon=True)
            self.thread.start()

    def __exit__(self, *exception) -> None:
        if self.thread:
            self.over.set()
            self.thread.join()
            self.thread = None
        waited = _waited()
        self.cold, self.waited, self.ended = waited != self.waited, waited, time.monotonic()

    def scatter(self, on: bool) -> None:
        """While `on`, the system reads nothing around a missing page of an expert: that can be megabytes which nobody needs."""
        if on != self.scattered:
            for begin, nbytes in self.extents:
                self.cache.advise(begin, nbytes, mmap.MADV_RANDOM if on else mmap.MADV_NORMAL)
            self.scattered = on

    def _follow(self, seen: np.ndarray) -> None:
        """The life of the thread; `seen`: the counts in the boxes before the forward."""
        for each in self.needed(seen):
            for unit in _units(each):
                if self.over.is_set():
                    return
                self.cache.request(*unit)

    def needed(self, seen: np.ndarray) -> Iterator[Range]:
        """What the forward reads, in order of need; waits for what is not known yet."""
        for part in self.dense[:DEPTH]:
            yield from part
        for layer, box in enumerate(self.boxes):
            for part in self.dense[layer + DEPTH : layer + DEPTH + 1]:
                yield from part
            while box[0] == seen[layer]:
                if self.over.wait(POLL):
                    return
            # Another order of memory may show the ids of the step before: these are requests that nobody needed.
            yield from _experts(self.banks[layer], box[2 : 2 + box[1]])

    def _sample(self) -> list[int]:
        """Addresses in every dense matrix, and in some experts of every layer."""
        matrices = np.concatenate([slots.addresses for bank in self.banks for slots in bank])
        return [*(at for part in self.dense for at, _ in part), *matrices[:: max(len(matrices) // SAMPLES, 1)].tolist()]


def _waited() -> tuple[int, int]:
    """Grows when a thread of this process stops for a page, or when data is read from storage for it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_majflt, usage.ru_inblock


def _experts(bank: Bank, ids: np.ndarray) -> Iterator[Range]:
    """The matrices of these experts in the order in which they are read: few pairs one by one, many by expert."""
    chosen = dict.fromkeys(ids.tolist())
    if len(ids) >= len(bank.gate.offset):
        chosen = sorted(chosen)
    for parts in ((bank.gate, bank.up), (bank.down,)):
        for expert in chosen:
            for slots in parts:
                yield int(slots.addresses[expert]), slots.shape[0] * slots.row_bytes


def _extents(slots: Slots) -> Iterator[Range]:
    """The pages from the first matrix to the last, in each file that has some; what lies between them is included."""
    for source in set(slots.source.tolist()):
        mine = slots.addresses[slots.source == source]
        begin = int(mine.min()) // mmap.PAGESIZE * mmap.PAGESIZE
        yield begin, int(mine.max()) + slots.shape[0] * slots.row_bytes - begin


def _units(matrix: Range) -> Iterator[Range]:
    address, nbytes = matrix
    for start in range(0, nbytes, UNIT):
        yield address + start, min(UNIT, nbytes - start)
