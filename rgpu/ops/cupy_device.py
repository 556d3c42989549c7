"""The device interface (device.py) on CuPy: a GPU through the CUDA runtime, without CuPy's arrays and without its memory pool.

The only place where `cupy` is imported, and only when a device is opened. Builds for CUDA 12 and 13 are the same here. The
device is the first one that CUDA_VISIBLE_DEVICES shows.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from ctypes import c_uint8
from pathlib import Path

import numpy as np

from ..errors import DeviceError, OutOfMemory
from .device import Argument, HostMemory

LEAST_CAPABILITY = (6, 1)  # __dp4a
LEAST_CUPY, CUDA_VERSIONS = 13, (12, 13)
OPTIONS = ("--std=c++17",)
NOT_READY, NO_MEMORY, NO_DEVICE = 600, 2, 100  # cudaError_t
PLAIN_SHARED = 48 << 10  # bytes of dynamic shared memory that need no asking for


def _wheel(major: int) -> str:
    """What pip installs: CuPy for a version of CUDA, with NVRTC."""
    return f"'cupy-cuda{major}x[ctk]'"


def _cuda():
    """CuPy's bindings to CUDA, or a DeviceError that says what is missing and what mends it."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        package = _wheel(CUDA_VERSIONS[0]) if error.name == "cupy" else error.name
        raise DeviceError(f"the Python package {error.name} is not installed: pip install {package}") from None
    except Exception as error:  # of any kind; the reason is in the last of its many lines
        reason = [line for line in str(error).splitlines() if line.strip("= ")][-1:] or [type(error).__name__]
        mend = f"pip install --force-reinstall {_wheel(CUDA_VERSIONS[0])}"
        raise DeviceError(f"CuPy does not start ({reason[0].strip()}): {mend}") from None
    runtime = cupy.cuda.runtime
    mend = f"pip uninstall it, then pip install {_wheel(CUDA_VERSIONS[0])}"
    if runtime.is_hip:
        raise DeviceError(f"this CuPy is built for ROCm: {mend}")
    built = runtime.runtimeGetVersion()
    if built // 1000 < CUDA_VERSIONS[0] or int(cupy.__version__.split(".")[0]) < LEAST_CUPY:
        raise DeviceError(f"CuPy {cupy.__version__} for CUDA {_dotted(built)} is too old: {mend}")
    return cupy.cuda


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _check_driver(runtime) -> None:
    driver, built = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if driver == 0:
        raise DeviceError("no NVIDIA driver: install it (Debian, Ubuntu: apt-get install nvidia-driver), then try nvidia-smi")
    if driver // 1000 < built // 1000:
        mend = f", or pip uninstall cupy-cuda{built // 1000}x and pip install {_wheel(driver // 1000)}"
        raise DeviceError(
            f"the NVIDIA driver is for CUDA {_dotted(driver)}, CuPy for CUDA {_dotted(built)}: install a newer driver"
            + (mend if driver // 1000 in CUDA_VERSIONS else "")
        )
    try:
        count = runtime.getDeviceCount()
    except RuntimeError as error:
        if getattr(error, "status", None) != NO_DEVICE:
            raise DeviceError(f"CUDA does not start ({error}): try nvidia-smi, then restart the machine") from None
        count = 0
    if count == 0:
        raise DeviceError("the NVIDIA driver shows no GPU: try nvidia-smi, and unset CUDA_VISIBLE_DEVICES if it is set")


def _check_compiler(cuda, capability: tuple[int, int]) -> None:
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
        raise DeviceError(f"the GPU has compute capability {found}, {least} is needed: use --device cpu")
    major = cuda.runtime.runtimeGetVersion() // 1000
    try:
        version, known = cuda.nvrtc.getVersion(), cuda.nvrtc.getSupportedArchs()
    except Exception:  # of several kinds, by version of CuPy
        raise DeviceError(f"CUDA's compiler, NVRTC, is missing: pip install -U {_wheel(major)}") from None
    number = capability[0] * 10 + capability[1]
    if number not in known:
        other = CUDA_VERSIONS[0] if number < min(known) else CUDA_VERSIONS[-1]
        first = "" if other == major else f"pip uninstall cupy-cuda{major}x, then "
        found = f"NVRTC {version[0]}.{version[1]} does not compile for this GPU, sm_{number}"
        raise DeviceError(f"{found}: {first}pip install -U {_wheel(other)}")


class CupyEvent:
    def __init__(self, device: "CupyDevice", timed: bool):
        self.device = device
        self.event = device.cuda.Event(disable_timing=not timed)

    def query(self) -> bool:
        with self.device.reported("event"):
            status = self.device.runtime.eventQuery(self.event.ptr)  # a code, not an exception
            if status not in (0, NOT_READY):
                self.device.runtime.check_status(status)
        return status == 0

    def synchronize(self) -> None:
        with self.device.reported("wait"):
            self.event.synchronize()

    def elapsed(self, since: "CupyEvent") -> float:
        with self.device.reported("elapsed time"):
            return self.device.runtime.eventElapsedTime(since.event.ptr, self.event.ptr) / 1e3


class CupyGraph:
    def __init__(self):
        self.graph = None  # until the capture has ended


class CupyKernel:
    def __init__(self, device: "CupyDevice", name: str, function):
        self.device, self.name, self.function = device, name, function
        self.shared = PLAIN_SHARED  # bytes asked for so far

    def allow(self, shared: int) -> None:
        driver = self.device.cuda.driver
        driver.funcSetAttribute(self.function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        self.shared = shared


class CupyModule:
    def __init__(self, device: "CupyDevice", cubin: bytes):
        self.device = device
        self.module = device.cuda.function.Module()
        self.module.load(cubin)

    def kernel(self, name: str) -> CupyKernel:
        with self.device.reported(f"kernel {name}"):
            return CupyKernel(self.device, name, self.module.get_function(name))


class CupyStream:
    def __init__(self, device: "CupyDevice"):
        self.device, self.runtime = device, device.runtime
        self.stream = device.cuda.Stream(non_blocking=True)

    def upload(self, address: int, array: np.ndarray) -> None:
        kind = self.runtime.memcpyHostToDevice
        with self.device.reported("upload"):
            self.runtime.memcpyAsync(address, self._address(array), array.nbytes, kind, self.stream.ptr)

    def download(self, array: np.ndarray, address: int) -> None:
        assert array.flags.writeable
        kind = self.runtime.memcpyDeviceToHost
        with self.device.reported("download"):
            self.runtime.memcpyAsync(self._address(array), address, array.nbytes, kind, self.stream.ptr)

    def _address(self, array: np.ndarray) -> int:
        assert array.flags.c_contiguous
        address = array.__array_interface__["data"][0]
        if not self.device.page_locked(address) and self.stream.is_capturing():
            raise DeviceError("forbidden in a capture: a copy from or to memory that is not page-locked")
        return address

    def copy(self, address: int, source: int, nbytes: int) -> None:
        with self.device.reported("copy"):
            self.runtime.memcpyAsync(address, source, nbytes, self.runtime.memcpyDeviceToDevice, self.stream.ptr)

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        with self.device.reported("fill"):
            self.runtime.memsetAsync(address, byte, nbytes, self.stream.ptr)

    def launch(
        self, kernel: CupyKernel, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Argument], shared: int = 0
    ) -> None:
        # CuPy passes a Python int as 64 bits, of which a shorter parameter takes the low ones, but a Python float as a double.
        arguments = [np.float32(a) if type(a) is float else a for a in arguments]
        with self.device.reported(f"launch of kernel {kernel.name}"):
            if shared > kernel.shared:
                kernel.allow(shared)
            kernel.function(tuple(grid), tuple(block), arguments, shared_mem=shared, stream=self.stream)

    def record(self, event: CupyEvent) -> None:
        with self.device.reported("record"):
            self.stream.record(event.event)

    def wait(self, event: CupyEvent) -> None:
        with self.device.reported("wait"):
            self.stream.wait_event(event.event)

    def replay(self, graph: CupyGraph) -> None:
        with self.device.reported("graph"):
            graph.graph.launch(self.stream)

    @contextlib.contextmanager
    def capture(self):
        graph = CupyGraph()
        with self.device.reported("capture"):
            self.stream.begin_capture(self.runtime.streamCaptureModeThreadLocal)
        try:
            yield graph
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what is wrong is said already
                self.stream.end_capture()
            raise
        with self.device.reported("capture"):
            graph.graph = self.stream.end_capture()
            graph.graph.upload(self.stream)

    def synchronize(self) -> None:
        with self.device.reported("wait"):
            self.stream.synchronize()


class CupyDevice:
    """The GPU. Compiled kernels are kept in the folder `cache`, if one is given. Raises DeviceError with what to do."""

    def __init__(self, cache: Path | None = None):
        self.cuda, self.cache = _cuda(), cache
        self.runtime = runtime = self.cuda.runtime
        _check_driver(runtime)
        with self.reported("CUDA does not start"):
            properties = runtime.getDeviceProperties(0)
            runtime.free(0)  # the context is there from now on, and what it takes counts as used
        self.name = properties["name"].decode()
        self.capability = properties["major"], properties["minor"]
        self.multiprocessors = properties["multiProcessorCount"]
        self.shared_per_block = properties["sharedMemPerBlockOptin"]
        _check_compiler(self.cuda, self.capability)
        self.allocated: set[int] = set()
        self.locked: dict[int, int] = {}  # page-locked memory: address -> bytes

    @contextlib.contextmanager
    def reported(self, what: str):
        """CUDA's errors as ours, on one line."""
        try:
            yield
        except RuntimeError as error:  # what CuPy's errors have in common
            kind = OutOfMemory if getattr(error, "status", None) == NO_MEMORY else DeviceError
            raise kind(f"{what}: {' '.join(str(error).split())}") from None

    # ---- memory ----

    def memory(self) -> tuple[int, int]:
        with self.reported("memory"):
            return self.runtime.memGetInfo()

    def allocate(self, nbytes: int) -> int:
        try:
            with self.reported("allocation"):
                address = self.runtime.malloc(nbytes)
        except OutOfMemory:
            free, total = self.memory()
            raise OutOfMemory(f"{nbytes:,} bytes of GPU memory asked for, {free:,} of {total:,} are free") from None
        self.allocated.add(address)
        return address

    def free(self, address: int) -> None:
        self.allocated.remove(address)
        with contextlib.suppress(RuntimeError):  # the device is lost, and the memory with it
            self.runtime.free(address)

    def host(self, nbytes: int, mapped: bool = False) -> HostMemory:
        runtime = self.runtime
        with self.reported(f"{nbytes:,} bytes of page-locked memory"):
            flags = runtime.hostAllocMapped if mapped else runtime.hostAllocDefault
            begin = runtime.hostAlloc(nbytes, flags | runtime.hostAllocPortable)
            self.locked[begin] = nbytes
            address = runtime.pointerGetAttributes(begin).devicePointer if mapped else None
        return HostMemory(np.frombuffer((c_uint8 * nbytes).from_address(begin), np.uint8), address)

    def free_host(self, memory: HostMemory) -> None:
        begin = memory.array.__array_interface__["data"][0]
        del self.locked[begin]
        with contextlib.suppress(RuntimeError):
            self.runtime.freeHost(begin)

    def page_locked(self, address: int) -> bool:
        return any(begin <= address < begin + nbytes for begin, nbytes in [*self.locked.items()])

    def close(self) -> None:
        for address in [*self.allocated]:
            self.free(address)
        with contextlib.suppress(RuntimeError):
            for begin in self.locked:
                self.runtime.freeHost(begin)
        self.locked = {}

    # ---- streams, events, kernels ----

    def stream(self) -> CupyStream:
        with self.reported("stream"):
            return CupyStream(self)

    def event(self, timed: bool = False) -> CupyEvent:
        with self.reported("event"):
            return CupyEvent(self, timed)

    def load(self, source: str) -> CupyModule:
        cubin = self._compiled(source)
        with self.reported("module"):
            return CupyModule(self, cubin)

    def _compiled(self, source: str) -> bytes:
        """The machine code of a text, from the cache or from NVRTC, which lets other threads run meanwhile."""
        options = (f"-arch=sm_{self.capability[0]}{self.capability[1]}", *OPTIONS)
        if self.cache is None:
            return self._compile(source, options)
        key = hashlib.sha256("\0".join([*options, str(self.cuda.nvrtc.getVersion()), source]).encode()).hexdigest()
        path = self.cache / f"{key[:32]}.cubin"
        with contextlib.suppress(OSError):
            return path.read_bytes()
        cubin = self._compile(source, options)
        with contextlib.suppress(OSError):  # a cache that can't be written costs time, never the start
            self.cache.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.cache, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(cubin)
            os.replace(name, path)
        return cubin

    def _compile(self, source: str, options: tuple[str, ...]) -> bytes:
        nvrtc = self.cuda.nvrtc
        program = nvrtc.createProgram(source, "kernels.cu", (), ())
        try:
            nvrtc.compileProgram(program, options)
            return nvrtc.getCUBIN(program)
        except nvrtc.NVRTCError as error:
            complaints = [line for line in nvrtc.getProgramLog(program).splitlines() if "error" in line] or [str(error)]
            raise DeviceError(f"NVRTC does not compile a kernel: {complaints[0]}") from None
        finally:
            nvrtc.destroyProgram(program)
