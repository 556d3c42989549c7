"""`python -m bench.first_token MODEL [--vs llama.cpp]`: from starting a process to the first token of a prompt of 256 tokens.

Every engine runs in a process of its own, alternating, with the file in the page cache; llama.cpp with and without repacking.
No tokenizer is needed: the prompt is token ids. The peak resident set of each process is recorded too.
"""

import json
import subprocess
import sys
import time
from functools import partial
from statistics import median
from typing import NamedTuple

from rgpu.errors import RgpuError, line

from . import compare, machine
from .machine import Interval, Patience

COLUMNS = (
    "date machine commit model type threads test seconds seconds_min seconds_max peer peer_note peer_seconds peer_seconds_min "
    "peer_seconds_max ratio rounds others_cpu rss_gb peer_rss_gb"
).split()
N_PROMPT = 256
# What a process does; it ends when its standard input does, so that nobody's clean-up is timed.
PROCESS = f"""
import json, sys
from bench.engines import LlamaCpp, Rgpu
from rgpu.errors import RgpuError, line
kind, model, threads = sys.argv[1:]
threads, n_ctx = int(threads), 2 * {N_PROMPT}
try:
    engine = Rgpu(model, threads, n_ctx) if kind == "rgpu" else LlamaCpp(model, threads, n_ctx, kind == "repacked")
    engine.eval(list(range({N_PROMPT})))
except (RgpuError, OSError) as error:
    sys.exit(line(error))
print(int(engine.logits().argmax()), flush=True)
sys.stdin.read()
from bench.machine import peak_resident
print(json.dumps([engine.name, engine.note, peak_resident()]))
"""


class Start(NamedTuple):
    """One process: seconds to its first token, the interval of all of it, its peak resident set in bytes."""

    name: str
    note: str
    seconds: float
    interval: Interval
    resident: int | None


def start(kind: str, model, threads: int, patience: Patience) -> Start:
    """Run one process. Raises RgpuError with its message if it fails."""
    patience.wait()
    command = [sys.executable, "-c", PROCESS, kind, str(model), str(threads)]
    with Interval() as interval:
        began = time.perf_counter()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=machine.ROOT) as process:
            process.stdout.readline()
            seconds = time.perf_counter() - began
            out, _ = process.communicate()
    if process.returncode:
        raise RgpuError(f"the process that was to be timed ({kind}) ended with status {process.returncode}")
    name, note, resident = json.loads(out)
    return Start(name, note, seconds, interval, resident)


def side(prefix: str, starts: list[Start]) -> dict:
    """One engine's columns."""
    seconds, resident = [s.seconds for s in starts], starts[0].resident
    figures = {"seconds": median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds)}
    if resident is not None:
        figures["rss_gb"] = median(s.resident for s in starts) / 1e9
    return {f"{prefix}{key}": round(value, 3) for key, value in figures.items()}


def measure(args) -> list[dict]:
    """A row for each form of the peer, or one without a peer."""
    facts = compare.facts(args) | {"test": f"first token {N_PROMPT}", "rounds": args.rounds}
    kinds = ["rgpu"] + (["not repacked"] if args.vs else []) + (["repacked"] if args.vs and not args.no_repack else [])
    patience, model = Patience(args.wait), args.model.resolve()
    ours, *peers = compare.alternate([partial(start, kind, model, args.threads, patience) for kind in kinds], args.rounds)
    rows = []
    for peer in peers or [[]]:
        row = dict.fromkeys(COLUMNS, "") | facts | side("", ours)
        row["others_cpu"] = machine.others_cpu([s.interval for s in (*ours, *peer)])
        if peer:
            row |= side("peer_", peer) | {"peer": peer[0].name, "peer_note": peer[0].note}
            row["ratio"] = round(row["peer_seconds"] / row["seconds"], 3)  # of the rates, as in the other tables
        rows.append(row)
    return rows


def table(row: dict) -> str:
    """A row for people."""

    def figures(prefix: str) -> str:
        seconds, least, most = (row[f"{prefix}seconds{end}"] for end in ("", "_min", "_max"))
        return f"{seconds} s ({least} to {most}), {row[f'{prefix}rss_gb']} GB resident"

    peer = f"; {row['peer']} {row['peer_note']} {figures('peer_')}; ratio {row['ratio']}" if row["peer"] else ""
    return f"{row['model']}, {row['test']}: {figures('')}{peer}; CPUs used by others: {row['others_cpu']}"


def main(argv=None) -> int:
    args = compare.parse(compare.parser("first_token", __doc__), argv)
    try:
        rows = measure(args)
        for row in rows:
            print(table(row), file=sys.stderr)
            compare.append(row, args.results / "first_token.csv")
    except (RgpuError, OSError) as error:
        print(line(error), file=sys.stderr)
        return 1
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
