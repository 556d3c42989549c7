"""`python -m bench.speed MODEL`: prefill and decode rates, beside llama.cpp on the same file, threads and token counts.

The two run in one process, alternating, so that a busy machine slows both; medians over the rounds are compared. Decode starts
from a short prompt. Rows go to bench/results/speed.csv; the last line is JSON. llama.cpp comes through llama-cpp-python (extra
`bench`), which reads stock GGUFs only: give it one, we open both kinds.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

from rgpu import Engine, EngineConfig

RESULTS = Path(__file__).parent / "results" / "speed.csv"
COLUMNS = "date machine commit model type threads test tok_s peer peer_tok_s ratio".split()
WARM_UP = 8  # tokens before decode is timed


class Ours:
    name = "rgpu"

    def __init__(self, path: str, threads: int, n_ctx: int):
        self.engine = Engine(EngineConfig(path, threads=threads, n_ctx=n_ctx))
        self.session = self.engine.session()

    def reset(self):
        self.session.reset()

    def eval(self, tokens):
        return self.session.forward(tokens)


class LlamaCpp:
    name = "llama.cpp"

    def __init__(self, path: str, threads: int, n_ctx: int):
        from llama_cpp import Llama

        self.llama = Llama(str(path), n_ctx=n_ctx, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def reset(self):
        self.llama.reset()
        self.llama._ctx.kv_cache_clear()

    def eval(self, tokens):
        self.llama.eval(tokens)


def prefill(runner, n: int) -> float:
    """Tokens per second over a prompt of n random tokens."""
    tokens = prompt(n)
    runner.reset()
    began = time.perf_counter()
    runner.eval(tokens)
    return n / (time.perf_counter() - began)


def decode(runner, n: int) -> float:
    """Tokens per second over n single steps. The tokens are given, so that both engines do the same work."""
    runner.reset()
    runner.eval(prompt(WARM_UP))
    tokens = prompt(n, seed=1)
    began = time.perf_counter()
    for token in tokens:
        runner.eval([token])
    return n / (time.perf_counter() - began)


def prompt(n: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 400, n)]


def measure(runners: list, test, n: int, rounds: int) -> list[float]:
    """Median rate of each runner; the rounds alternate between them, and one before is not counted."""
    rates = [[] for _ in runners]
    for round in range(rounds + 1):
        for mine, runner in zip(rates, runners, strict=True):
            rate = test(runner, n)
            if round:
                mine.append(rate)
    return [median(mine) for mine in rates]


def commit() -> str:
    """The commit that is measured; "unknown" outside a clone."""
    try:
        git = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def machine() -> str:
    """The processor's name and what this process may use of it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), name)
    return name


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__.split("\n\n")[0])
    p.add_argument("model", type=Path)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--prefill", type=int, default=512, metavar="N", help="tokens of the prompt (default %(default)s)")
    p.add_argument("--decode", type=int, default=64, metavar="N", help="single steps (default %(default)s)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--vs", choices=["llama.cpp"], help="run this engine too, alternating")
    args = p.parse_args(argv)
    n_ctx = max(args.prefill, args.decode + WARM_UP) + 8
    runners = [Ours(args.model, args.threads, n_ctx)]
    if args.vs:
        runners.append(LlamaCpp(args.model, args.threads, n_ctx))
    kind = "+".join(sorted(runners[0].engine.types["experts"]))
    rows = []
    for test, n in ((decode, args.decode), (prefill, args.prefill)):
        rates = measure(runners, test, n, args.rounds)
        peer = rates[1] if args.vs else None
        values = [time.strftime("%Y-%m-%d"), machine(), commit(), args.model.name, kind, args.threads, f"{test.__name__} {n}"]
        values += [round(rates[0], 2), args.vs or "", round(peer, 2) if peer else "", round(rates[0] / peer, 3) if peer else ""]
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        print("  ".join(f"{key} {rows[-1][key]}" for key in COLUMNS[3:]), file=sys.stderr)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
