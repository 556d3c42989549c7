"""Every kernel text through NVRTC, CUDA's compiler, which needs no GPU: the registers, spills, shared memory, instructions.

`texts` names what the engine can ask for; `compile` and `compile_all` are cached by a hash of all that goes in. What follows
from the figures is said in test_nvrtc.py and shown by bench/nvrtc.py.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from cuda.bindings import nvrtc

from rgpu.cache import cache_dir
from rgpu.engine import KV_TYPES
from rgpu.errors import RgpuError
from rgpu.ops import Needs
from rgpu.ops.cuda_source import jobs, text
from rgpu.ops.cupy_device import OPTIONS
from rgpu.quants import TYPES

ARCHITECTURES = (61, 75, 80, 86, 89, 90, 100, 120)
MOST_THREADS = 1024  # of a block, if its kernel names no fewer
HEADS, STATES = (32, 64, 128, 256), (16, 64, 128)  # columns of a head: of attention, and of a recurrent layer's key

# What ptxas says of a kernel; "used … bytes smem" only if there is any. Shared memory is the static part.
FIGURES = re.compile(
    r"Compiling entry function '(\w+)'.*?Function properties for \1\n[^\n]*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers([^\n]*)",
    re.S,
)
ENTRY = re.compile(r"\.entry (\w+)\((.*?)\n\{\n(.*?)\n\}", re.S)
THREADS = re.compile(r"\.maxntid (\d+)")
INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*)[\s;]", re.M)
# All warnings but 177, "declared but never referenced": a text is joined from parts that not every kernel uses whole.
WARNING = re.compile(r": warning #(?!177-)")


@dataclass(frozen=True)
class Kernel:
    threads: int  # most of a block
    registers: int
    stack: int  # bytes of local memory of a thread: spilled registers, and arrays whose index is not known to the compiler
    spill_stores: int  # bytes, counted in the code
    spill_loads: int
    shared: int  # bytes of a block
    cubin: int  # bytes of machine code of the whole text
    instructions: dict[str, int]  # of the PTX: how often each one stands there

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads

    def count(self, begin: str, *parts: str) -> int:
        """Instructions that begin so and contain the other parts."""
        found = (n for name, n in self.instructions.items() if name.startswith(begin) and all(part in name for part in parts))
        return sum(found)


def texts() -> dict[str, str]:
    """Name -> text, of all that a model may need, except that experts' gate and up are of one type or of two neighbours'."""
    every, names = frozenset(TYPES), [*TYPES]
    pairs = {*zip(names, names, strict=True), *zip(names, names[1:] + names[:1], strict=True)}
    needs = Needs(1, 1, 1, 1, 1, every, every, every, kv="", recurrent=0, gate_up=frozenset(pairs), down=every)
    found = {}
    for kv, head, state in product(KV_TYPES, HEADS, STATES):
        for op, defines in jobs(replace(needs, kv=kv.upper(), n_embd_head=head, recurrent=state)):
            found[" ".join([op, *(f"{key}={value}" for key, value in defines.items())])] = text(op, **defines)
    return found


class NotCompiled(RgpuError):
    """NVRTC does not accept a text, or warns; the message is what it says."""


def _done(answer: tuple):
    """What a call to NVRTC returns behind its status."""
    status, *results = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise NotCompiled(nvrtc.nvrtcGetErrorString(status)[1].decode())
    return results[0] if results else None


@functools.cache
def version() -> str:
    return "{1}.{2}".format(*nvrtc.nvrtcVersion())


def known() -> list[int]:
    """The architectures of this NVRTC."""
    return _done(nvrtc.nvrtcGetSupportedArchs())


def _nvrtc(source: str, options: Iterable[str]) -> tuple[str, str, int]:
    """The PTX, the log and the bytes of machine code of a text."""

    def output(size: Callable, read: Callable) -> str:
        room = bytes(_done(size(program)))
        _done(read(program, room))
        return room.rstrip(b"\0").decode()

    program = _done(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, None, None))
    try:
        options = [option.encode() for option in options]
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = output(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        if status[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS or WARNING.search(log):
            raise NotCompiled(log.split("ptxas info")[0].strip())
        return output(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX), log, _done(nvrtc.nvrtcGetCUBINSize(program))
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def read(ptx: str, log: str, cubin: int) -> dict[str, Kernel]:
    """The kernels of a text, from what NVRTC made of it."""
    entries = {name: (head, body) for name, head, body in ENTRY.findall(ptx)}
    kernels = {}
    for name, stack, stores, loads, registers, rest in FIGURES.findall(log):
        head, body = entries[name]
        threads, shared = THREADS.search(head), re.search(r"(\d+) bytes smem", rest)
        kernels[name] = Kernel(
            threads=int(threads.group(1)) if threads else MOST_THREADS,
            registers=int(registers),
            stack=int(stack),
            spill_stores=int(stores),
            spill_loads=int(loads),
            shared=int(shared.group(1)) if shared else 0,
            cubin=cubin,
            instructions=dict(Counter(INSTRUCTION.findall(body))),
        )
    assert kernels and kernels.keys() == entries.keys(), "the log and the PTX are not as they were"
    assert log.count("Function properties for ") == len(kernels), "a function that is no kernel has figures of its own"
    return kernels


def compile(source: str, architecture: int) -> dict[str, Kernel]:
    """The kernels of a text, compiled as CupyDevice does. Raises NotCompiled."""
    options = (f"-arch=sm_{architecture}", *OPTIONS, "--ptxas-options=-v")
    key = hashlib.sha256("\0".join([version(), *options, Path(__file__).read_text(), source]).encode()).hexdigest()
    path = cache_dir() / "nvrtc" / f"{key[:32]}.json"
    if path.exists():
        return {name: Kernel(**figures) for name, figures in json.loads(path.read_text()).items()}
    kernels = read(*_nvrtc(source, options))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump({name: asdict(kernel) for name, kernel in kernels.items()}, file)
    os.replace(file.name, path)
    return kernels


def compile_all(named: dict[str, str], architecture: int) -> dict[str, dict[str, Kernel]]:
    """Name of the text -> its kernels, on all processors. Raises NotCompiled with every text that does not compile."""

    def attempt(source: str):
        try:
            return compile(source, architecture)
        except NotCompiled as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = dict(zip(named, threads.map(attempt, named.values()), strict=True))
    complaints = [f"{name}: {result}" for name, result in results.items() if isinstance(result, NotCompiled)]
    if complaints:
        raise NotCompiled("\n".join(complaints))
    return results
