"""SimDevice: the device interface (rgpu/ops/device.py) on the host, with faults reported and nothing done before it must be."""

import ctypes
import threading
import time
import weakref
from collections import Counter

import numpy as np

from rgpu.errors import DeviceError
from rgpu.ops.device import HostMemory

from . import build
from .memory import Memory, view
from .schedule import Command, Schedule
from .streams import Capture, SimEvent, SimStream

DONE, RESTING, FAULT = range(3)  # what sim_run returns
PUMP = 5e-3  # seconds after which work is done without being waited for, on a device with mapped memory
Index = ctypes.c_uint32 * 3


class Launch(ctypes.Structure):
    """struct Launch of processor.cpp."""

    _fields_ = [
        ("invoke", ctypes.c_void_p), ("arguments", ctypes.c_char_p),
        ("static_shared", ctypes.c_void_p), ("static_bytes", ctypes.c_int64), ("dynamic_bytes", ctypes.c_int64),
        ("grid", Index), ("block", Index), ("seed", ctypes.c_uint64), ("patience", ctypes.c_double),
        ("memory", ctypes.c_uint64), ("memory_bytes", ctypes.c_uint64),
        ("run", ctypes.c_void_p), ("status", ctypes.c_int), ("loaded", ctypes.c_uint64), ("stored", ctypes.c_uint64),
        ("address", ctypes.c_uint64), ("block_at", Index), ("thread_at", Index), ("what", ctypes.c_char * 256),
    ]  # fmt: skip
    name = ""

    def __str__(self):
        return f"kernel {self.name}, block {tuple(self.block_at)}, thread {tuple(self.thread_at)}"


class Parameter(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("nbytes", ctypes.c_int)]


class Entry(ctypes.Structure):
    """sim_kernel of abi.h."""

    _fields_ = [
        ("invoke", ctypes.c_void_p), ("parameters", ctypes.POINTER(Parameter)), ("n_parameters", ctypes.c_int),
        ("most_threads", ctypes.c_int),
    ]  # fmt: skip


class SimKernel:
    def __init__(self, library: ctypes.CDLL, name: str, entry: Entry):
        self.library, self.name, self.invoke, self.most_threads = library, name, entry.invoke, entry.most_threads
        parameters = [(chr(p.kind), p.nbytes) for p in entry.parameters[: entry.n_parameters]]
        # Pointers are u8 here; what is neither a number nor a pointer has no type.
        dtypes = [None if kind == "?" else np.dtype(f"{kind.replace('p', 'u')}{nbytes}") for kind, nbytes in parameters]
        self.parameters = [(kind == "p", dtype) for (kind, _), dtype in zip(parameters, dtypes, strict=True)]
        begin, end = (ctypes.c_void_p * 2).in_dll(library, "sim_static_shared")
        self.static_shared = begin, end - begin

    def pack(self, arguments: tuple, memory: Memory) -> bytes:
        """8 bytes for each argument, checked against the kernel's parameters."""
        if len(arguments) != len(self.parameters):
            raise DeviceError(f"kernel {self.name} has {len(self.parameters)} parameters, {len(arguments)} arguments were given")
        packed = []
        for i, (value, (pointer, dtype)) in enumerate(zip(arguments, self.parameters, strict=True)):
            if wrong := misfit(value, pointer, dtype, memory):
                raise DeviceError(f"argument {i} of kernel {self.name}, {value!r} ({type(value).__name__}), {wrong}")
            packed.append(dtype.type(value).tobytes().ljust(8, b"\0"))
        return b"".join(packed)


def misfit(value, pointer: bool, dtype: np.dtype | None, memory: Memory) -> str | None:
    """What is wrong with an argument for a parameter of such a type."""
    if dtype is None or dtype == np.float64:
        return "is for a parameter of a type that is not passed"
    if isinstance(value, np.generic):
        if value.dtype != dtype and not (pointer and value.dtype == np.int64):
            return f"is not of the parameter's type, {dtype}"
    elif not isinstance(value, float if dtype.kind == "f" else int):
        return f"does not fit a parameter of type {dtype}"
    elif dtype.kind != "f" and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
        return f"is too large for a parameter of type {dtype}"
    if pointer and value:
        owner = memory.owner(int(value))
        if owner is None or owner.kind == "host":
            return f"points to {memory.describe(int(value))}: not for kernels"
    return None


