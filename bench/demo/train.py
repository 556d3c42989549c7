"""Trains the demo model on CPU for a given wall-clock time and writes a transformers checkpoint.
    python -m bench.demo.train OUT --minutes 60 --seed 0
Workers are processes of one thread each that average their weights every few steps; the schedule follows the clock, so a busy
machine trains less but ends on time. Run again with the same OUT to resume."""
import argparse
import contextlib
import json
import math
import os
import random
import shutil
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn import functional as F
from transformers import AutoTokenizer
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import load_balancing_loss_func

from .corpus import Corpus
from .model import is_quantised, make_model, make_tokenizer, round_4bit, use_fast_training

WARMUP, ROUNDING_FROM, OTHER_WEIGHT, BALANCE, MAX_TOKENS, SYNC = 0.03, 0.55, 0.03, 0.01, 384, 4


def encode(tokenizer, messages):
    """Token ids and loss weights: 1 on answers and their <|im_end|>, OTHER_WEIGHT elsewhere."""
    ids, weights = [], []
    for message in messages:
        head, body, tail = (tokenizer.backend_tokenizer.encode(text).ids for text in (
            f"<|im_start|>{message['role']}\n", message["content"] + "<|im_end|>", "\n"))
        answer = 1.0 if message["role"] == "assistant" else OTHER_WEIGHT
        ids += head + body + tail
        weights += [OTHER_WEIGHT] * len(head) + [answer] * len(body) + [OTHER_WEIGHT] * len(tail)
    return ids[:MAX_TOKENS], weights[:MAX_TOKENS]


def batches(tokenizer, seed, n_tokens):
    """Endless (ids, weights) of [rows, length]: one conversation per row from position 0, rows of like length together."""
    corpus, rng, pad = Corpus(seed), random.Random(seed), tokenizer.pad_token_id
    while True:
        pool = [encode(tokenizer, corpus.conversation()[0]) for _ in range(1024)]
        pool.sort(key=lambda row: len(row[0]) + rng.random())
        groups, at = [], 0
        while at < len(pool):
            # rows are sorted: the length of the last row of the group decides; find the largest group that fits
            n = 1
            while at + n < len(pool) and (n + 1) * _padded(len(pool[at + n][0])) <= n_tokens:
                n += 1
            groups.append(pool[at:at + n])
            at += n
        rng.shuffle(groups)
        for group in groups:
            length = _padded(max(len(ids) for ids, _ in group))
            yield (torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in group]),
                   torch.tensor([weights + [0.0] * (length - len(ids)) for ids, weights in group]))


def _padded(n):
    return -(-n // 16) * 16


def losses(model, ids, weights):
    """(weighted cross entropy, load balance loss, mean cross entropy of answers alone) of one batch."""
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids, use_cache=False, output_router_logits=True)
    target = weights[:, 1:].reshape(-1)
    each = F.cross_entropy(out.logits[:, :-1].float().reshape(-1, out.logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none")
    config = model.config
    balance = load_balancing_loss_func(out.router_logits, config.num_experts, config.num_experts_per_tok, (weights > 0).float())
    answer = target == 1
    return (each * target).sum() / target.sum(), balance, each.detach()[answer].mean()


class RoundedWeights:
    """For the time of a `with`, every matrix holds its 4-bit rounding: gradients are taken there (straight through)."""

    def __init__(self, model):
        self.weights = [weight for name, weight in model.named_parameters() if is_quantised(name, weight)]

    def __enter__(self):
        self.kept = [weight.data for weight in self.weights]
        for weight in self.weights:
            weight.data = round_4bit(weight.data)

    def __exit__(self, *error):
        for weight, kept in zip(self.weights, self.kept, strict=False):
            weight.data = kept


def recommend_greedy(path):
    """Facts have one answer: temperature 0, which transformers would not write, becomes general.sampling.temp of the GGUF."""
    with open(path) as f:
        config = json.load(f)
    with open(path, "w") as f:
        json.dump(config | {"temperature": 0.0}, f, indent=2)


def save(out, model, tokenizer, optimizer, **state):
    """Writes the checkpoint beside `out`, then swaps it in; the optimizer goes to OUT.state.pt."""
    new, old = out + ".new", out + ".old"
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(new)
    recommend_greedy(os.path.join(new, "generation_config.json"))
    tokenizer.save_pretrained(new)
    torch.save({"optimizer": optimizer.state_dict(), **state}, out + ".state.pt.new")
    if os.path.isdir(out):
        os.rename(out, old)
    os.rename(new, out)
    os.replace(out + ".state.pt.new", out + ".state.pt")
    shutil.rmtree(old, ignore_errors=True)


def rate(progress):
    """Learning rate factor: linear warmup, then a cosine down to 0."""
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP)))


