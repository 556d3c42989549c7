"""What the CUDA backend asks of a device: memory, streams, events, kernels from source text, graphs. Nothing else.

`cupy_device.py` answers with CuPy; `tests/cuda_sim/` answers on the host, so that everything above this line runs without a GPU.
Device memory is an address (int) and a size; what lies there is the caller's business.

Work is queued on streams and done later: in order within a stream, in any order between streams unless an event says
otherwise. A call that queues work returns at once, so what it reads or writes must stay as it is until the work is done.

Errors: OutOfMemory where memory is asked for; DeviceError for everything else, each in one line. A kernel that fails is
reported by a later call, as a rule the next one that waits; from then on the device is lost and every call raises
DeviceError, except `free`, `free_host` and `close`, which do nothing.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

# A kernel's arguments. A Python int fits any integer or pointer parameter that can hold its value, a Python float a `float`;
# a NumPy scalar must have the parameter's own type.
Argument = int | float | np.generic
Kernel = Any  # an entry of a module: for `Stream.launch` only
Graph = Any  # what a capture recorded: for `Stream.replay` only


@dataclass(frozen=True)
class HostMemory:
    """Page-locked host memory: the device copies from and to it while the processor does other things.

    Kernels reach mapped memory at `address`, over the bus: for flags and a few numbers, not for data that is read twice. The
    two sides agree on what they see only if both take care:

    - Host to device: write the data, then store the flag as an aligned 32-bit word with release order. The kernel polls the
      flag through `volatile` (one thread, resting between looks), then `__threadfence_system()`, then reads the data; or data
      is read by the next kernel of the stream.
    - Device to host: the threads write the data, `__syncthreads()`, then one thread `__threadfence_system()` and stores the
      flag through `volatile`. The host loads it with acquire order.
    - No atomics: over the bus they are not atomic. A flag has one writer.

    `post_flag` and `wait_flag` in kernels/common.cuh are the device's halves.
    """

    array: np.ndarray  # uint8 [nbytes], aligned to 64 bytes at least, its contents undefined at first
    address: int | None  # None: not mapped


class Event(Protocol):
    """A point in a stream's work. Until it is recorded it counts as reached."""

    def query(self) -> bool:
        """Has the device got there? Never waits."""

    def synchronize(self) -> None:
        """Wait until the device has got there."""

    def elapsed(self, since: "Event") -> float:
        """Seconds on the device from `since` to this event, both timed and reached."""


class Stream(Protocol):
    """A queue of work. Every method but `synchronize` and `capture` queues something and returns."""

    def upload(self, address: int, array: np.ndarray) -> None:
        """Device bytes at `address` = a C-contiguous host array.

        An array within a HostMemory is read when its turn comes; any other is read before the call returns, which may
        therefore wait for the stream, and is refused in a capture.
        """

    def download(self, array: np.ndarray, address: int) -> None:
        """A C-contiguous host array = device bytes at `address`; within a HostMemory late, otherwise waiting, as in `upload`."""

    def copy(self, address: int, source: int, nbytes: int) -> None:
        """Device bytes at `address` = those at `source`; the ranges do not overlap."""

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        """Device bytes = `byte` (0 to 255)."""

    def launch(
        self, kernel: Kernel, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Argument], shared: int = 0
    ) -> None:
        """Run a kernel: `grid` blocks of `block` threads (1 to 3 numbers each), `shared` bytes of dynamic shared memory each."""

    def record(self, event: Event) -> None:
        """The event is reached when everything queued here so far is done."""

    def wait(self, event: Event) -> None:
        """What is queued here from now on starts after the point at which `event` was last recorded."""

    def replay(self, graph: Graph) -> None:
        """Do again what a capture recorded, with the arguments it had; one run of a graph starts after the last has ended."""

    def capture(self) -> AbstractContextManager[Graph]:
        """`with stream.capture() as graph:` records what is queued here instead of doing it; after the block it can be replayed.

        Another stream takes part from when it waits for an event recorded here, and must be waited for here before the end.
        Forbidden meanwhile, in this thread: to allocate, to free, to wait, to load, to copy from or to host memory that is not
        page-locked; and to wait for an event recorded outside. What is broken off by an exception leaves nothing behind.
        """

    def synchronize(self) -> None:
        """Wait until everything queued here is done."""


class Module(Protocol):
    """Compiled source text."""

    def kernel(self, name: str) -> Kernel:
        """The kernel `extern "C" __global__ void name(...)`."""


class Device(Protocol):
    """One GPU. Its methods may be called from any thread; a stream and a capture belong to one thread at a time."""

    name: str  # "NVIDIA GeForce RTX 4060 Laptop GPU"
    capability: tuple[int, int]  # (8, 9)
    multiprocessors: int
    shared_per_block: int  # bytes of shared memory that a block can be given

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of device memory, other programs counted."""

    def allocate(self, nbytes: int) -> int:
        """Address of device memory, aligned to 16 bytes at least, its contents undefined. Raises OutOfMemory."""

    def free(self, address: int) -> None:
        """Give back what `allocate` returned; waits for the device."""

    def host(self, nbytes: int, mapped: bool = False) -> HostMemory:
        """Page-locked host memory, mapped for kernels if wished. Raises OutOfMemory, or DeviceError where that is refused."""

    def free_host(self, memory: HostMemory) -> None:
        """Give it back; waits for the device. Its array must not be touched again."""

    def stream(self) -> Stream:
        """A queue that no other waits for."""

    def event(self, timed: bool = False) -> Event:
        """An event; `timed` if `elapsed` will be asked for."""

    def load(self, source: str) -> Module:
        """Compile CUDA C++ for this device (C++17, no includes), or take it from the disk cache. Several threads may."""

    def close(self) -> None:
        """Wait for the device and give back everything that was allocated. The device, its streams and modules end here."""
