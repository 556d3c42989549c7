"""How fast a stock GGUF becomes per-expert, beside `cp` of the same file: `python -m bench.convert [--gb 1] [--folder DIR]`.

Writes a file of Qwen3.6-35B-A3B's expert shapes with random bytes, then copies and converts it in turn; every run ends with
the result synced to disk. The medians go to stderr, and as one JSON line to stdout.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from convert.writer import Entry, encode, header

EXPERTS, N_EMBD, N_FF = 256, 2048, 512
Q4_K = (256, 144)  # weights and bytes of a block


def write_stock(path: Path, size: int, seed: int = 0) -> None:
    """A stacked GGUF of about `size` bytes: layers of Q4_K experts under a Q4_K embedding that fills up the rest."""
    stack = EXPERTS * N_EMBD * N_FF // Q4_K[0] * Q4_K[1]
    layers = max(1, size // (3 * stack))
    rows = max(1, (size - layers * 3 * stack) * Q4_K[0] // Q4_K[1] // N_EMBD)
    entries = [Entry("token_embd.weight", "Q4_K", (rows, N_EMBD), rows * N_EMBD // Q4_K[0] * Q4_K[1])]
    for layer in range(layers):
        for kind, shape in (("down", (N_EMBD, N_FF)), ("gate", (N_FF, N_EMBD)), ("up", (N_FF, N_EMBD))):
            entries.append(Entry(f"blk.{layer}.ffn_{kind}_exps.weight", "Q4_K", (EXPERTS, *shape), stack))
    pairs = [("general.architecture", encode("qwen35moe")), ("qwen35moe.expert_count", encode(EXPERTS))]
    head, _, size = header(pairs, entries, 32)
    random = np.random.Generator(np.random.SFC64(seed))
    with path.open("wb") as file:
        file.write(head)
        for begin in range(len(head), size, 8 << 20):
            file.write(random.bytes(min(8 << 20, size - begin)))
        os.fsync(file.fileno())


def copy(source: Path, out: Path) -> None:
    subprocess.run(["cp", source, out], check=True)
    with out.open("rb") as file:
        os.fsync(file.fileno())


def convert(source: Path, out: Path) -> None:
    subprocess.run([sys.executable, "-m", "convert", source, out], check=True, stderr=subprocess.DEVNULL)


def restore(source: Path, out: Path) -> None:
    subprocess.run([sys.executable, "-m", "convert", "--stock", source, out], check=True, stderr=subprocess.DEVNULL)


def timed(run, source: Path, out: Path, cold: bool) -> float:
    """Seconds of one run into a file that does not exist before; `cold` drops the source from the page cache first."""
    out.unlink(missing_ok=True)
    with source.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED if cold else os.POSIX_FADV_NORMAL)
    begin = time.perf_counter()
    run(source, out)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of the file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="read the source from the disk each time, not from the page cache")
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder); needs five times the size")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=args.folder))
    try:
        stock = folder / "stock.gguf"
        write_stock(stock, int(args.gb * 1e9))
        seconds = {"cp": [], "convert": [], "restore": []}
        convert(stock, folder / "source.gguf")  # what is restored, and what compiles and caches whatever it may
        runs = {"cp": (copy, stock), "convert": (convert, stock), "restore": (restore, folder / "source.gguf")}
        for i in range(args.runs):
            # Each goes first in turn: a disk that has just been written to is slower.
            order = [*runs][i % 3 :] + [*runs][: i % 3]
            for name in order:
                seconds[name].append(timed(*runs[name], folder / f"{name}.gguf", args.cold))
        size = stock.stat().st_size
        median = {name: statistics.median(values) for name, values in seconds.items()}
    finally:
        shutil.rmtree(folder)
    result = {"bytes": size, "cold": args.cold, "runs": args.runs}
    for name, value in median.items():
        print(f"{name:8} {value:6.2f} s  {size / value / 1e6:6.0f} MB/s  {median['cp'] / value:5.0%} of cp", file=sys.stderr)
        result |= {f"{name}_s": round(value, 3), f"{name}_share_of_cp": round(median["cp"] / value, 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