class SimModule:
    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def kernel(self, name: str) -> SimKernel:
        try:
            return SimKernel(self.library, name, Entry.in_dll(self.library, f"sim_kernel_{name}"))
        except ValueError:
            raise DeviceError(f'no kernel {name}: wanted is extern "C" __global__ void {name}(...)') from None


class SimDevice:
    """A device of `total` bytes of memory, beside which `pinned` bytes of the host can be page-locked.

    `seed` decides every order; `patience` is how many seconds may pass without progress; `mapped=False` refuses mapped memory;
    `counting=True` makes kernels count the device memory they load and store (in `traffic`), somewhat slower. Set `fail_at` to
    n for the nth launch to fail.
    """

    def __init__(self, total=1 << 30, capability=(8, 9), *, seed=0, patience=30.0, pinned=1 << 40, mapped=True, counting=False):
        self.name, self.capability, self.multiprocessors = "CUDA stand-in", tuple(capability), 4
        self.shared_per_block = {(7, 5): 64, (8, 0): 163, (9, 0): 227, (10, 0): 227}.get(self.capability, 99) << 10
        if self.capability < (7, 0):
            self.shared_per_block = 48 << 10
        self.processor = build.processor()
        self.storage = Memory({"device": total, "host": pinned})
        self.schedule = Schedule(seed, patience)
        self.mapped, self.counting = mapped, counting
        # Kernels by name, all "launches", graphs ("graph"), and bytes of "upload", "download", "copy" and "fill".
        self.counted: Counter[str] = Counter()
        self.traffic: dict[str, tuple[int, int]] = {}  # kernel -> bytes loaded, bytes stored
        self.fail_at: int | None = None
        self.capturing: dict[int, Capture] = {}  # by thread
        self.closed = False
        self.pump: threading.Thread | None = None

    # ---- what is allowed ----

    def check(self, waiting: bool = False) -> None:
        if self.closed:
            raise DeviceError("the device is closed")
        self.schedule.check()
        capture = self.capturing.get(threading.get_ident())
        if waiting and capture:
            self.refuse(capture, "to wait")

    def refuse(self, capture: Capture, what: str) -> None:
        capture.broken = True
        raise DeviceError(f"forbidden in a capture: {what}")

    def outside(self, what: str) -> None:
        """Refuse what this thread must not do while it captures."""
        self.check()
        if capture := self.capturing.get(threading.get_ident()):
            self.refuse(capture, what)

    def device_range(self, address: int, nbytes: int, what: str) -> None:
        owner = self.storage.owner(address, nbytes)
        if owner is None or owner.kind != "device":
            raise DeviceError(f"{what} {nbytes:,} bytes from {self.storage.describe(address)}")

    # ---- memory ----

    def memory(self) -> tuple[int, int]:
        total = self.storage.limits["device"]
        return total - self.storage.used["device"], total

    def allocate(self, nbytes: int) -> int:
        self.outside("to allocate")
        return self.storage.allocate(nbytes, "device").begin

    def free(self, address: int) -> None:
        if not (self.closed or self.schedule.failure):
            self.outside("to free")
            self._drain()
            self.storage.free(address)

    def host(self, nbytes: int, mapped: bool = False) -> HostMemory:
        self.outside("to allocate")
        if mapped and not self.mapped:
            raise DeviceError("mapped memory is refused")
        begin = self.storage.allocate(nbytes, "mapped" if mapped else "host").begin
        if mapped and self.pump is None:
            self.pump = threading.Thread(target=_pump, args=(weakref.ref(self),), daemon=True)
            self.pump.start()
        return HostMemory(view(begin, nbytes, self.storage), begin if mapped else None)

    def free_host(self, memory: HostMemory) -> None:
        self.free(memory.array.ctypes.data)

    def _drain(self) -> None:
        self.schedule.finish(list(self.schedule.pending))

    def close(self) -> None:
        if not self.closed:
            try:
                if not self.schedule.failure:
                    self._drain()
            finally:
                self.closed = True
                self.storage.free_all()

    # ---- streams, events, kernels ----

    def stream(self) -> SimStream:
        self.check()
        return SimStream(self)

    def event(self, timed: bool = False) -> SimEvent:
        self.check()
        return SimEvent(self, timed)

    def load(self, source: str) -> SimModule:
        self.outside("to load")
        return SimModule(build.kernels(source, self.capability, self.counting))

    def prepared(self, kernel: SimKernel, grid: tuple, block: tuple, arguments: tuple, shared: int):
        """The act that launches a kernel, any number of times."""
        limits = [2**31 - 1, 65535, 65535], [1024, 1024, 64]
        for what, size, limit in zip(("grid", "block"), (grid, block), limits, strict=True):
            if not 1 <= len(size) <= 3 or any(not 1 <= n <= most for n, most in zip(size, limit, strict=False)):
                raise DeviceError(f"kernel {kernel.name}: no {what} of {size}")
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        if (threads := block[0] * block[1] * block[2]) > kernel.most_threads:
            raise DeviceError(f"kernel {kernel.name}: {threads} threads in a block, {kernel.most_threads} at most")
        if not 0 <= shared <= self.shared_per_block:
            raise DeviceError(f"kernel {kernel.name}: {shared:,} bytes of shared memory, {self.shared_per_block:,} at most")
        packed = kernel.pack(arguments, self.storage)

        def act(command: Command) -> bool:
            if command.state is None:
                command.state = Launch(
                    invoke=kernel.invoke, arguments=packed, static_shared=kernel.static_shared[0],
                    static_bytes=kernel.static_shared[1], dynamic_bytes=shared, grid=grid, block=block,
                    seed=self.schedule.random.getrandbits(32), patience=self.schedule.patience,
                    memory=self.storage.base, memory_bytes=self.storage.next - self.storage.base, status=RESTING,
                )  # fmt: skip
                command.state.name = kernel.name
            return self._run(command.state)

        return act

    # ---- what queued work does when its turn comes ----

    def _run(self, launch: Launch) -> bool:
        if launch.status == RESTING:  # else a Ctrl-C came right after its end
            self.run_launch(launch)
        if launch.status == RESTING:
            return False
        self.counted.update([launch.name, "launches"])
        if self.counting:
            loaded, stored = self.traffic.get(launch.name, (0, 0))
            self.traffic[launch.name] = loaded + launch.loaded, stored + launch.stored
        if self.fail_at == self.counted["launches"]:
            raise DeviceError(f"{launch}: failed as asked for")
        if launch.status == FAULT:
            at = f": {self.storage.describe(launch.address)}" if launch.address else ""
            raise DeviceError(f"{launch}: {launch.what.decode()}{at}")
        return True

    def run_launch(self, launch: Launch) -> None:
        with self.processor.lock:
            self.processor.library.sim_run(ctypes.byref(launch))

    def move(self, what: str, to: int, source: int, nbytes: int) -> bool:
        ctypes.memmove(to, source, nbytes)
        self.counted[what] += nbytes
        return True

    def set_bytes(self, address: int, byte: int, nbytes: int) -> bool:
        ctypes.memset(address, byte, nbytes)
        self.counted["fill"] += nbytes
        return True


def _pump(device: weakref.ref) -> None:
    """With mapped memory the host may wait for the device by looking at a flag: then the device has to go on by itself."""
    while (sim := device()) is not None and not (sim.closed or sim.schedule.failure):
        idle = sim.schedule.waiting == 0 and time.monotonic() - sim.schedule.progress > PUMP
        if idle and sim.schedule.pending:
            try:
                while sim.schedule.waiting == 0 and sim.schedule.step():
                    pass
            except DeviceError:
                return  # it is the schedule's failure from now on, and every call's
        del sim
        time.sleep(PUMP / 5)
