"""`python -m bench.residency [--trace FILE.npz]`: what policies make of the same slots, beside LRU and Belady's optimum.

Routing is generated (sets A, B and C, with a change of topic) or recorded. Figures are hit rates in % of the routed experts: cold
(from an empty arena), warm, and after the change; experts moved per token, and their bytes. Layer by layer in the CSV.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rgpu.errors import RgpuError, line
from rgpu.residency.policy import POLICIES
from rgpu.residency.trace import SETS, RoutingTrace

from . import machine
from .belady import belady, layer_lru
from .compare import RESULTS, append, number
from .replay import Replay, profile, replay
from .residency_bars import bars

COLD = 100  # tokens from the start
WARM = 300  # tokens after which all is counted as warm; a static profile is learned from them
TOPIC = 200  # tokens after a change of topic
SLOTS = [4, 24, 45, 48, 64, 70, 96]
MB = 1.905  # of an expert: the mean of Qwen3.6-35B-A3B at Q4_K_M
USED_ONLY = "used only"  # rotary without near misses
HEAD = "slots policy       cold   warm  new topic  moved/token      MB   us/step  layer 0  least, most of the others"


@dataclass
class Result:
    """One policy on one trace with some slots per layer; rates in %, None where the trace has no such part."""

    source: str
    slots: int
    policy: str
    cold: float | None
    warm: float
    changed: float | None
    moved: float  # experts per token, warm
    mb: float
    us: float | None  # touch and turn, the median of the warm steps
    layers: list[float]  # warm
    replay: Replay

    def row(self) -> dict:
        """What is kept of it."""
        return {key: value for key, value in vars(self).items() if key != "replay"}

    def __str__(self) -> str:
        rates = "".join("      -" if rate is None else f"{rate:7.1f}" for rate in (self.cold, self.warm, self.changed))
        us = "-" if self.us is None else f"{self.us:.0f}"
        others = self.layers[1:] or self.layers
        return (
            f"{self.slots:5} {self.policy:9}{rates}    {self.moved:12.1f} {self.mb:7.1f} {us:>9}"
            f"  {self.layers[0]:7.1f}  {min(others):.1f}, {max(others):.1f}"
        )


def warm_from(change: int) -> int:
    """The first token that counts as warm, of those before another topic or the end."""
    return min(WARM, change // 2)


def traces(args: argparse.Namespace) -> Iterator[tuple[str, RoutingTrace, int]]:
    """(name, trace, the token at which another topic begins: the end if none does)."""
    if args.trace:
        trace = RoutingTrace.load(args.trace)
        yield args.trace.stem, trace, len(trace.ids)
        return
    for name in args.sets:
        change = args.tokens - TOPIC
        yield name, RoutingTrace.generate(args.tokens, set=name, seed=args.seed, topics=(change,)), change


def result(source: str, slots: int, policy: str, change: int, replayed: Replay) -> Result:
    """The figures of a replay whose topic changes at the token `change`."""
    hits, warm = replayed.hits, slice(warm_from(change), change)

    def rate(tokens: slice) -> float:
        return round(100 * float(hits[tokens].mean()), 2)

    moved = float(replayed.moved[warm].mean())
    return Result(
        source=source,
        slots=slots,
        policy=policy,
        cold=rate(slice(0, COLD)) if policy != "static" else None,  # its profile has seen these tokens
        warm=rate(warm),
        changed=rate(slice(change, change + TOPIC)) if change < len(hits) else None,
        moved=round(moved, 2),
        mb=round(MB * moved, 1),
        us=None if replayed.seconds is None else round(1e6 * float(np.median(replayed.seconds[warm])), 1),
        layers=(100 * hits[warm].mean(axis=(0, 2))).round(1).tolist(),
        replay=replayed,
    )


def measure(name: str, trace: RoutingTrace, change: int, args: argparse.Namespace) -> Iterator[Result]:
    """All policies with all numbers of slots on one trace."""
    _, n_layer, _ = trace.ids.shape
    known = profile(trace, slice(0, warm_from(change)))
    for slots, of_layers in zip(args.slots, layer_lru(trace, args.slots), strict=True):
        yield result(name, slots, "layer lru", change, of_layers)
        yield result(name, slots, "belady", change, belady(trace, slots * n_layer))
        for kind in args.policies:
            policy = POLICIES[kind](n_layer, trace.n_expert)
            if kind == "static":
                policy.restore(known)
            # LRU at its best: rotary must beat what it could be, not what a hand makes of it.
            yield result(name, slots, kind, change, replay(trace, policy, slots * n_layer, everywhere=kind == "lru"))
        if "rotary" in args.policies and trace.near is not None:
            blind, policy = replace(trace, near=None), POLICIES["rotary"](n_layer, trace.n_expert)
            yield result(name, slots, USED_ONLY, change, replay(blind, policy, slots * n_layer))


def parse(argv) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m bench.residency", description=__doc__.split("\n\n")[0])
    p.add_argument("--trace", type=Path, metavar="FILE.npz", help="replay this recorded trace instead of generated ones")
    p.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="default: %(default)s")
    p.add_argument("--tokens", type=number(TOPIC + 100), default=1100, help="of a set (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the generated routing (default %(default)s)")
    p.add_argument("--slots", type=number(1), nargs="+", default=SLOTS, metavar="N", help="per layer (default: %(default)s)")
    p.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES), help="default: %(default)s")
    p.add_argument("--png", action="store_true", help="draw residency.png and residency_map.png beside the CSV (extra `plot`)")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the CSV is kept (default bench/results)")
    return p.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    results: list[Result] = []
    try:
        if args.png:
            from . import residency_plot
        facts = {"date": time.strftime("%Y-%m-%d"), "machine": machine.name(), "commit": machine.commit()}
        for name, trace, change in traces(args):
            n_tokens, n_layer, k = trace.ids.shape
            title = f"\n{trace.source}: {n_tokens} tokens, {n_layer} layers, {k} of {trace.n_expert} experts"
            print(title, HEAD, sep="\n", file=sys.stderr)
            for each in measure(name, trace, change, args):
                results.append(each)
                print(each, file=sys.stderr)
                row = each.row()
                append(facts | row | {"layers": " ".join(map(str, row["layers"]))}, args.results / "residency.csv")
        checked = bars({(each.source, each.slots, each.policy): each for each in results})
        print("", *checked, sep="\n", file=sys.stderr)
        if args.png:
            residency_plot.draw(results, args.results)
    except ImportError:
        print("error: matplotlib is not installed: pip install '.[plot]'", file=sys.stderr)
        return 1
    except (RgpuError, OSError) as error:
        print(line(error), file=sys.stderr)
        return 1
    print(json.dumps({"results": [each.row() for each in results], "bars": [bar._asdict() for bar in checked]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
