"""`python -m bench.gpu --counted`: the bytes that CUDA kernels move at real shapes, counted on the stand-in, and their bounds.

Needs no GPU. Counted is what threads load and store: what several of them load again comes from caches on a GPU, so a bound is
that of the bytes that must move once, or of the arithmetic, if that takes longer. What is the same work again and again is
counted once and multiplied: exactly, or for prompts' attention to a percent.
"""

import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from rgpu.engine import KV_TYPES
from rgpu.errors import DeviceError
from rgpu.ops import Weight
from rgpu.ops.cuda_source import up
from rgpu.ops.device import Device
from rgpu.quants import TYPES
from rgpu.state import KVCache

from .gpu_ops import Stage, expert_bank, row_bytes
from .gpu_rates import Sizes

# Bytes, and operations of each kind, a second, as the makers say: about an RTX 4060 (24 multiprocessors), and an H200.
MACHINES = {
    "300 GB/s": {"bytes": 3e11, "int8": 121e12, "float16": 30e12, "float32": 15e12},
    "4.8 TB/s": {"bytes": 4.8e12, "int8": 1979e12, "float16": 989e12, "float32": 67e12},
}
MULTIPROCESSORS = 24
PART = 512  # rows of a matrix that are counted
FACTS = "kernel type tokens shape loaded stored read written multiply_adds".split()
COLUMNS = (*FACTS, *(f"us at {name}" for name in MACHINES), "bound")  # the bound at the last of them


@dataclass(frozen=True)
class Cost:
    """What a kernel must do: bytes that it reads and writes at least, multiply-adds, and the unit of a GPU that makes them."""

    read: int
    written: int
    multiply_adds: int = 0
    unit: str = "float32"
    times: int = 1  # so often what was counted

    def bound(self, machine: dict) -> tuple[float, str]:
        """(microseconds, what takes them)."""
        of = {"bytes": (self.read + self.written) / machine["bytes"], self.unit: 2 * self.multiply_adds / machine[self.unit]}
        longest = max(of, key=of.get)
        return of[longest] * 1e6, longest


def counted(stage: Stage, work: Callable[[], None], costs: dict[str, Cost], **more) -> Iterator[dict]:
    """A row for each of these kernels that `work()` launches."""
    stage.ops.stream.synchronize()
    stage.device.traffic.clear()
    work()
    stage.ops.stream.synchronize()
    for kernel, cost in costs.items():
        loaded, stored = (cost.times * n for n in stage.device.traffic[kernel])
        bounds = [cost.bound(machine) for machine in MACHINES.values()]
        figures = (loaded, stored, cost.read, cost.written, cost.multiply_adds, *(f"{us:.4g}" for us, _ in bounds), bounds[-1][1])
        yield dict(zip(COLUMNS, (kernel, more["type"], more["tokens"], more["shape"], *figures), strict=True))


def input_bytes(quant: str, n: int) -> int:
    """Of n values, as products with a type read them."""
    return 4 * n if TYPES[quant].block == 1 else 5 * n // 4


def unit(quant: str) -> str:
    """What multiplies a prompt with such weights (kernels/tile.cuh)."""
    return "float32" if TYPES[quant].block == 1 else "int8"


def matrices(device: Device, sizes: Sizes, types: list[str]) -> Iterator[dict]:
    for quant in types:
        yield from _matrices(Stage(device, replace(sizes, prompts=(64,)), [quant]), quant, sizes)


