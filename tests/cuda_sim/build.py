"""Text to shared library: g++ on the text of kernels and on the stand-in's processor, cached by a hash of all that went in."""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from rgpu.cache import cache_dir
from rgpu.errors import DeviceError

HERE = Path(__file__).parent
COMMON = [
    "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-stack-protector",
    "-fno-plt",
]  # fmt: skip
KERNELS = [
    "-w", "-nostartfiles", "-nodefaultlibs", "-fno-strict-aliasing", "-fwrapv", "-fno-math-errno", "-fno-trapping-math",
    "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all", "-fstack-clash-protection",
]  # fmt: skip
# Counts what kernels load and store: a call to faults.cpp for each access.
COUNTING = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+((?:void|__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)|\s+)+)(\w+)\s*\(')
DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\s*\(\d+\)\s*)?([^;\[\]]+?)\s*\b(\w+)\s*\[\s*\]\s*;")


@functools.cache
def machine_flags() -> list[str]:
    """Half conversions and fused multiply-adds in hardware, where all of a level's instructions are there."""
    try:
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M).group(1).split())
    except (OSError, AttributeError):
        return []
    return ["-march=x86-64-v3"] if {"avx2", "fma", "f16c", "bmi2", "movbe"} <= flags else []


def compiler(*arguments: str, text: str | None = None) -> str:
    """Run g++; what it printed. Raises DeviceError with its first complaint."""
    program = shutil.which("g++")
    if program is None:
        raise DeviceError("the CUDA stand-in needs g++: install it (Debian: apt-get install g++)")
    done = subprocess.run([program, *arguments], input=text, capture_output=True, text=True)
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:300])
        raise DeviceError(f"g++ does not compile the kernel: {complaint}")
    return done.stdout


@functools.cache
def version() -> str:
    return compiler("--version").splitlines()[0]


def built(text: str, flags: list[str], compile) -> Path:
    """The library of `text`, from the cache or by `compile(text, target)`."""
    key = hashlib.sha256()
    for part in (version(), *COMMON, *machine_flags(), *flags, text, *(path.read_text() for path in sorted(HERE.glob("*.h")))):
        key.update(part.encode() + b"\0")
    folder = cache_dir() / "cuda_sim"
    path = folder / f"{key.hexdigest()[:32]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
        os.close(handle)
        try:
            compile(text, name)
            os.replace(name, path)  # another process may have been faster: then the two are the same
        finally:
            Path(name).unlink(missing_ok=True)
    return path


def kernels(source: str, capability: tuple[int, int], counting: bool) -> ctypes.CDLL:
    """The library of a kernel text."""
    architecture = f"-D__CUDA_ARCH__={capability[0]}{capability[1]}0"

    def compile(text, target):
        # Macros first, because they may make kernels.
        text = compiler("-E", "-x", "c++", "-DCUDA_SIM", architecture, "-", text=text)
        names = [(name, re.search(r"__launch_bounds__\s*\((.*)\)", before, re.S)) for before, name in KERNEL.findall(text)]
        text = KERNEL.sub(r'extern "C" void \2(', text)
        text = DYNAMIC.sub(r"\1* const \2 = (\1*)sim_dynamic_shared();", text)
        entries = "".join(f"SIM_KERNEL({name}, {bounds.group(1) if bounds else 1024})\n" for name, bounds in names)
        text = f'#include "cuda_sim.h"\n{text}\n{entries}'
        compiler(*COMMON, *machine_flags(), *flags, "-I", str(HERE), "-x", "c++", "-", "-o", target, "-lm", text=text)

    flags = [*KERNELS, *(COUNTING if counting else []), architecture]
    return ctypes.CDLL(str(built(source, flags, compile)))


class Processor:
    """The compiled processor.cpp. It runs one launch at a time."""

    def __init__(self):
        sources = [HERE / "faults.cpp", HERE / "processor.cpp"]

        def compile(text, target):
            compiler(*COMMON, *machine_flags(), "-Wall", "-Wextra", *map(str, sources), "-o", target)

        path = built("".join(source.read_text() for source in sources), [], compile)
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # kernels find what they call there
        self.lock = threading.Lock()


processor = functools.cache(Processor)
