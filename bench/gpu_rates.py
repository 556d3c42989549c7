"""How time is taken on a device, and what the device itself gives: a copy, a matrix product, the bus, a launch.

These are the figures that kernels are compared with. Knows nothing of models; CuPy's matrix product (cuBLAS) is used if it is
there, and the rate of the instruction that our own products are made of is measured beside it.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from rgpu.errors import DeviceError, OutOfMemory, RgpuError
from rgpu.ops.cuda_source import source
from rgpu.ops.device import Device, Stream
from rgpu.quants import TYPES

from .kernels import PATTERN, stored

INTERVAL = 5e-3  # seconds that are timed at once: events tell microseconds, and a graph's start takes several
MOST_REPEATS = 200
TEXT = (Path(__file__).parent / "gpu_rates.cu").read_text()
SUMS = 8  # as there


@dataclass(frozen=True)
class Sizes:
    """What is measured: the shapes of Qwen3.6-35B-A3B, and how much memory keeps weights out of every cache."""

    n_embd: int = 2048
    n_ff: int = 512
    n_expert: int = 256
    k: int = 8
    n_head: int = 16
    n_head_kv: int = 2
    head: int = 256
    n_k_head: int = 16
    n_v_head: int = 32
    d: int = 128  # of a recurrent head
    matrices: tuple[tuple[int, int], ...] = ((248320, 2048), (8192, 2048), (2048, 4096), (512, 2048))
    wide: tuple[int, int] = (8192, 2048)  # the matrix of prompts
    prompts: tuple[int, ...] = (512, 2048)
    contexts: tuple[int, ...] = (0, 2048, 8192, 32768)
    memory: int = 1 << 30  # bytes that are read in turn
    most: int = 512  # matrices, caches or states in them
    product: int = 8192  # rows and columns of cuBLAS' matrices
    rounds: int = 4096  # of the products from registers
    launches: int = 1000
    steps: int = 64  # tokens that are decoded
    repeats: int = 5  # medians of so many


def figure(op: str, seconds: float, nbytes: float = 0, flops: float = 0, **more) -> dict:
    """A row's own columns, figures to four digits; what was not measured is absent."""
    found = {"us": seconds * 1e6, "gb_s": nbytes / seconds / 1e9, "tflop_s": flops / seconds / 1e12}
    return {"op": op, **more} | {name: float(f"{value:.4g}") for name, value in found.items() if value}


class Clock:
    """Times what is queued on one stream, on the device."""

    def __init__(self, device: Device, stream: Stream, repeats: int):
        self.stream, self.repeats = stream, repeats
        self.begin, self.end = (device.event(timed=True) for _ in range(2))

    def __call__(self, work: Callable[[], None]) -> float:
        """Median seconds of what `work()` queues, at least INTERVAL of it at a time. The first two calls are not counted."""
        work()
        work()  # a step is recorded at its second call
        n = min(max(round(INTERVAL / max(self._once(work, 1), 1e-6)), 1), MOST_REPEATS)
        return median(self._once(work, n) for _ in range(self.repeats)) / n

    def _once(self, work: Callable[[], None], n: int) -> float:
        self.stream.record(self.begin)
        for _ in range(n):
            work()
        self.stream.record(self.end)
        self.end.synchronize()
        return self.end.elapsed(self.begin)


