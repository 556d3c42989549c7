"""What bench.decode and bench.prefill share: their options, two engines that take turns, one row per context.

A machine's speed drifts by a third within minutes, so both engines run in one process, alternating, and the medians are
compared. Rows go to a CSV in bench/results/, a table to stderr; the last line of stdout is the rows as JSON.
"""

import argparse
import csv
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from gguf import LlamaFileType

from rgpu.errors import RgpuError, line
from rgpu.gguf import GGUFFile, names
from rgpu.ops.cpu import physical_cores

from . import machine
from .engines import LlamaCpp, Rgpu
from .machine import Interval, Patience

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "date machine commit model type threads test context tok_s tok_s_min tok_s_max peer peer_note peer_tok_s peer_tok_s_min "
    "peer_tok_s_max ratio rounds others_cpu peer_others_cpu rss_gb"
).split()


def number(least: int) -> Callable[[str], int]:
    """An option's type: a whole number of at least that much."""

    def parse(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return parse


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The options that every comparison has."""
    p = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=doc.split("\n\n")[0])
    p.add_argument("model", type=Path)
    p.add_argument("--threads", type=number(1), default=physical_cores(), help="default: the physical cores, here %(default)s")
    p.add_argument("--rounds", type=number(1), default=5, help="medians of so many, behind one uncounted (default %(default)s)")
    p.add_argument("--vs", choices=["llama.cpp"], help="run this engine too, alternating")
    p.add_argument("--no-repack", action="store_true", help="llama.cpp reads the weights as they are (default for files > RAM/3)")
    p.add_argument("--wait", type=float, default=60, metavar="S", help="seconds to wait in all for an idle machine (default 60)")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the CSV is kept (default bench/results)")
    return p


def parse(p: argparse.ArgumentParser, argv) -> argparse.Namespace:
    args = p.parse_args(argv)
    if args.no_repack and not args.vs:
        p.error("--no-repack is about llama.cpp: add --vs llama.cpp")
    return args


def repacks(model: Path) -> bool:
    """Whether llama.cpp repacks unless told otherwise: the copy must fit beside the file and ours."""
    return model.stat().st_size <= machine.memory() / 3


def file_type(path: Path) -> str:
    """What the file says its mix of types is, as Q4_K_M; else the types of its experts."""
    with GGUFFile(path) as file:
        try:
            return LlamaFileType(file.metadata["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except (KeyError, ValueError):
            return "+".join(sorted({info.quant for name, info in file.tensors.items() if names.is_expert(name)}))


def facts(args: argparse.Namespace) -> dict:
    """The columns that say what is measured, and on what."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine.name(),
        "commit": machine.commit(),
        "model": args.model.name,
        "type": file_type(args.model),
        "threads": args.threads,
    }


