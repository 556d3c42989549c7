"""`python -m bench.demo.ask MODEL.gguf`: asks the engine every held-back question; exact matches by family, JSON last."""

import argparse
import json
import sys
from collections import Counter

from rgpu import Engine, SamplingParams

from .corpus import held_back

GREEDY = SamplingParams(temperature=0, max_tokens=64)


def ask(engine: Engine, conversations: list[list[dict]]) -> list[str]:
    """Greedy answers, stripped, each from an empty session."""
    session, answers = engine.session(), []
    for messages in conversations:
        session.reset()
        answers.append("".join(piece.text for piece in session.generate(messages, GREEDY)).strip())
    return answers


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.demo.ask", description=__doc__)
    p.add_argument("model")
    p.add_argument("--wrong", type=int, default=10, metavar="N", help="print N wrong answers (default %(default)s)")
    args = p.parse_args(argv)
    cases = held_back()
    with Engine.open(args.model) as engine:
        answers = ask(engine, [case["messages"] for case in cases])
    asked, right = Counter(case["family"] for case in cases), Counter()
    for case, answer in zip(cases, answers, strict=True):
        if answer == case["answer"]:
            right[case["family"]] += 1
        elif args.wrong:
            args.wrong -= 1
            print(f"{case['messages'][-1]['content']!r}: {answer!r}, not {case['answer']!r}", file=sys.stderr)
    for family, n in sorted(asked.items()):
        print(f"{family:12} {right[family]:4} of {n:4}", file=sys.stderr)
    print(json.dumps({"model": args.model, "asked": len(cases), "exact": right.total(), "share": right.total() / len(cases)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
