"""`python -m bench.prefill MODEL [--vs llama.cpp]`: tokens per second of a prompt, alone or behind a context.

The prompt is evaluated in one call, with logits of its last token only.
"""

import sys

from . import compare
from .compare import Comparison
from .machine import Interval


def frontier(comparison: Comparison, context: int) -> dict:
    """The row of one context length."""
    n = comparison.args.tokens
    prompt = compare.tokens(n, comparison.n_vocab, seed=1)

    def work(engine) -> Interval:
        engine.back()
        with Interval() as interval:
            engine.eval(prompt)
        return interval

    return comparison.row("prefill", context, n, comparison.alternate(work))


def main(argv=None) -> int:
    p = compare.parser("prefill", __doc__)
    p.add_argument("--contexts", type=compare.number(0), nargs="+", default=[0], metavar="N", help="tokens before (default 0)")
    p.add_argument("--tokens", type=compare.number(1), default=512, help="of the prompt (default %(default)s)")
    args = compare.parse(p, argv)
    return compare.run(args, "prefill", max(args.contexts) + args.tokens, frontier)


if __name__ == "__main__":
    sys.exit(main())