def _matrices(stage: Stage, quant: str, sizes: Sizes) -> Iterator[dict]:
    """Of a matrix its first rows are counted, of a prompt one tile."""
    found = [("matmul_one", 1, shape) for shape in sizes.matrices] + [("matmul_few", 8, sizes.wide)]
    for name, n, (rows, columns) in [*found, ("matmul_many", sizes.prompts[0], sizes.wide)]:
        part_n, part = (64, 128) if name == "matmul_many" else (n, min(rows, PART))
        assert rows % part == n % part_n == 0
        weight = Weight(TYPES[quant], (part, columns), stage.blocks(quant, part * row_bytes(quant, columns)))
        given = stage.zeros(part_n, part), weight, stage.normal(part_n, columns)
        read = rows * row_bytes(quant, columns) + input_bytes(quant, n * columns)
        cost = Cost(read, 4 * n * rows, n * rows * columns, unit(quant), rows // part * (n // part_n))
        more = {"type": quant, "tokens": n, "shape": f"{rows}x{columns}"}
        yield from counted(stage, partial(stage.ops.matmul, *given), {name: cost}, **more)


def experts(device: Device, sizes: Sizes, types: list[str]) -> Iterator[dict]:
    """A token's, and a prompt's whose tokens are spread evenly."""
    for quant in types:
        # What some of the tokens do with k experts, others do with the next k.
        n = sizes.prompts[0] * sizes.k // sizes.n_expert
        assert n > 8 and n * sizes.n_expert == sizes.prompts[0] * sizes.k
        stage = Stage(device, replace(sizes, n_expert=sizes.k, prompts=(n,)), experts=(quant, quant))
        yield from _experts(stage, quant, sizes, n)


def _experts(stage: Stage, quant: str, sizes: Sizes, part: int) -> Iterator[dict]:
    k, n_ff, n_embd, n = sizes.k, sizes.n_ff, sizes.n_embd, sizes.prompts[0]
    bank, _ = expert_bank(stage, quant, quant)
    gate, _, down = (shared.shape[0] * shared.row_bytes for shared in bank)
    x, out, share = stage.normal(part, n_embd), stage.zeros(part, n_embd), stage.put(np.full((part, k), 1 / k, np.float32))
    ids = stage.put(np.stack([stage.rng.permutation(k) for _ in range(part)]).astype(np.int32))
    table = stage.put(np.arange(k, dtype=np.int32))

    def work(m: int) -> None:
        stage.ops.expert_ffn(out[:m], x[:m], bank, table, ids[:m], share[:m])

    more = {"type": quant, "shape": f"{k} of {sizes.n_expert}, {n_ff}x{n_embd}"}
    hidden, adds = input_bytes(quant, k * n_ff), k * n_ff * n_embd
    costs = {
        "gate_up": Cost(2 * k * gate + input_bytes(quant, n_embd), hidden, 2 * adds, unit(quant)),
        "down": Cost(k * down + hidden + 4 * n_embd, 4 * n_embd, adds, unit(quant)),
    }
    yield from counted(stage, partial(work, 1), costs, tokens=1, **more)
    matrices = sizes.n_expert * (2 * gate + down)  # the three products together
    costs = {
        "product_many": Cost(
            matrices + 2 * input_bytes(quant, n * n_embd) + n * hidden, 4 * n * k * (2 * n_ff + n_embd), 3 * n * adds, unit(quant)
        ),
        "swiglu_many": Cost(8 * n * k * n_ff, n * hidden),
        "combine": Cost(4 * n * (k + 1) * n_embd, 4 * n * n_embd),
    }
    costs = {name: replace(cost, times=n // part) for name, cost in costs.items()}
    yield from counted(stage, partial(work, part), costs, tokens=n, **more)


def attention(device: Device, sizes: Sizes, types: list[str]) -> Iterator[dict]:
    for kv in map(str.upper, KV_TYPES):
        yield from _attention(Stage(device, replace(sizes, prompts=(16,)), kv=kv), kv, sizes)


def _attention(stage: Stage, kv: str, sizes: Sizes) -> Iterator[dict]:
    n_head, n_head_kv, head, n = sizes.n_head, sizes.n_head_kv, sizes.head, sizes.prompts[0]
    row, values, adds = row_bytes(kv, head), 4 * n_head * head, 2 * n_head * head
    q, out = stage.normal(16, n_head, head), stage.zeros(16, n_head, head)
    for context in filter(None, sizes.contexts):
        parts = [stage.blocks(kv, context * n_head_kv * row).reshape(context, n_head_kv, row) for _ in range(2)]
        cache, more = KVCache(TYPES[kv], *parts), {"type": kv, "shape": f"{n_head}/{n_head_kv} of {head}, {context}"}
        work = partial(stage.ops.attention, out[:1], q[:1], cache, stage.put(np.array([context - 1], np.int32)), head**-0.5)
        ranges = min(max(2 * MULTIPROCESSORS // (n_head_kv * up(n_head // n_head_kv, 8)), 1), 64)
        sums = 4 * ranges * n_head * (head + 2)
        costs = {
            "attention": Cost(2 * cache.k.nbytes + values, sums, context * adds),
            "attention_combine": Cost(sums, values),
        }
        yield from counted(stage, work, costs, tokens=1, **more)
        if TYPES[kv].nbytes > 2 * TYPES[kv].block or context < n:
            continue  # prompts are computed by the same kernel
        # Of a prompt that ends there 16 tokens in the middle, which see as much as the others on average.
        middle = stage.put(np.array([context - n // 2 - 8], np.int32))
        seen = sum(range(context - n + 1, context + 1))
        cost = Cost(2 * cache.k.nbytes + n * values, n * values, seen * adds, "float16", n // 16)
        work = partial(stage.ops.attention, out, q, cache, middle, head**-0.5)
        stage.device.multiprocessors = 1  # the whole prompt fills the device: no context is divided
        yield from counted(stage, work, {"attention_many": cost}, tokens=n, **more)
        stage.device.multiprocessors = MULTIPROCESSORS


def recurrent(device: Device, sizes: Sizes, types: list[str]) -> Iterator[dict]:
    n, heads, d = sizes.prompts[0], sizes.n_v_head, sizes.d
    stage, channels = Stage(device, replace(sizes, prompts=(n,))), (2 * sizes.n_k_head + heads) * d
    state, tail, taps = stage.zeros(heads, d, d), stage.zeros(3, channels), stage.normal(channels, 4)
    x, qkv, out = stage.normal(n, channels), stage.normal(n, channels), stage.zeros(n, heads, d)
    alpha, beta, a, bias = stage.normal(n, heads), stage.normal(n, heads), stage.normal(heads), stage.normal(heads)
    for m in (1, n):
        more, rows = {"type": "F32", "tokens": m}, 4 * m * channels
        cost = Cost(rows + taps.nbytes + tail.nbytes, rows + tail.nbytes, 4 * m * channels)
        work = partial(stage.ops.short_conv, qkv[:m], x[:m], taps, tail)
        yield from counted(stage, work, {"short_conv": cost}, shape=f"{channels} of 4", **more)
        cost = Cost(rows + state.nbytes + 8 * (m + 1) * heads, 4 * m * heads * d + state.nbytes, 3 * m * heads * d * d)
        work = partial(stage.ops.delta_rule, out[:m], qkv[:m], alpha[:m], beta[:m], a, bias, state)
        yield from counted(stage, work, {"delta_rule": cost}, shape=f"{sizes.n_k_head}/{heads} of {d}", **more)


def rows_of_a_token(device: Device, sizes: Sizes, types: list[str]) -> Iterator[dict]:
    """What stands between the products of a step: a microsecond each, whatever they move."""
    stage, n, k = Stage(device, replace(sizes, prompts=(16,))), sizes.n_embd, sizes.k
    norm, x, y, logits = stage.normal(n), stage.normal(1, n), stage.zeros(1, n), stage.normal(1, sizes.n_expert)
    ids, chosen, ops = stage.put(np.zeros((1, k), np.int32)), stage.zeros(1, k), stage.ops
    row = Cost(8 * n, 4 * n)
    for kernel, cost, shape, work in (
        ("rms_norm", row, str(n), partial(ops.rms_norm, y, x, norm, 1e-6)),
        ("swiglu", row, str(n), partial(ops.swiglu, y, x, norm.reshape(1, n))),
        ("gate", row, str(n), partial(ops.gate, y, x, norm.reshape(1, n))),
        ("add", row, str(n), partial(ops.add, y, x)),
        ("route", Cost(logits.nbytes, 8 * k), f"{k} of {sizes.n_expert}", partial(ops.route, ids, chosen, logits)),
    ):
        yield from counted(stage, work, {kernel: cost}, type="F32", tokens=1, shape=shape)


PARTS = matrices, experts, attention, recurrent, rows_of_a_token


def stand_in():
    """The device that counts. Raises DeviceError where there is none."""
    try:
        from tests.cuda_sim import SimDevice
    except ModuleNotFoundError as error:
        raise DeviceError(f"kernels are counted on tests/cuda_sim, which is not here ({error})") from None
    device = SimDevice(total=4 << 30, counting=True)
    device.multiprocessors = MULTIPROCESSORS
    return device


def table(rows: list[dict]) -> Iterator[str]:
    """Markdown: bytes in thousands."""
    names = "kernel", "type", "tokens", "shape", "kB loaded", "kB stored", "kB read once", "kB written once", "M multiply-adds"
    yield f"| {' | '.join((*names, *(f'µs at {name}' for name in MACHINES), 'bound'))} |"
    yield f"|{'---|' * 4}{'--:|' * (5 + len(MACHINES))}---|"
    for row in rows:
        cells = [str(value) for value in row.values()]
        cells[4:8] = [f"{row[name] / 1e3:,.1f}" for name in ("loaded", "stored", "read", "written")]
        cells[8] = f"{row['multiply_adds'] / 1e6:,.2f}"
        yield f"| {' | '.join(cells)} |"


def report(path: Path, sizes: Sizes, types: list[str]) -> Iterator[str]:
    """Count everything, write it to `path`, anew each time (the figures are the same on every machine), and give the table."""
    device, rows = stand_in(), []
    try:
        for part in PARTS:
            for row in part(device, sizes, types):
                rows.append(row)
                print(f"{row['kernel']} {row['type']} {row['shape']}", file=sys.stderr, flush=True)
    finally:
        device.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    yield from table(rows)
