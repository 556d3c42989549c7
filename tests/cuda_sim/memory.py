"""The stand-in's memory: an allocation is fresh poison, ends where nobody may touch, and its addresses are never used again."""

import bisect
import ctypes
import mmap
import threading
import weakref
from dataclasses import dataclass

import numpy as np

from rgpu.errors import DeviceError, OutOfMemory

PAGE = 4096
GUARD = 1 << 20  # bytes that belong to nobody, around each allocation
ADDRESSES = 1 << 38  # reserved by a device, so that an address always tells whose it is; costs no memory
POISON = 0x7FF7  # NaN as float16, bfloat16 and (twice) float32; a huge index as int32
MAP_NORESERVE, MAP_FIXED = 0x4000, 0x10
RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE


@dataclass
class Allocation:
    begin: int
    nbytes: int
    kind: str  # "device", "host", "mapped"
    freed: bool = False

    @property
    def pages(self) -> tuple[int, int]:
        """(first byte, length) of the pages it lies in."""
        first = self.begin // PAGE * PAGE
        return first, -(-(self.begin + self.nbytes - first) // PAGE) * PAGE

    def margins(self) -> list[np.ndarray]:
        """The bytes of its pages that are not its own."""
        first, length = self.pages
        page = view(first, length)
        return [page[: self.begin - first], page[self.begin + self.nbytes - first :]]

    def __str__(self):
        return f"the {self.nbytes:,} bytes of {self.kind} memory at {self.begin:#x}"


def view(address: int, nbytes: int, owner=None) -> np.ndarray:
    """uint8 [nbytes] at an address, which keeps `owner` alive."""
    buffer = (ctypes.c_uint8 * nbytes).from_address(address)
    buffer.owner = owner
    return np.frombuffer(buffer, np.uint8)


def poison(array: np.ndarray) -> np.ndarray:
    """Fill uint8 bytes that begin at an even address."""
    array[0::2], array[1::2] = POISON & 255, POISON >> 8
    return array


def poisoned(array: np.ndarray) -> bool:
    """Whether bytes, from any address, are as `poison` left them."""
    odd = array.ctypes.data % 2
    return bool((array[odd::2] == POISON & 255).all() and (array[1 - odd :: 2] == POISON >> 8).all())


class Memory:
    """Device and host memory of one device, up to a number of bytes of each."""

    def __init__(self, limits: dict[str, int]):
        libc = ctypes.CDLL(None, use_errno=True)
        self.mmap, self.mprotect = libc.mmap, libc.mprotect
        self.mmap.restype = ctypes.c_void_p
        self.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.base = self.mmap(None, ADDRESSES, 0, RESERVED, -1, 0)
        if self.base in (None, ctypes.c_void_p(-1).value):
            raise OutOfMemory(f"can't reserve {ADDRESSES >> 30} GiB of addresses for the CUDA stand-in: see ulimit -v")
        weakref.finalize(self, libc.munmap, self.base, ADDRESSES)
        self.next = self.base + GUARD
        self.limits, self.used = limits, dict.fromkeys(limits, 0)
        self.allocations: list[Allocation] = []  # by address, freed ones too
        self.begins: list[int] = []
        self.lock = threading.Lock()

    def allocate(self, nbytes: int, kind: str) -> Allocation:
        assert nbytes > 0
        with self.lock:
            return self._allocate(nbytes, kind)

    def _allocate(self, nbytes: int, kind: str) -> Allocation:
        limited = "device" if kind == "device" else "host"
        free = self.limits[limited] - self.used[limited]
        if nbytes > free:
            raise OutOfMemory(f"{nbytes:,} bytes of {limited} memory asked for, {free:,} of {self.limits[limited]:,} are free")
        length = -(-nbytes // PAGE) * PAGE
        if self.next + length + GUARD > self.base + ADDRESSES:
            raise OutOfMemory("the CUDA stand-in has used up its addresses: open a new device")
        alignment = 16 if kind == "device" else 64
        begin = self.next + length - -(-nbytes // alignment) * alignment
        self.mprotect(self.next, length, mmap.PROT_READ | mmap.PROT_WRITE)
        poison(view(self.next, length))
        self.next += length + GUARD
        self.used[limited] += nbytes
        made = Allocation(begin, nbytes, kind)
        self.allocations.append(made)
        self.begins.append(begin)
        return made

    def free(self, address: int) -> None:
        """Raises DeviceError if something was written just before or behind it."""
        found = self.find(address)
        if found is None or found.freed or found.begin != address:
            raise DeviceError(f"free of {address:#x}, where nothing was allocated")
        spilled = [name for name, margin in zip(("before", "behind"), found.margins(), strict=True) if not poisoned(margin)]
        first, length = found.pages
        if found.kind == "device":
            self.mmap(first, length, 0, RESERVED | MAP_FIXED, -1, 0)
        else:
            poison(view(first, length))  # an array may look there still, and the process shall live
        found.freed = True
        self.used["device" if found.kind == "device" else "host"] -= found.nbytes
        if spilled:
            raise DeviceError(f"something was written {spilled[0]} {found}")

    def free_all(self) -> None:
        for allocation in self.allocations:
            if not allocation.freed:
                self.free(allocation.begin)

    def find(self, address: int) -> Allocation | None:
        """The last allocation that begins at or before an address."""
        at = bisect.bisect_right(self.begins, address) - 1
        return self.allocations[at] if at >= 0 else None

    def owner(self, address: int, nbytes: int = 1) -> Allocation | None:
        """The living allocation that holds these bytes."""
        found = self.find(address)
        inside = found is not None and not found.freed and address + nbytes <= found.begin + found.nbytes
        return found if inside else None

    def describe(self, address: int) -> str:
        """An address in words, for an error."""
        if not self.base <= address < self.base + ADDRESSES:
            return f"{address:#x}, no memory of the device"
        found = self.find(address)
        at = bisect.bisect_right(self.begins, address)
        behind = self.allocations[at] if at < len(self.allocations) else None
        if found is not None and found.begin <= address < found.begin + found.nbytes:
            return f"{address:#x}, byte {address - found.begin:,} of {found}" + (", which was freed" if found.freed else "")
        if found is None or behind is not None and behind.begin - address < address - found.begin - found.nbytes:
            return f"{address:#x}, {behind.begin - address:,} bytes before {behind}"
        return f"{address:#x}, {address - found.begin - found.nbytes:,} bytes behind {found}"
