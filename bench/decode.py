"""`python -m bench.decode MODEL [--vs llama.cpp]`: tokens per second one by one, at several lengths of context.

The tokens are given, so that both engines do the same work. A step is bound by the bytes it reads: these are counted from
the file, and their rate is compared with how fast this machine's memory can be read in the same minutes.
"""

import sys
from statistics import median

from rgpu.gguf import GGUFFile, names
from rgpu.state import KVCache, State

from . import compare
from .compare import Comparison
from .machine import Interval, read_rate


def weight_bytes(file: GGUFFile, hp) -> int:
    """Weights that a step reads: all dense tensors, and of the experts the share that is used."""
    total = 0.0
    for name, info in file.tensors.items():
        block = names.parse_block(name)
        if block is not None and block[0] >= hp.n_layer:
            continue  # the block of multi-token prediction
        if name == "token_embd.weight" and "output.weight" in file.tensors:
            continue  # of which a step reads one row; where there is no output.weight, this is the output too
        total += info.nbytes * hp.n_expert_used / hp.n_expert if names.is_expert(name) else info.nbytes
    return round(total)


def state_bytes(state: State, n_past: float) -> int:
    """What a step reads and writes of its session's memory after `n_past` tokens: KV rows, recurrent state twice."""
    caches = [layer for layer in state.layers if isinstance(layer, KVCache)]
    row = sum(cache.k[0].nbytes + cache.v[0].nbytes for cache in caches)
    return round(n_past * row) + 2 * sum(array.nbytes for array in state.recurrent)


def frontier(comparison: Comparison, context: int) -> dict:
    """The row of one context length, with bytes per token and the share of the read rate that they come to."""
    args, ours = comparison.args, comparison.engines[0]
    steps = compare.tokens(args.steps + 1, comparison.n_vocab, seed=1)
    reads = []

    def work(engine) -> Interval:
        engine.back()
        engine.step(steps[:1])  # untimed: threads awake, caches as they are between two steps
        with Interval() as interval:
            engine.step(steps[1:])
        return interval

    intervals = comparison.alternate(work, after=lambda: reads.append(read_rate(args.model, args.threads)))
    row = comparison.row("decode", context, args.steps, intervals)
    state = state_bytes(ours.session.state, context + 1 + args.steps / 2)
    n_bytes, read = weight_bytes(comparison.file, ours.engine.hparams) + state, median(rate for rate, _ in reads)
    row |= {"gb_per_token": round(n_bytes / 1e9, 4), "state_gb_per_token": round(state / 1e9, 4)}  # the former has both
    row |= {"read_gb_s": round(read / 1e9, 1), "read_from": reads[0][1], "share": round(row["tok_s"] * n_bytes / read, 3)}
    return row | {"peer_share": round(row["peer_tok_s"] * n_bytes / read, 3) if row["peer"] else ""}


def main(argv=None) -> int:
    p = compare.parser("decode", __doc__)
    p.add_argument("--contexts", type=compare.number(0), nargs="+", default=[0], metavar="N", help="tokens before (default 0)")
    p.add_argument("--steps", type=compare.number(1), default=64, help="timed tokens (default %(default)s)")
    args = compare.parse(p, argv)
    return compare.run(args, "decode", max(args.contexts) + args.steps + 1, frontier)


if __name__ == "__main__":
    sys.exit(main())