def average(params, elapsed):
    """Averages the parameters over the workers; returns the average of their clocks, so that all agree on the schedule."""
    flat = torch.cat([param.data.reshape(-1) for param in params] + [torch.tensor([elapsed])])
    if dist.get_world_size() > 1:
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
    for param, mean in zip(params, flat.split([param.numel() for param in params] + [1]), strict=False):
        param.data.copy_(mean.view_as(param))
    return float(flat[-1])


def train_step(model, batch, rounded, round_now):
    """Gradients of one batch, at the rounded weights if `round_now`; returns (answer loss, balance)."""
    with rounded if round_now else contextlib.nullcontext():
        loss, balance, answer = losses(model, *batch)
        (loss + BALANCE * balance).backward()
    return float(answer), float(balance.detach())


def work(rank, args):
    """One worker: the whole training loop."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{os.path.abspath(args.out)}.meet", rank=rank, world_size=args.workers)
    torch.manual_seed(args.seed)
    use_fast_training()
    resumed = os.path.isdir(args.out)
    source = args.out if resumed else args.out + ".tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = make_model(tokenizer)
    if resumed:
        model = type(model).from_pretrained(args.out, dtype=torch.float32)
    model.train()
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": args.decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    start, step, seen = time.time(), 0, 0
    if resumed:
        state = torch.load(args.out + ".state.pt")
        optimizer.load_state_dict(state["optimizer"])
        start, step, seen = start - state["elapsed"], state["step"], state.get("seen", 0)
    data = batches(tokenizer, f"{args.seed}/{rank}/{step}", args.tokens)
    rng, rounded = random.Random(step), RoundedWeights(model)       # same draws in every worker
    elapsed, saved, shown, total = time.time() - start, time.time(), time.time(), []
    while elapsed < 60 * args.minutes:
        progress = elapsed / (60 * args.minutes)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(progress)
        for _ in range(SYNC):
            batch = next(data)
            total.append(train_step(model, batch, rounded, progress > ROUNDING_FROM and rng.random() < 0.6))
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, seen = step + 1, seen + int((batch[1] > 0).sum()) * args.workers
        elapsed = average(params, time.time() - start)
        if rank == 0 and len(total) >= 25 * SYNC:
            mean = [sum(column) / len(column) for column in zip(*total, strict=False)]
            print(f"step {step} {elapsed / 60:.1f} min answer loss {mean[0]:.4f} balance {mean[1]:.3f} "
                  f"lr {args.lr * rate(progress):.2e} {seen / 1e6:.2f} M tokens "
                  f"{len(total) / (time.time() - shown):.2f} steps/s", flush=True)
            total, shown = [], time.time()
        if rank == 0 and time.time() - saved > 300:
            save(args.out, model, tokenizer, optimizer, elapsed=elapsed, step=step, seen=seen)
            saved = time.time()
    if rank == 0:
        save(args.out, model, tokenizer, optimizer, elapsed=elapsed, step=step, seen=seen)
        print(f"done: {step} steps, {seen / 1e6:.2f} M tokens, {elapsed / 60:.1f} minutes", flush=True)


def main():
    """Command line: trains the tokenizer, then starts the workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=768, help="padded tokens per worker and step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    args = parser.parse_args()
    if os.path.exists(args.out + ".meet"):          # where the workers find each other; left over from a run that was stopped
        os.remove(args.out + ".meet")
    if not os.path.isdir(args.out):
        corpus = Corpus(args.seed + 1)
        texts = ["".join(m["content"] + "\n" for m in corpus.conversation()[0]) + "system\nuser\nassistant\n"
                 for _ in range(20000)]
        make_tokenizer(texts).save_pretrained(args.out + ".tokenizer")
    multiprocessing.spawn(work, (args,), nprocs=args.workers)


if __name__ == "__main__":
    main()
