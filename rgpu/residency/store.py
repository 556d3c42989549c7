"""The memory of an arena's slots, and the way of an expert's bytes from a model's files into one.

Knows where each expert lies; which one is worth a slot is decided elsewhere (arena.py, policy.py).
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from ..errors import OutOfMemory
from ..gguf.direct import PAGE, DirectFiles, pages
from ..ops import Bank, Slots
from .arena import SlotArena
from .policy import Policy


class Extent(NamedTuple):
    """Whole pages of a file and where in a slot they go; the file may end behind the first `needed` bytes."""

    shard: int
    offset: int
    nbytes: int
    needed: int
    at: int


def record(bank: Bank, expert: int) -> tuple[list[Extent], list[int]]:
    """How an expert is read, from the bank of a mapped file: its extents, and where in the slot gate, up and down begin.

    Neighbours in the file are read as one: of a file of records, that is the record.
    """
    extents: list[Extent] = []
    starts = []
    for slots in bank:
        shard, start, nbytes = int(slots.source[expert]), int(slots.offset[expert]), slots.shape[0] * slots.row_bytes
        offset, size = pages(start, start + nbytes)
        last = extents[-1] if extents else None
        if last and last.shard == shard and last.offset <= offset <= last.offset + last.nbytes:
            end = max(last.offset + last.nbytes, offset + size)
            needed = max(last.needed, start + nbytes - last.offset)
            extents[-1] = last._replace(nbytes=end - last.offset, needed=needed)
        else:
            at = last.at + last.nbytes if last else 0
            extents.append(Extent(shard, offset, size, start + nbytes - offset, at))
        starts.append(extents[-1].at + start - extents[-1].offset)
    return extents, starts


def size_classes(banks: Sequence[Bank]) -> tuple[list[int], list[int]]:
    """Each layer's class, and each class's bytes per slot: layers whose matrices have equal types and shapes share a class."""
    kinds: dict[tuple, int] = {}
    class_of, nbytes = [], []
    for bank in banks:
        kind = tuple((type(part.quant).__name__, part.shape) for part in bank)
        if kind not in kinds:
            kinds[kind] = len(kinds)
            nbytes.append(0)
        mine = kinds[kind]
        ends = (extents[-1].at + extents[-1].nbytes for extents, _ in (record(bank, e) for e in range(len(bank.gate.offset))))
        nbytes[mine] = max(nbytes[mine], *ends)
        class_of.append(mine)
    return class_of, nbytes


class Store:
    """`banks[layer]`: the slots as that layer reads them, numbered through all classes as in the arena."""

    def __init__(
        self, files: DirectFiles, mapped: Sequence[Bank], class_of: Sequence[int], nbytes: Sequence[int], counts: Sequence[int]
    ):
        """`mapped`: the banks of the mapped files; `nbytes`, `counts`: bytes of a slot and number of slots of each class."""
        self.files, self.mapped, self.nbytes, self.n_expert = files, mapped, list(nbytes), len(mapped[0].gate.offset)
        # Private, not shared as by default: the system would keep what is shared even after it was given back.
        self.maps = [mmap.mmap(-1, n * size, access=mmap.ACCESS_COPY) for n, size in zip(counts, nbytes, strict=True)]
        self.memory = [np.frombuffer(each, np.uint8) for each in self.maps]
        banks = {mine: _bank(mapped[layer], self.memory[mine], sum(counts)) for layer, mine in enumerate(class_of)}
        self.banks = [banks[mine] for mine in class_of]
        # Of each slot: its class, and its part of that class's memory.
        self.places = [(c, slice(i * nbytes[c], (i + 1) * nbytes[c])) for c, n in enumerate(counts) for i in range(n)]

    def take(self, slot: int) -> None:
        """Have the system give a slot's memory now: given page by page during reads, it would slow them by half and more."""
        cls, part = self.places[slot]
        self.memory[cls][part][::PAGE] = 0

    def read(self, key: int, slot: int, part: int = 0, parts: int = 1) -> int:
        """Fill a slot with an expert, or do one of some parts of that; the number of bytes that were read. Raises GGUFError."""
        layer, expert = divmod(key, self.n_expert)
        extents, starts = record(self.mapped[layer], expert)
        cls, place = self.places[slot]
        memory, done = self.memory[cls][place], 0
        for shard, offset, nbytes, needed, at in extents:
            first, end = (nbytes // PAGE * i // parts * PAGE for i in (part, part + 1))
            if first < end:
                self.files.read(shard, offset + first, min(needed, end) - first, memory[at + first : at + end])
                done += end - first
        if part == 0:  # the others may be read at the same time
            for matrices, start in zip(self.banks[layer], starts, strict=True):
                matrices.place(slot, place.start + start)
        return done

    def shrink(self, arena: SlotArena, policy: Policy, nbytes: int) -> bool:
        """Give so many bytes of slots back to the system, of all classes alike; whether there were any to give."""
        total = sum(len(pool.slots) * size for pool, size in zip(arena.pools, self.nbytes, strict=True))
        gone = []
        for cls, pool in enumerate(arena.pools):
            with suppress(OutOfMemory):
                gone += arena.shrink(-(-len(pool.slots) * nbytes // total), cls, policy)
        for slot in gone:
            cls, part = self.places[slot]
            self.maps[cls].madvise(mmap.MADV_DONTNEED, part.start, part.stop - part.start)
        return bool(gone)


def _bank(mapped: Bank, memory: np.ndarray, n_slots: int) -> Bank:
    def part(like: Slots) -> Slots:
        slots = Slots(like.quant, like.shape, (memory,), np.zeros(n_slots, np.int64), np.zeros(n_slots, np.int64))
        slots.place(0, 0)  # its addresses are made here, not by several threads at once
        return slots

    return Bank(*map(part, mapped))
