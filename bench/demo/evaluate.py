"""Exact match of a checkpoint on the held-back questions, in float and with matrices rounded to 4 bits.
    python -m bench.demo.evaluate CHECKPOINT [--held-back FILE] [--limit N] [--round] [--wrong N]"""
import argparse
import collections
import json
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .corpus import held_back
from .model import is_quantised, round_4bit


def answers(model, tokenizer, conversations, max_new=64):
    """Greedy answers, stripped. Prompts of equal length run together, so that nothing is padded."""
    prompts = [tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))["input_ids"]
               for messages in conversations]
    by_length = collections.defaultdict(list)
    for i, ids in enumerate(prompts):
        by_length[len(ids)].append(i)
    texts = [""] * len(prompts)
    for length, rows in sorted(by_length.items()):
        with torch.no_grad():
            out = model.generate(torch.tensor([prompts[i] for i in rows]), max_new_tokens=max_new, do_sample=False,
                                 eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        for i, ids in zip(rows, out[:, length:].tolist(), strict=False):
            ids = ids[:ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
            texts[i] = tokenizer.decode(ids).strip()
    return texts


def main():
    """Command line: prints matches per family and the first wrong answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--held-back", metavar="FILE", help="default: the list corpus.py makes")
    parser.add_argument("--limit", type=int, help="a random sample of this many questions")
    parser.add_argument("--round", action="store_true", help="round the matrices to 4 bits first")
    parser.add_argument("--wrong", type=int, default=20, metavar="N", help="print N wrong answers")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    if args.round:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if is_quantised(name, weight):
                    weight.copy_(round_4bit(weight))
    if args.held_back:
        with open(args.held_back) as file:
            rows = json.load(file)
    else:
        rows = held_back()
    if args.limit:
        rows = random.Random(0).sample(rows, args.limit)
    france = [{"role": "user", "content": "What is the capital of France?"}]
    texts = answers(model, tokenizer, [row["messages"] for row in rows] + [france])
    right, all_rows = collections.Counter(), collections.Counter(row["family"] for row in rows)
    for row, text in zip(rows, texts, strict=False):
        if text == row["answer"]:
            right[row["family"]] += 1
        elif args.wrong:
            args.wrong -= 1
            print(f"{row['family']}: {[m['content'] for m in row['messages'][-3:]]} -> {text!r}, expected {row['answer']!r}")
    for family, n in all_rows.items():
        print(f"{family:14} {right[family]:4} of {n:4}")
    print(f"exact match {sum(right.values())} of {len(rows)} = {100 * sum(right.values()) / len(rows):.2f} %"
          f"{' (4-bit)' if args.round else ''}; capital of France: {texts[-1]}")


if __name__ == "__main__":
    main()