def fill(stream: Stream, address: int, nbytes: int, quant: str) -> None:
    """Device memory = random blocks of a type, which repeat after some megabytes: no cache is large enough to notice."""
    tag = TYPES[quant]
    pattern = stored(quant, min(PATTERN // tag.nbytes * tag.nbytes, nbytes))
    stream.upload(address, pattern)
    have = len(pattern)
    while have < nbytes:
        more = min(have, nbytes - have)
        stream.copy(address + have, address, more)
        have += more
    stream.synchronize()


def rates(device: Device, sizes: Sizes) -> Iterator[dict]:
    """Rows of what the device gives."""
    stream, taken = device.stream(), []
    clock = Clock(device, stream, sizes.repeats)

    def memory(nbytes: int) -> int:
        taken.append(device.allocate(nbytes))
        return taken[-1]

    try:
        n = sizes.memory
        a, b = memory(n), memory(n)
        fill(stream, a, n, "F32")
        yield figure("copy", clock(lambda: stream.copy(b, a, n)), 2 * n, note="bytes read and written")
        yield from bus(device, stream, clock, a, n // 16)
        yield from launches(device, stream, clock, sizes.launches)
        yield from instructions(device, stream, clock, (a, b), sizes.rounds)
    finally:
        for address in taken:
            device.free(address)
    yield from library_product(device, stream, clock, sizes.product)


def bus(device: Device, stream: Stream, clock: Clock, address: int, nbytes: int) -> Iterator[dict]:
    """Copies from and to page-locked memory, where that is to be had."""
    try:
        host = device.host(nbytes)
    except (DeviceError, OutOfMemory) as error:
        print(f"the bus is not measured: {error}", file=sys.stderr)
        return
    host.array[:] = stored("F32", nbytes)
    yield figure("upload", clock(lambda: stream.upload(address, host.array)), nbytes, note="page-locked")
    yield figure("download", clock(lambda: stream.download(host.array, address)), nbytes, note="page-locked")
    device.free_host(host)


def launches(device: Device, stream: Stream, clock: Clock, n: int) -> Iterator[dict]:
    """What a launch costs the host, and what a kernel that does nothing costs in a graph."""
    kernel = device.load(source("kernels/common.cuh") + TEXT).kernel("nothing")

    def launch() -> None:
        for _ in range(n):
            stream.launch(kernel, (1,), (32,), ())

    times = []
    for _ in range(3):
        began = time.perf_counter()
        launch()
        times.append(time.perf_counter() - began)
        stream.synchronize()
    yield figure("launch", min(times) / n, note="host time")
    with stream.capture() as graph:
        launch()
    yield figure("launch", clock(lambda: stream.replay(graph)) / n, note="in a graph")


def instructions(device: Device, stream: Stream, clock: Clock, memory: tuple[int, int], rounds: int) -> Iterator[dict]:
    """Warp-wide products without loads: the ceiling of kernels/tile.cuh and attention.cu."""
    module, (inputs, out) = device.load(source("kernels/common.cuh") + TEXT), memory
    stream.upload(inputs, np.random.default_rng(4).standard_normal(6 * 32 * 2).astype(np.float16))
    blocks = 4 * device.multiprocessors
    for kind, k in (("f16", 16), ("s8", 32)):
        kernel = module.kernel(f"product_{kind}")
        took = clock(lambda kernel=kernel: stream.launch(kernel, (blocks,), (256,), (out, inputs, rounds)))
        yield figure("mma", took, flops=2 * 16 * 8 * k * SUMS * rounds * blocks * 8, type=kind, note="from registers")


def library_product(device: Device, stream: Stream, clock: Clock, n: int) -> Iterator[dict]:
    """cuBLAS on float16 [n, n], if this CuPy has it."""
    if not hasattr(stream, "stream"):
        return  # not one of CuPy's: the stand-in
    import cupy

    def seconds() -> float:
        x = np.random.default_rng(5).standard_normal((n, 256), np.float32).astype(np.float16)
        a, b = (cupy.tile(cupy.asarray(part), (1, n // 256)) for part in (x, x[::-1]))
        out = cupy.empty((n, n), np.float16)
        return clock(lambda: cupy.matmul(a, b, out=out))

    try:
        with stream.stream:
            took = seconds()
        cupy.get_default_memory_pool().free_all_blocks()
    except RgpuError:
        raise
    except Exception as error:  # of any kind: CuPy loads a library, and compiles kernels of its own
        print(f"cuBLAS is not measured: {' '.join(str(error).split())}", file=sys.stderr)
    else:
        yield figure("product", took, flops=2 * n**3, type="f16", note="cuBLAS")
