"""What a figure was measured on: the machine, the commit, who else used the processors, how fast memory can be read.

Knows nothing of models. Where a system has no /proc, what comes from there is None and nothing is waited for.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from rgpu import machine as rates
from rgpu.machine import memory, name  # noqa: F401 (asked for as bench.machine's, beside all else that a figure needs)

ROOT = Path(__file__).parents[1]
IDLE = 0.15  # processors in use on a machine that counts as idle: a terminal and a few daemons
WINDOW = 0.2  # seconds that the use is watched; /proc/stat counts in steps of 0.01
REGION = 1 << 31  # bytes that are read to measure memory, where a file has as many
CACHED = 1 << 30  # bytes up to which a file might stay in some cache


def commit() -> str:
    """The commit whose engine is measured, "-dirty" if rgpu/ differs from it (results may); "unknown" outside a clone."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "rgpu") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_resident() -> int | None:
    """The largest resident set of this process so far, in bytes, mapped files included."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# ---- who uses the processors ----


def busy_seconds() -> float | None:
    """CPU-seconds that all processes have used since the start of the machine, and those that its host took away (steal)."""
    try:
        with open("/proc/stat") as f:
            user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, f.readline().split()[1:])
    except OSError:
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU-seconds of this process and of the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Interval:
    """A `with` block's `seconds`; `own` and `others`: the CPU-seconds that this process and all others used (None: not known)."""

    others: float | None = None

    def __enter__(self) -> "Interval":
        self._busy, self._own, self._began = busy_seconds(), own_seconds(), time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        self.seconds = time.perf_counter() - self._began
        self.own, busy = own_seconds() - self._own, busy_seconds()
        if busy is not None:
            self.others = max(0.0, busy - self._busy - self.own)  # counted in ticks, so it may fall short of ours


def others_cpu(intervals: list[Interval]) -> float | str:
    """Processors that others used during all of these, on average; empty if that is not known."""
    if any(interval.others is None for interval in intervals):
        return ""
    return round(sum(interval.others for interval in intervals) / sum(interval.seconds for interval in intervals), 2)


class Patience:
    """Waits before a measurement until the machine is idle, for `seconds` in all; says so when they are used up."""

    def __init__(self, seconds: float):
        self.left = seconds

    def wait(self) -> None:
        """Return when the machine is idle, our own threads included, or when there is no patience left."""
        while self.left > 0:
            with Interval() as now:
                time.sleep(WINDOW)
            if now.others is None or now.others + now.own < IDLE * now.seconds:
                return
            self.left -= now.seconds
            if self.left <= 0:
                used = f"others use {now.others / now.seconds:.1f} processors, this process {now.own / now.seconds:.1f}"
                print(f"the machine does not become idle ({used}): measuring all the same", file=sys.stderr)


# ---- how fast memory can be read ----


def read_rate(path: Path, threads: int) -> tuple[float, str]:
    """(bytes per second, what was read) with some threads, in a process of its own, whose pages are not counted as ours."""
    code = "import sys; from bench.machine import read; print(*read(sys.argv[1], int(sys.argv[2])))"
    command = [sys.executable, "-c", code, str(path.resolve()), str(threads)]
    rate, source = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    return float(rate), source


def read(path: str, threads: int) -> tuple[float, str]:
    """The same in this process: the best of some passes over the mapped "file", or a "buffer" if a cache might hold the file."""
    large = os.path.getsize(path) >= CACHED
    region = np.memmap(path, np.uint8, "r")[:REGION] if large else np.ones(CACHED, np.uint8)
    return rates.read_rate(region[: len(region) // 4 * 4].view(np.int32), threads), "file" if large else "buffer"
