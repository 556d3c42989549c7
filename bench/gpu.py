"""`python -m bench.gpu`: what the CUDA backend gets out of this GPU, beside a copy and a matrix product measured on it.

Part by part; a part whose rows for this GPU and commit are in gpu.csv already is not measured again. Shapes are those of
Qwen3.6-35B-A3B; the whole model is bench.shapes' fifth of it, written if it is absent. The last line is JSON: the bars.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rgpu.cache import cache_dir
from rgpu.errors import RgpuError, line
from rgpu.ops.device import Device
from rgpu.quants import TYPES

from . import gpu_bytes, gpu_ops, machine
from .compare import RESULTS, append
from .gpu_model import made, model
from .gpu_rates import Sizes, rates

COLUMNS = (
    "date gpu commit part op type tokens context shape us gb_s of_copy tflop_s of_product tok_s launches host_us note"
).split()
UNITS = {
    "tokens": "tokens", "context": "before", "us": "us", "gb_s": "GB/s", "of_copy": "% of a copy", "tflop_s": "TFLOP/s",
    "of_product": "% of a product", "tok_s": "tok/s", "launches": "launches", "host_us": "us beside the step", "note": "",
}  # fmt: skip
PARTS = {
    "rates": lambda device, sizes, args: rates(device, sizes),
    "matvec": lambda device, sizes, args: gpu_ops.matvec(device, sizes, args.types),
    "experts": lambda device, sizes, args: gpu_ops.experts(device, sizes, args.types),
    "attention": lambda device, sizes, args: gpu_ops.attention(device, sizes, args.types),
    "recurrent": lambda device, sizes, args: gpu_ops.recurrent(device, sizes, args.types),
    "tiles": lambda device, sizes, args: gpu_ops.tiles(device, sizes, args.types),
    "model": lambda device, sizes, args: model(made(args.model), sizes),
}
BY_TYPE = "matvec", "experts", "tiles"


def open_device() -> Device:
    from rgpu.ops.cupy_device import CupyDevice

    return CupyDevice(cache_dir() / "cuda")


class Results:
    """The rows of one GPU and commit, in the CSV and here. A part's rows are written when it has ended."""

    def __init__(self, path: Path, gpu: str, commit: str):
        self.path, self.facts = path, {"date": time.strftime("%Y-%m-%d"), "gpu": gpu, "commit": commit}
        self.rows: list[dict] = []
        # Of a tree that differs from its commit nobody knows what was measured.
        if path.exists() and not commit.endswith(("-dirty", "unknown")):
            with path.open(newline="") as f:
                self.rows = [row for row in csv.DictReader(f) if (row["gpu"], row["commit"]) == (gpu, commit)]

    def done(self, part: str, types: list[str]) -> bool:
        """Is the part measured, for these types if it is by type?"""
        found = {row["type"] for row in self.rows if row["part"] == part}
        return found >= {*types} if part in BY_TYPE else bool(found)

    def rate(self, column: str, **wanted: str) -> float | None:
        """What the device itself gives."""
        for row in self.rows:
            if row["part"] == "rates" and all(row[key] == value for key, value in wanted.items()):
                return float(row[column])
        return None

    def completed(self, part: str, figures: dict) -> dict:
        """A whole row, with percentages of what the device gives."""
        row = dict.fromkeys(COLUMNS, "") | self.facts | {"part": part} | figures
        copy = self.rate("gb_s", op="copy")
        product = self.rate("tflop_s", op="product") or self.rate("tflop_s", op="mma", type="f16")
        if copy and row["gb_s"] != "" and row["tokens"]:
            row["of_copy"] = round(100 * row["gb_s"] / copy, 1)
        if product and row["tflop_s"] != "" and row["tokens"]:
            row["of_product"] = round(100 * row["tflop_s"] / product, 1)
        return row

    def measure(self, part: str, figures: Iterator[dict]) -> None:
        """Take up a part's rows, and write them when the last is there."""
        self.rows = [row for row in self.rows if row["part"] != part]
        first = len(self.rows)
        for found in figures:
            self.rows.append(self.completed(part, found))
            print(text(self.rows[-1]), file=sys.stderr, flush=True)
        for row in self.rows[first:]:
            append(row, self.path)


def text(row: dict) -> str:
    """A row for people."""
    figures = ", ".join(f"{row[key]} {unit}".strip() for key, unit in UNITS.items() if row[key] != "")
    return f"{row['op']:11}{row['type']:12}{row['shape']:13}{figures}"


def bars(rows: list[dict]) -> dict:
    """How the backend's promises are met: percent of a copy or a product, microseconds, launches."""
    found: dict = {}
    for part, column, tokens in (("matvec", "of_copy", 1), ("experts", "of_copy", 1), ("tiles", "of_product", 2048)):
        shapes: dict = {}
        for row in rows:
            if row["part"] == part and row[column] != "" and int(row["tokens"]) == tokens:
                shapes.setdefault(row["shape"], {})[row["type"]] = float(row[column])
        for shape, percent in shapes.items():
            worst = min(percent, key=percent.get)
            found[f"{part} {shape}"] = {"median": median(percent.values()), "worst": percent[worst], "type": worst}
    whole = {"decode one graph": ("of_copy", "tok_s", "host_us"), "decode kernel by kernel": ("tok_s", "launches")}
    whole |= {"prefill 512": ("of_product", "tok_s"), "prefill 2048": ("of_product", "tok_s")}
    for row in rows:
        name = f"{row['op']} {row['note'] or row['tokens']}"
        for column in whole.get(name, ()) if row["part"] == "model" else ():
            found.setdefault(f"{name}, {column}", {})[str(row["context"])] = row[column]
    return found


def run(results: Results, device: Device, sizes: Sizes, args: argparse.Namespace) -> None:
    compared = [] if results.done("rates", []) else ["rates"]  # with which all else is
    for part in dict.fromkeys(compared + args.parts):
        if results.done(part, args.types) and not args.again:
            print(f"{part}: measured before, for this commit", file=sys.stderr)
            continue
        began = time.perf_counter()
        results.measure(part, PARTS[part](device, sizes, args))
        print(f"{part}: {time.perf_counter() - began:.1f} s", file=sys.stderr)


def main(argv=None, sizes: Sizes | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    names = ", ".join(PARTS)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {names}; default: all")
    p.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), metavar="TYPE", help="default: all")
    p.add_argument("--model", type=Path, metavar="FILE", help="default: what bench.shapes writes")
    p.add_argument("--commit", default=machine.commit(), help="what is measured, where there is no git (default %(default)s)")
    p.add_argument("--again", action="store_true", help="also measure what was measured before")
    p.add_argument("--counted", action="store_true", help="without a GPU: a table of the bytes that kernels move")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="for CSV files (default bench/results)")
    args = p.parse_args(argv)
    began = time.perf_counter()
    try:
        if args.counted:
            print(*gpu_bytes.report(args.results / "gpu_bytes.csv", sizes or Sizes(), args.types), sep="\n")
            return 0
        device = open_device()
        results = Results(args.results / "gpu.csv", device.name, args.commit)
        try:
            run(results, device, sizes or Sizes(), args)
        finally:
            device.close()
    except (RgpuError, OSError) as error:
        print(line(error), file=sys.stderr)
        return 1
    print(json.dumps(results.facts | {"seconds": round(time.perf_counter() - began, 1), "bars": bars(results.rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
