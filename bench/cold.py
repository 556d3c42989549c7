"""`python -m bench.cold MODEL`: decode and prefill with the file in memory, dropped from it, or with memory for half of it.

Drops the pages of this file only. `--memory` puts the process into a memory cgroup (version 1, as root), where pages come and go
all the time. Rows go to bench/results/cold.csv, a table to stderr; the last line of stdout is the rows as JSON.
"""

import argparse
import json
import math
import mmap
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from ctypes import CDLL, c_size_t, c_void_p
from pathlib import Path
from statistics import median

from rgpu.errors import RgpuError, line
from rgpu.gguf import GGUFFile

from . import compare, machine
from .engines import Rgpu
from .machine import Interval, Patience

CGROUPS = Path("/sys/fs/cgroup/memory")


@contextmanager
def memory_limit(n_bytes: int) -> Iterator[None]:
    """Run the process in a memory cgroup of its own, if `n_bytes` is not 0; raises RgpuError where there are none."""
    if not n_bytes:
        yield
        return
    own = next((text.split(":")[2] for text in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in text), None)
    if own is None or not os.access(CGROUPS, os.W_OK):
        raise RgpuError(f"--memory needs {CGROUPS} (cgroup version 1) and the right to write there")
    home = CGROUPS / own.strip("/")
    group = home / f"bench-cold-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(n_bytes))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def drop(file: GGUFFile) -> None:
    """Have the system forget the pages of a file that only this process uses."""
    for shard, path in enumerate(file.paths):
        mapping = file.mapping(shard)
        # Pages in a page table stay.
        CDLL(None).madvise(c_void_p(mapping.ctypes.data), c_size_t(len(mapping)), mmap.MADV_DONTNEED)
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(work: Callable[[], None]) -> dict:
    """What one piece of work took."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    with Interval() as interval:
        work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    read, faults = 512 * (after.ru_inblock - before.ru_inblock), after.ru_majflt - before.ru_majflt
    return {"interval": interval, "read_gb": read / 1e9, "major_faults": faults, "own_cpu_s": interval.own}


class Measurement:
    """An engine, and the tests that run on it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.patience = args, Patience(args.wait)
        self.engine = Rgpu(args.model, args.threads, args.tokens + args.steps)
        self.experts = self.engine.engine.executor.experts
        self.readahead = self.experts.readahead
        n_vocab = self.engine.engine.hparams.n_vocab
        self.work = {
            f"decode {args.steps}": (args.steps, self.engine.step, compare.tokens(args.steps, n_vocab)),
            f"prefill {args.tokens}": (args.tokens, self.engine.eval, compare.tokens(args.tokens, n_vocab, seed=1)),
        }

    def turn(self, test: str, cache: str, readahead: bool) -> dict:
        self.patience.wait()
        self.experts.readahead = self.readahead if readahead else nullcontext()
        self.readahead.scatter(False)
        self.readahead.ended = -math.inf  # as after a long pause: it looks for itself whether pages are missing
        self.engine.back()
        if cache == "dropped":
            drop(self.engine.engine.file)
        _, evaluate, tokens = self.work[test]
        return measured(lambda: evaluate(tokens))

    def rows(self) -> list[dict]:
        """Medians over the rounds, in which all variants of a test alternate."""
        caches = ["limited"] if self.args.memory else ["warm", "dropped"]
        facts = compare.facts(self.args) | {"memory_gb": self.args.memory or ""}
        rows = []
        for test, (n, _, _) in self.work.items():
            variants = [(test, cache, readahead) for cache in caches for readahead in (True, False)]
            turns = [lambda v=v: self.turn(*v) for v in variants]
            for (_, cache, readahead), found in zip(variants, compare.alternate(turns, self.args.rounds), strict=True):
                rates = [n / each["interval"].seconds for each in found]
                row = facts | {"test": test, "cache": cache, "readahead": readahead, "tok_s": round(median(rates), 2)}
                row |= {"tok_s_min": round(min(rates), 2), "tok_s_max": round(max(rates), 2)}
                row |= {key: round(median(each[key] for each in found), 3) for key in ("read_gb", "major_faults", "own_cpu_s")}
                rows.append(row | {"rounds": self.args.rounds, "others_cpu": machine.others_cpu([f["interval"] for f in found])})
        return rows


def table(row: dict) -> str:
    return (
        f"{row['test']:12} {row['cache']:8} {'with' if row['readahead'] else 'without':8} read-ahead {row['tok_s']:7.2f} tok/s "
        f"({row['tok_s_min']} to {row['tok_s_max']}); {row['read_gb']:.2f} GB read, {row['major_faults']:.0f} major faults, "
        f"{row['own_cpu_s']:.1f} s of CPU; CPUs used by others: {row['others_cpu']}"
    )


def main(argv=None) -> int:
    p = compare.parser("cold", __doc__)
    p.add_argument("--memory", type=float, default=0, metavar="GB", help="memory of the process, page cache included")
    p.add_argument("--steps", type=compare.number(1), default=64, help="tokens one by one (default %(default)s)")
    p.add_argument("--tokens", type=compare.number(1), default=512, help="tokens of the prompt (default %(default)s)")
    args = p.parse_args(argv)
    try:
        with GGUFFile(args.model) as file:
            drop(file)  # pages that others have had read would not count
        with memory_limit(int(args.memory * 1e9)):
            rows = Measurement(args).rows()
    except (RgpuError, OSError) as error:
        print(line(error), file=sys.stderr)
        return 1
    for row in rows:
        print(table(row), file=sys.stderr)
        compare.append(row, args.results / "cold.csv")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
