"""`python -m bench.plot`: pictures of bench/results/decode.csv (extra `plot`): decode.png and bandwidth.png beside it.

The first is tokens per second against context, the second the share of the memory's read rate per type. Of each machine's
figures the newest are drawn; `--machine` chooses one where the file has several.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from rgpu.errors import RgpuError, line

from .compare import RESULTS

SIZE = (8, 4.5)  # inches


def newest(path: Path, machine: str | None) -> dict[str, dict[int, dict]]:
    """The last row of each curve and context, of the machine whose name has `machine` in it (else of the last row)."""
    with path.open(newline="") as f:
        rows = [row for row in csv.DictReader(f) if machine is None or machine in row["machine"]]
    if not rows:
        raise RgpuError(f"{path} has no row" + (f" of a machine with {machine!r} in its name" if machine else ""))
    rows = [row for row in rows if row["machine"] == rows[-1]["machine"]]
    # Files below 1 GiB show what a step costs besides its bytes, at rates that would flatten all other curves.
    rows = [row for row in rows if row["read_from"] == "file"] or rows
    curves: dict[str, dict[int, dict]] = {}
    for row in rows:
        label = f"{row['model']}: {row['type']}, {row['threads']} threads"
        curves.setdefault(label, {})[int(row["context"])] = row
    return curves


def decode(axes, curves: dict) -> None:
    """Tokens per second against context; the peer is dashed."""
    for number, (label, points) in enumerate(curves.items()):
        for key, style in (("tok_s", "o-"), ("peer_tok_s", "o--")):
            drawn = [(context, float(row[key])) for context, row in sorted(points.items()) if row[key]]
            if drawn:
                name = "rgpu" if key == "tok_s" else points[drawn[0][0]]["peer"]
                axes.plot(*zip(*drawn, strict=True), style, color=f"C{number}", label=f"{name}, {label}")
    contexts = sorted({context for points in curves.values() for context in points})
    axes.set_xscale("symlog", base=2, linthresh=256)
    axes.set_xticks(contexts, contexts)
    axes.set(xlabel="tokens of context", ylabel="decode, tokens per second", ylim=(0, None))


def bandwidth(axes, curves: dict) -> None:
    """Bytes per token times rate, as a share of the read rate, at the shortest context of each curve."""
    shortest = [points[min(points)] for points in curves.values()]
    for key, offset, name in (("share", -0.2, "rgpu"), ("peer_share", 0.2, shortest[0]["peer"])):
        bars = [(i + offset, 100 * float(row[key])) for i, row in enumerate(shortest) if row[key]]
        if bars:
            axes.bar(*zip(*bars, strict=True), width=0.4, label=name)
    labels = [f"{row['model']}\n{row['type']}, {row['threads']} threads\n{row['gb_per_token']} GB/token" for row in shortest]
    axes.set_xticks(range(len(curves)), labels)
    axes.set(ylabel="% of the measured read rate", ylim=(0, 100))


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.split("\n\n")[0])
    p.add_argument("--machine", help="a part of its name in the CSV (default: the machine of the last row)")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the CSV is and the pictures go")
    args = p.parse_args(argv)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("error: matplotlib is not installed: pip install '.[plot]'", file=sys.stderr)
        return 1
    try:
        curves = newest(args.results / "decode.csv", args.machine)
        files = []
        for draw in (decode, bandwidth):
            figure = Figure(SIZE, layout="constrained")
            axes = figure.subplots()
            draw(axes, curves)
            last = next(reversed(next(reversed(curves.values())).values()))
            axes.set_title(f"{last['machine']}, commit {last['commit']}", fontsize="medium")
            axes.legend(fontsize="small")
            axes.grid(axis="y", alpha=0.3)
            files.append(str(args.results / f"{draw.__name__}.png"))
            figure.savefig(files[-1], dpi=120)
    except (RgpuError, OSError) as error:
        print(line(error), file=sys.stderr)
        return 1
    print(json.dumps(files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
