"""`python -m bench.kernels`: every verb that costs time, for every type it knows, in GB/s and percent of the read bandwidth.

Decode rows read matrices that no cache holds; prefill rows say how many multiply-adds a second 512 tokens get. Shapes are those
of Qwen3.6-35B-A3B. Rows go to bench/results/kernels.csv; the last line is JSON.
"""

import argparse
import json
import sys
import time
from statistics import median

import numpy as np

from rgpu.engine import KV_TYPES, builtin_model
from rgpu.ops import Bank, Needs, Slots, Weight
from rgpu.ops.cpu import CpuOps
from rgpu.quants import TYPES
from rgpu.state import KVCache
from tests.tiny import random_blocks

from . import machine
from .compare import RESULTS, append

N_EMBD, N_FF, N_EXPERT, K = 2048, 512, 256, 8
N_HEAD, N_HEAD_KV, HEAD = 16, 2, 256
N_K_HEAD, N_V_HEAD, D = 16, 32, 128
LARGE = 1 << 29  # bytes of a matrix that no cache holds
PATTERN = 1 << 22  # random bytes, then repeated
PREFILL, CONTEXT = 512, 8192


def stored(quant: str, nbytes: int) -> np.ndarray:
    """Random blocks of a type, at least `nbytes` bytes of whole rows of both lengths used here."""
    tag, rng = TYPES[quant], np.random.default_rng(0)
    if tag.block > 1:
        pattern = random_blocks(rng, quant, PATTERN // tag.nbytes, 0.02).reshape(-1)
    else:
        values = rng.standard_normal(PATTERN // tag.nbytes, np.float32)
        pattern = values.view(np.uint8) if tag.nbytes == 4 else (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return np.resize(pattern, nbytes)


def seconds(ops, key, step, rounds: int) -> float:
    """Median time of a recorded step."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        ops.replay(key, step)
        times.append(time.perf_counter() - began)
    return median(times[1:])  # the first records


def products(ops, quant: str):
    """(op, tokens, bytes of weights, multiply-adds, step) of the matrix product and the experts of one type."""
    tag, rng = TYPES[quant], np.random.default_rng(1)
    row = N_EMBD // tag.block * tag.nbytes
    rows = LARGE // row // 64 * 64
    weights = stored(quant, rows * row)
    x = rng.standard_normal((PREFILL, N_EMBD), np.float32)
    out = np.zeros((PREFILL, 2 * N_EMBD), np.float32)
    wide = np.zeros((1, rows), np.float32)
    large, small = (Weight(tag, (n, N_EMBD), weights[: n * row]) for n in (rows, 2 * N_EMBD))
    yield "matmul", 1, large.data.nbytes, rows * N_EMBD, lambda: ops.matmul(wide, large, x[:1])
    yield "matmul", PREFILL, small.data.nbytes, PREFILL * small.data.nbytes // row * N_EMBD, lambda: ops.matmul(out, small, x)
    each = N_FF * row  # bytes of a gate, up or down matrix
    n_slots = min(len(weights) // (3 * each), N_EXPERT)
    slots = [
        Slots(tag, shape, (weights,), np.zeros(n_slots, np.int64), (3 * np.arange(n_slots) + i) * each)
        for i, shape in enumerate([(N_FF, N_EMBD), (N_FF, N_EMBD), (N_EMBD, N_FF)])
    ]
    bank, table = Bank(*slots), (np.arange(N_EXPERT) % n_slots).astype(np.int32)
    ids = np.stack([rng.permutation(N_EXPERT)[:K] for _ in range(PREFILL)]).astype(np.int32)
    share, y = np.full((PREFILL, K), 1 / K, np.float32), np.zeros((PREFILL, N_EMBD), np.float32)
    many = 3 * PREFILL * K * N_FF * N_EMBD
    yield "expert_ffn", PREFILL, 3 * len(np.unique(ids)) * each, many, lambda: ops.expert_ffn(y, x, bank, table, ids, share)
    # Token after token through all experts, as the layers of a model do: eight of them would stay in a cache.
    apart = rng.permutation(n_slots)[: n_slots // K * K].reshape(-1, 1, K).astype(np.int32)

    def tokens():
        for chosen in apart:
            ops.expert_ffn(y[:1], x[:1], bank, table, chosen, share[:1])

    yield "expert_ffn", 1, 3 * apart.size * each, 3 * apart.size * N_FF * N_EMBD, tokens


def attention(ops, kv: str):
    """… of attention over a full cache of CONTEXT positions, stored as `kv`."""
    tag, rng = TYPES[kv], np.random.default_rng(2)
    cache = KVCache(tag, *(np.zeros((CONTEXT, N_HEAD_KV, HEAD // tag.block * tag.nbytes), np.uint8) for _ in range(2)))
    pos = np.zeros(1, np.int32)
    for first in range(0, CONTEXT, PREFILL):
        pos[0] = first
        k, v = (rng.standard_normal((PREFILL, N_HEAD_KV, HEAD), np.float32) for _ in range(2))
        ops.store_kv(cache, k, v, pos)
    q, out = rng.standard_normal((PREFILL, N_HEAD, HEAD), np.float32), np.zeros((PREFILL, N_HEAD, HEAD), np.float32)
    for n in (1, PREFILL):
        at = np.array([CONTEXT - n], np.int32)
        seen = sum(range(CONTEXT - n + 1, CONTEXT + 1))  # positions that all tokens see together
        macs = 2 * N_HEAD * HEAD * seen
        step = lambda n=n, at=at: ops.attention(out[:n], q[:n], cache, at, 1 / 16)  # noqa: E731
        yield "attention", n, cache.k.nbytes + cache.v.nbytes, macs, step


def recurrent(ops):
    """… of the gated delta rule; its state is read and written."""
    rng = np.random.default_rng(3)
    qkv = rng.standard_normal((PREFILL, 2 * N_K_HEAD * D + N_V_HEAD * D), np.float32)
    alpha, beta = (rng.standard_normal((PREFILL, N_V_HEAD), np.float32) for _ in range(2))
    a, bias = -np.abs(rng.standard_normal(N_V_HEAD, np.float32)), rng.standard_normal(N_V_HEAD, np.float32)
    # As many states as no cache holds: a decode step of the whole model goes through 30 of them.
    states = [np.zeros((N_V_HEAD, D, D), np.float32) for _ in range(30)]
    out = np.zeros((PREFILL, N_V_HEAD, D), np.float32)
    for n, used in ((1, states), (PREFILL, states[:1])):

        def step(n=n, used=used):
            for state in used:
                ops.delta_rule(out[:n], qkv[:n], alpha[:n], beta[:n], a, bias, state)

        yield "delta_rule", n, 2 * len(used) * states[0].nbytes, 3 * n * len(used) * states[0].size, step


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.split("\n\n")[0])
    p.add_argument("--threads", type=int, help="default: physical cores")
    p.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), metavar="TYPE", help="default: all")
    p.add_argument("--rounds", type=int, default=7)
    args = p.parse_args(argv)
    ops, rows = CpuOps(args.threads), []
    peak, _ = machine.read_rate(builtin_model(), ops.threads)
    facts = {"date": time.strftime("%Y-%m-%d"), "machine": machine.name(), "commit": machine.commit(), "threads": ops.threads}
    print(f"{ops.threads} threads read {peak / 1e9:.1f} GB/s; instructions: {type(ops.isa).__name__}", file=sys.stderr)

    def measure(kind: str, jobs) -> None:
        for op, n, nbytes, macs, step in jobs:
            took = seconds(ops, (op, kind, n), step, args.rounds)
            gb_s, gmac_s = nbytes / took / 1e9, macs / took / 1e9
            row = facts | {"op": op, "type": kind, "tokens": n, "gb_s": round(gb_s, 2)}
            rows.append(row | {"percent": round(1e11 * gb_s / peak), "gmac_s": round(gmac_s, 1)})
            text = "{op:12}{type:9}{tokens:5} tokens {gb_s:8.2f} GB/s {percent:4} % {gmac_s:8.1f} Gmac/s"
            print(text.format(**rows[-1]), file=sys.stderr)
            append(rows[-1], RESULTS / "kernels.csv")

    def prepare(types: set[str], kv: str) -> None:
        sizes = dict(n_tokens=PREFILL, n_expert=N_EXPERT, n_expert_used=K, n_embd=N_EMBD, n_ff_exp=N_FF)
        used = frozenset(types)
        ops.prepare(Needs(matrices=used, embeddings=frozenset(), experts=used, kv=kv, recurrent=True, **sizes), None)

    for quant in args.types:
        prepare({quant}, "F16")
        measure(quant, products(ops, quant))
    for kv in (kv.upper() for kv in KV_TYPES):
        prepare(set(), kv)
        measure(kv, attention(ops, kv))
    measure("F32", recurrent(ops))
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
