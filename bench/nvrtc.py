"""`python -m bench.nvrtc`: every kernel compiled for every architecture, its registers, spills, memory and instructions.

Needs no GPU. The table bench/results/nvrtc.csv is written anew, unlike the others: it belongs to the sources, not to a machine.
The last line is JSON: the most that each architecture's kernels take, and those that spill.
"""

import argparse
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rgpu.errors import RgpuError, line
from rgpu.quants import TYPES
from tests import nvrtc

from . import machine
from .compare import RESULTS

FIGURES = "threads registers spill_stores spill_loads stack shared cubin".split()
COLUMNS = [*"commit nvrtc op type head kernel sm".split(), *FIGURES, "instructions"]
NOTABLE = {  # what the speed hangs on -> as PTX names it
    r"dp4a\.": "dp4a",
    r"mma\.sync\.aligned\.(m\d+n\d+k\d+)\.": r"mma.\1",
    r"ldmatrix\.": "ldmatrix",
    r"cp\.async\.cg\.": "cp.async",
    r"ld\.global\..*v4\.": "ld.v4",
    r"fma\.": "fma",
}


def notable(kernel: nvrtc.Kernel) -> str:
    """How often the instructions that matter stand in the PTX: "dp4a 32; cp.async 18"."""
    found: Counter[str] = Counter()
    for name, count in kernel.instructions.items():
        for pattern, short in NOTABLE.items():
            if match := re.match(pattern, name):
                found[match.expand(short)] += count
    return "; ".join(f"{name} {count}" for name, count in sorted(found.items()))


def rows(texts: dict[str, str], architecture: int) -> Iterator[dict]:
    """The kernels of one architecture, in the order of the texts. Raises NotCompiled."""
    for text, kernels in nvrtc.compile_all(texts, architecture).items():
        op, *_ = text.split()
        defines = dict(re.findall(r"(\w+)=(\w+)", text))
        types = "+".join(value for value in defines.values() if value in TYPES)
        for name, kernel in kernels.items():
            row = {"op": op, "type": types, "head": defines.get("HEAD", ""), "kernel": name, "sm": architecture}
            yield row | {key: getattr(kernel, key) for key in FIGURES} | {"instructions": notable(kernel)}


def label(row: dict) -> str:
    return " ".join(str(row[key]) for key in ("kernel", "type", "head") if row[key])


def summary(mine: list[dict]) -> dict:
    """An architecture in one row; bytes spilled are stores and loads."""
    most = max(mine, key=lambda row: row["registers"])
    spills = {label(row): row["spill_stores"] + row["spill_loads"] for row in mine}
    return {
        "sm": mine[0]["sm"],
        "kernels": len(mine),
        "registers": most["registers"],
        "in": label(most),
        "shared": max(row["shared"] for row in mine),
        "stack": max(row["stack"] for row in mine),
        "spills": {name: nbytes for name, nbytes in spills.items() if nbytes},
    }


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.nvrtc", description=__doc__.split("\n\n")[0])
    known = nvrtc.ARCHITECTURES
    p.add_argument("--sm", nargs="+", type=int, choices=known, default=known, metavar="SM", help="of 61 to 120; default: all")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the CSV is kept (default bench/results)")
    args = p.parse_args(argv)
    facts = {"commit": machine.commit(), "nvrtc": nvrtc.version()}
    texts, table, summaries = nvrtc.texts(), [], []
    try:
        for architecture in args.sm:
            mine = [facts | row for row in rows(texts, architecture)]
            table += mine
            summaries.append(summary(mine))
            text = "sm_{sm}: {kernels} kernels; most registers {registers} ({in}), shared {shared} bytes; spills: "
            said = ", ".join(f"{name} {nbytes} bytes" for name, nbytes in summaries[-1]["spills"].items()) or "none"
            print(text.format(**summaries[-1]) + said, file=sys.stderr)
        args.results.mkdir(parents=True, exist_ok=True)
        with (args.results / "nvrtc.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    except (RgpuError, OSError) as error:
        print(line(error), file=sys.stderr)
        return 1
    print(json.dumps(summaries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