def tokens(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    """Random token ids: the experts of a random text are as spread as they get."""
    return random.Random(seed).choices(range(n_vocab), k=n)


def alternate(turns: list[Callable], rounds: int, after: Callable[[], None] | None = None) -> list[list]:
    """Every turn's results over the rounds: a b a b a b; a round before the first is not counted, nor is what `after` does."""
    results = [[] for _ in turns]
    for i in range(rounds + 1):
        for mine, turn in zip(results, turns, strict=True):
            result = turn()
            if i:
                mine.append(result)
        if after:
            after()
    return results


class Comparison:
    """The engines of a command line, open, with room for `n_ctx` tokens; engines[0] is ours, the peer may follow."""

    def __init__(self, args: argparse.Namespace, n_ctx: int):
        self.args, self.patience = args, Patience(args.wait)
        self.facts = facts(args)
        self.engines: list = [Rgpu(args.model, args.threads, n_ctx)]
        self.file = self.engines[0].engine.file
        self.n_vocab = self.engines[0].engine.hparams.n_vocab
        if args.vs:
            self.engines.append(LlamaCpp(args.model, args.threads, n_ctx, repacks(args.model) and not args.no_repack))
        self.context = tokens(n_ctx, self.n_vocab)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    def go_to(self, context: int) -> None:
        """Bring every engine to the same `context` tokens, untimed; contexts must ascend."""
        for engine in self.engines:
            engine.back()
            if context > engine.n_past:
                engine.eval(self.context[engine.n_past : context])
            engine.keep()

    def alternate(self, work: Callable[[object], Interval], after: Callable[[], None] | None = None) -> list[list[Interval]]:
        """The timed part of `work(engine)`, which starts at the kept position, for every engine and counted round."""

        def turn(engine):
            self.patience.wait()
            return work(engine)

        return alternate([lambda engine=engine: turn(engine) for engine in self.engines], self.args.rounds, after)

    def row(self, test: str, context: int, n_tokens: int, intervals: list[list[Interval]]) -> dict:
        """One line of the table, in the order of COLUMNS; what was not measured is empty."""
        row = dict.fromkeys(COLUMNS, "") | self.facts
        row |= {"test": f"{test} {n_tokens}", "context": context, "rounds": self.args.rounds}
        for prefix, engine, mine in zip(("", "peer_"), self.engines, intervals, strict=False):
            rates = [n_tokens / interval.seconds for interval in mine]
            figures = {"tok_s": median(rates), "tok_s_min": min(rates), "tok_s_max": max(rates)}
            row |= {f"{prefix}{key}": round(value, 2) for key, value in figures.items()}
            row[f"{prefix}others_cpu"] = machine.others_cpu(mine)
            if prefix:
                row |= {"peer": engine.name, "peer_note": engine.note, "ratio": round(row["tok_s"] / row["peer_tok_s"], 3)}
        # With two engines in the process nobody can say whose pages are resident.
        if len(self.engines) == 1 and (resident := machine.peak_resident()):
            row["rss_gb"] = round(resident / 1e9, 3)
        return row


def table(row: dict) -> str:
    """A row for people."""
    text = f"{row['test']} at {row['context']}: {row['tok_s']} tok/s ({row['tok_s_min']} to {row['tok_s_max']})"
    if row["peer"]:
        text += f", {row['peer']} {row['peer_tok_s']} ({row['peer_tok_s_min']} to {row['peer_tok_s_max']}), ratio {row['ratio']}"
    if row.get("share"):
        text += f"; {row['gb_per_token']:.3f} GB/token, {row['share']:.0%}"
        text += f" and {row['peer_share']:.0%}" if row["peer"] else ""
        text += f" of {row['read_gb_s']} GB/s"
    if row["rss_gb"]:
        text += f"; {row['rss_gb']} GB resident"
    busy = [str(row[key]) for key in ("others_cpu", "peer_others_cpu") if row[key] != ""]
    return text + (f"; CPUs used by others: {', '.join(busy)}" if busy else "")


def append(row: dict, path: Path) -> None:
    """Add a row to a CSV; raises RgpuError if the columns of the file are others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as f:
        f.seek(0)
        header = next(csv.reader(f), None)
        if header not in (None, [*row]):
            raise RgpuError(f"{path} has other columns than {', '.join(row)}: move it away")
        writer = csv.DictWriter(f, [*row], lineterminator="\n")
        if header is None:
            writer.writeheader()
        writer.writerow(row)


def run(args: argparse.Namespace, name: str, n_ctx: int, frontier: Callable[[Comparison, int], dict]) -> int:
    """Measure at each of `args.contexts`: `frontier(comparison, context)` is a row, which is kept at once. The exit status."""
    rows = []
    try:
        comparison = Comparison(args, n_ctx)
        try:
            title = "{model} ({type}), {threads} threads, {machine}, commit {commit}".format(**comparison.facts)
            title += "".join(f"; {peer.name} {peer.note}" for peer in comparison.engines[1:])
            print(title, file=sys.stderr)
            for context in sorted(set(args.contexts)):
                comparison.go_to(context)
                rows.append(frontier(comparison, context))
                print(table(rows[-1]), file=sys.stderr)
                append(rows[-1], args.results / f"{name}.csv")
        finally:
            comparison.close()
    except (RgpuError, OSError) as error:
        print(line(error), file=sys.stderr)
        return 1
    print(json.dumps(rows))
    return 0
