"""What a plan needs to know of a machine: how much memory of each kind, and how fast it can be read. Known by name, or measured.

Knows nothing of models. Measuring this machine takes about a second; the figures are kept in the cache directory.
"""

import contextlib
import json
import os
import platform
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from .cache import cache_dir
from .gguf.direct import DirectFiles, pages, room

VERSION = 1  # of what is kept; other versions are measured again
MIB, GB = 1 << 20, 10**9
BUFFER = 1 << 28  # bytes that are read to measure memory: more than a cache holds
PIECE = 1 << 24  # bytes that one thread reads at a time, so that no thread waits long for the slower one
PATIENCE = 0.3  # seconds of a measurement
BATCH, ORDER = 32, 64  # matrices whose products measure arithmetic, and their rows
RECORD, RECORDS, READERS = 1 << 21, 96, 4  # bytes of a read from storage (about an expert), how many, and how many at a time
# Weights per second of our kernels, per multiplication of those products, on AVX-512 with VNNI: of a decode step whose bytes
# come from a cache, and of a prompt. Without int8 dot products a prompt takes about twice as long.
DECODE_SHARE, PREFILL_SHARE = 0.6, 3.6


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes; gb_s: 1e9 bytes a second; gw_s: 1e9 weights a second, times tokens."""

    name: str
    ram: int = 32 * GB
    cpu_gb_s: float = 38.0  # of weights, by all threads of a decode step
    cpu_gw_s: float = 150.0  # of a decode step that does not wait for memory
    cpu_prefill_gw_s: float = 300.0
    ram_gb_s: float = 42.0  # what memory gives the CPU and the bus together
    disk_gb_s: float = 2.5
    fixed_ms: float = 0.01  # of a step on the CPU, besides its bytes …
    layer_ms: float = 0.01  # … and of each of its layers
    gpu_fixed_ms: float = 1.35  # of a step on the GPU: launches, the way there and back
    vram: int = 0  # 0: no GPU
    display: int = 0  # bytes of VRAM that the system and other programs use
    gpu_gb_s: float = 0.0
    gpu_tflops: float = 0.0  # of products of quantised matrices
    pcie_gb_s: float = 0.0


def _gpu(name: str, vram_mib: int, gpu_gb_s: float, gpu_tflops: float, pcie_gb_s: float, **others) -> Machine:
    """A PC with a graphics card that shows the desktop too."""
    rates = {"gpu_gb_s": gpu_gb_s, "gpu_tflops": gpu_tflops, "pcie_gb_s": pcie_gb_s}
    return Machine(name, vram=vram_mib * MIB, display=700 * MIB, **rates | others)


# What such machines reach in practice, about 80 % of what is printed on the box.
PROFILES = {
    "rtx4060-laptop": _gpu("RTX 4060 Laptop, 8 GB", 8188, 200, 30, 12.5),
    "rtx4070-laptop": _gpu("RTX 4070 Laptop, 8 GB", 8188, 205, 40, 12.5, cpu_gb_s=50.0, ram_gb_s=55.0),
    "rtx3060-laptop": _gpu("RTX 3060 Laptop, 6 GB", 6144, 270, 20, 12.5, ram=16 * GB),
    "gtx1060": _gpu("GTX 1060, 6 GB", 6144, 155, 8, 11.0, ram=16 * GB, cpu_gb_s=25.0, ram_gb_s=28.0, disk_gb_s=0.5),
    "rtx3060": _gpu("RTX 3060, 12 GB", 12288, 290, 25, 22.0),
    "rtx3060ti": _gpu("RTX 3060 Ti, 8 GB", 8192, 360, 32, 22.0),
    "rtx3090": _gpu("RTX 3090, 24 GB", 24576, 750, 70, 22.0, ram=64 * GB),
    "rtx4090": _gpu("RTX 4090, 24 GB", 24564, 830, 160, 22.0, ram=64 * GB, cpu_gb_s=60.0, ram_gb_s=66.0, disk_gb_s=5.0),
    "cpu": Machine("a PC without a GPU"),
}


def name() -> str:
    """The processor, how many of its cores there are, and the memory."""
    processor = _cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {memory() / 2**30:.0f} GiB"


def _cpuinfo(key: str) -> str:
    """A line of what Linux says about the first processor, else ""."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((text.split(":", 1)[1].strip() for text in lines if text.startswith(key)), "")


def memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def this_machine(threads: int, path: Path | None = None, again: bool = False) -> Machine:
    """This machine's CPU with so many threads, and the storage that `path` is on; measured once, or `again`. Raises OSError."""
    key = f"{name()}, {threads} threads"
    storage = f"storage {os.stat(path).st_dev}" if path else ""
    file = cache_dir() / "machine.json"
    kept = {} if again else _kept(file)
    new = {} if key in kept else {key: _measured(threads)}
    if path and storage not in kept:
        new[storage] = {"disk_gb_s": storage_rate(path) / GB}
    if new:
        kept |= new
        _keep(file, kept)
    return Machine(key, ram=memory(), **kept[key] | kept.get(storage, {}))


def _measured(threads: int) -> dict[str, float]:
    read = read_rate(np.ones(BUFFER // 4, np.int32), threads)
    products = arithmetic_rate() * min(threads, physical_cores())
    return {
        "cpu_gb_s": read / GB,
        "cpu_gw_s": products * DECODE_SHARE / GB,
        "cpu_prefill_gw_s": products * PREFILL_SHARE * (1.0 if "vnni" in _cpuinfo("flags") else 0.5) / GB,
        "ram_gb_s": 1.1 * read / GB,
    }


def _kept(file: Path) -> dict[str, dict[str, float]]:
    """What was measured before; nothing if that is of another version, or damaged."""
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(kept, dict) or kept.pop("version", 0) != VERSION:
        return {}
    known = {field.name for field in fields(Machine)}

    def good(rates) -> bool:
        return isinstance(rates, dict) and rates.keys() <= known and all(isinstance(rate, float) for rate in rates.values())

    return {key: rates for key, rates in kept.items() if good(rates)}


def _keep(file: Path, kept: dict) -> None:
    with contextlib.suppress(OSError):  # then it is measured at every start
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps({"version": VERSION} | kept, indent=1))
        os.replace(beside, file)


# ---- measurements ----


def physical_cores() -> int:
    """Cores this process may use, counting two hardware threads of one core once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in usable:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as f:
                cores.add(f.read().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def best(work: Callable[[], object], seconds: float = PATIENCE, least: int = 5) -> float:
    """The shortest time of `work`, of as many runs as fit into `seconds` and at least some."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def read_rate(words: np.ndarray, threads: int) -> float:
    """Bytes per second at which threads read an int32 array; what lacks to a whole piece is left out."""
    n = PIECE // 4
    parts = [words[at : at + n] for at in range(0, len(words) // n * n, n)]
    with ThreadPoolExecutor(threads) as pool:
        # Of NumPy's reductions the maximum of int32 is the fastest: 1.25 times the sum with one thread.
        return len(parts) * PIECE / best(lambda: list(pool.map(np.max, parts)))


def arithmetic_rate() -> float:
    """Multiplications per second of float32 products, by one core: matrices too small for BLAS to use more."""
    a = np.random.default_rng(0).standard_normal((BATCH, ORDER, ORDER), np.float32)
    out = np.empty_like(a)
    return BATCH * ORDER**3 / best(lambda: np.matmul(a, a, out=out))


def storage_rate(path: Path) -> float:
    """Bytes per second at which records from all over a file are read past the page cache, some at a time."""
    size, files, at = os.path.getsize(path), DirectFiles([path]), random.Random()
    memory = [room(RECORD) for _ in range(READERS)]
    places = [pages(at.randrange(max(size - RECORD, 1)), 0)[0] for _ in range(RECORDS)]

    def reader(i: int) -> None:
        for place in places[i::READERS]:
            files.read(0, place, min(RECORD, size - place), memory[i])

    try:
        with ThreadPoolExecutor(READERS) as pool:
            began = time.perf_counter()
            list(pool.map(reader, range(READERS)))
            return RECORDS * min(RECORD, size) / (time.perf_counter() - began)
    finally:
        files.close()
