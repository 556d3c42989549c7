"""The verbs of the CUDA backend that cost time, one by one, at the shapes of Qwen3.6-35B-A3B: parts of bench.gpu.

Decode reads what no cache holds: matrices, experts, KV caches and states lie side by side, and a recorded step goes through all
of them, so that a row's time is that of one call among others, as in a model. Prompts are bound by arithmetic.
"""

import gc
import sys
from collections.abc import Iterator

import numpy as np

from rgpu.engine import KV_TYPES
from rgpu.ops import Bank, Needs, Slots, Weight
from rgpu.ops.cuda import CudaOps
from rgpu.ops.device import Device
from rgpu.quants import TYPES
from rgpu.state import KVCache

from .gpu_rates import Clock, Sizes, figure, fill


class Stage:
    """A backend with kernels for some types, its clock, and random inputs; `experts` are of types (gate and up, down)."""

    def __init__(self, device: Device, sizes: Sizes, matrices=(), kv: str = "F16", experts: tuple[str, str] | None = None):
        gc.collect()  # the last one's memory, before more is asked for
        self.device, self.sizes, self.rng = device, sizes, np.random.default_rng(1)
        types = {"matrices": frozenset(matrices), "embeddings": frozenset(), "experts": frozenset(experts or ()), "kv": kv}
        if experts:
            types |= {"gate_up": frozenset([(experts[0], experts[0])]), "down": frozenset(experts[1:])}
        shape = {"n_tokens": max(sizes.prompts), "n_expert": sizes.n_expert, "n_expert_used": sizes.k, "n_embd": sizes.n_embd}
        shape |= {"n_ff_exp": sizes.n_ff, "recurrent": sizes.d, "n_embd_head": sizes.head}
        self.ops = CudaOps(device)
        self.ops.prepare(Needs(**shape, **types), None)
        self.clock = Clock(device, self.ops.stream, sizes.repeats)

    def seconds(self, verb, calls: list[tuple]) -> float:
        """… of one of these calls of a verb, in a recorded step of all of them."""
        key = object()

        def step():
            for arguments in calls:
                verb(*arguments)

        return self.clock(lambda: self.ops.replay(key, step)) / len(calls)

    def put(self, array: np.ndarray):
        """The array on the device, without the backend's page-locked ring: each would keep its own."""
        out = self.ops.empty(array.shape, array.dtype)
        self.ops.stream.upload(out.address, array)
        return out

    def normal(self, *shape: int):
        return self.put(self.rng.standard_normal(shape, np.float32))

    def zeros(self, *shape: int):
        return self.ops.empty(shape, np.float32)

    def blocks(self, quant: str, nbytes: int):
        memory = self.ops.empty((nbytes,), np.uint8)
        fill(self.ops.stream, memory.address, nbytes, quant)
        return memory

    def pieces(self, memory, nbytes: int, together: int = 1) -> list:
        """Pieces of some memory, as many as no cache holds; a multiple of `together`."""
        n = min(memory.nbytes // nbytes, self.sizes.most * together) // together * together
        assert n, f"{together} times {nbytes:,} bytes are more than is set aside"
        return [memory[i * nbytes : (i + 1) * nbytes] for i in range(n)]


def row_bytes(quant: str, columns: int) -> int:
    return columns // TYPES[quant].block * TYPES[quant].nbytes


# ---- matrices ----


def matvec(device: Device, sizes: Sizes, types: list[str]) -> Iterator[dict]:
    """A matrix and one token, for every type and shape."""
    for quant in types:
        yield from _matvec(Stage(device, sizes, [quant]), quant)


def _matvec(stage: Stage, quant: str) -> Iterator[dict]:
    memory = stage.blocks(quant, stage.sizes.memory)
    for rows, columns in stage.sizes.matrices:
        nbytes, shape = rows * row_bytes(quant, columns), f"{rows}x{columns}"
        if nbytes > memory.nbytes:
            print(f"left out: {quant} {shape}, which has {nbytes:,} bytes", file=sys.stderr)
            continue
        weights = [Weight(TYPES[quant], (rows, columns), piece) for piece in stage.pieces(memory, nbytes)]
        x, out = stage.normal(1, columns), stage.zeros(1, rows)
        took = stage.seconds(stage.ops.matmul, [(out, weight, x) for weight in weights])
        yield figure("matmul", took, nbytes, type=quant, tokens=1, shape=shape)


def tiles(device: Device, sizes: Sizes, types: list[str]) -> Iterator[dict]:
    """A matrix and a prompt, for every type."""
    for quant in types:
        yield from _tiles(Stage(device, sizes, [quant]), quant)


def _tiles(stage: Stage, quant: str) -> Iterator[dict]:
    rows, columns = stage.sizes.wide
    weight = Weight(TYPES[quant], (rows, columns), stage.blocks(quant, rows * row_bytes(quant, columns)))
    for n in stage.sizes.prompts:
        took = stage.seconds(stage.ops.matmul, [(stage.zeros(n, rows), weight, stage.normal(n, columns))])
        yield figure("matmul", took, flops=2 * n * rows * columns, type=quant, tokens=n, shape=f"{rows}x{columns}")


# ---- experts ----


def experts(device: Device, sizes: Sizes, types: list[str]) -> Iterator[dict]:
    """One token's experts, others each time, and a prompt's; for every type, and for the model's own mix."""
    mix = [("Q4_K", "Q6_K")] if {"Q4_K", "Q6_K"} <= {*types} else []
    for gate, down in [(quant, quant) for quant in types] + mix:
        yield from _experts(Stage(device, sizes, experts=(gate, down)), gate, down)


def expert_bank(stage: Stage, gate: str, down: str) -> tuple[Bank, int]:
    """Experts of a layer side by side, and how many: as many as the layer has, or the memory takes."""
    sizes = stage.sizes
    wide, tall = (gate, (sizes.n_ff, sizes.n_embd)), (down, (sizes.n_embd, sizes.n_ff))
    parts = [(quant, shape, shape[0] * row_bytes(quant, shape[1])) for quant, shape in (wide, wide, tall)]
    n = min(sizes.n_expert, sizes.memory // sum(nbytes for *_, nbytes in parts))
    first = np.zeros(n, np.int64)
    return Bank(
        *(Slots(TYPES[q], shape, (stage.blocks(q, n * nbytes),), first, np.arange(n) * nbytes) for q, shape, nbytes in parts)
    ), n


def _experts(stage: Stage, gate: str, down: str) -> Iterator[dict]:
    sizes, ops, k = stage.sizes, stage.ops, stage.sizes.k
    bank, n_slots = expert_bank(stage, gate, down)
    table, most = stage.put((np.arange(sizes.n_expert) % n_slots).astype(np.int32)), max(sizes.prompts)
    share = stage.put(np.full((most, k), 1 / k, np.float32))
    x, out = stage.normal(most, sizes.n_embd), stage.zeros(most, sizes.n_embd)
    more = {"type": gate if gate == down else f"{gate}+{down}", "shape": f"{k} of {n_slots}"}
    # Token after token through all experts, as the layers of a model do: eight of them would stay in a cache.
    ids = stage.put(stage.rng.permutation(n_slots)[: n_slots // k * k].reshape(-1, k).astype(np.int32))
    calls = [(out[:1], x[:1], bank, table, ids[i : i + 1], share[:1]) for i in range(len(ids))]
    nbytes = k * sum(part.shape[0] * part.row_bytes for part in bank)
    yield figure("expert_ffn", stage.seconds(ops.expert_ffn, calls), nbytes, tokens=1, **more)
    ids = stage.put(np.stack([stage.rng.permutation(sizes.n_expert)[:k] for _ in range(most)]).astype(np.int32))
    for n in sizes.prompts:
        took = stage.seconds(ops.expert_ffn, [(out[:n], x[:n], bank, table, ids[:n], share[:n])])
        yield figure("expert_ffn", took, flops=6 * n * k * sizes.n_ff * sizes.n_embd, tokens=n, **more)


# ---- attention and recurrence ----


def attention(device: Device, sizes: Sizes, types: list[str]) -> Iterator[dict]:
    """One token over a full cache, and the last tokens of a prompt; for every type of cache."""
    for kv in KV_TYPES:
        yield from _attention(Stage(device, sizes, kv=kv.upper()), kv.upper())


def _attention(stage: Stage, kv: str) -> Iterator[dict]:
    ops, n_head, n_head_kv, head = stage.ops, stage.sizes.n_head, stage.sizes.n_head_kv, stage.sizes.head
    memory, row, last = stage.blocks(kv, stage.sizes.memory), row_bytes(kv, head), min(stage.sizes.prompts)
    q, out, scale = stage.normal(last, n_head, head), stage.zeros(last, n_head, head), head**-0.5
    for context in filter(None, stage.sizes.contexts):
        nbytes, n = context * n_head_kv * row, min(last, context)
        parts = [piece.reshape(context, n_head_kv, row) for piece in stage.pieces(memory, nbytes, together=2)]
        caches = [KVCache(TYPES[kv], k, v) for k, v in zip(parts[::2], parts[1::2], strict=True)]
        at = stage.put(np.array([context - 1, context - n], np.int32))
        more = {"type": kv, "context": context, "shape": f"{n_head}/{n_head_kv} of {head}"}
        took = stage.seconds(ops.attention, [(out[:1], q[:1], cache, at[:1], scale) for cache in caches])
        yield figure("attention", took, 2 * nbytes, tokens=1, **more)
        took = stage.seconds(ops.attention, [(out[:n], q[:n], caches[0], at[1:], scale)])
        seen = sum(range(context - n + 1, context + 1))  # positions that all tokens see together
        yield figure("attention", took, flops=4 * n_head * head * seen, tokens=n, **more)


def recurrent(device: Device, sizes: Sizes, types: list[str]) -> Iterator[dict]:
    """The gated delta rule, whose state is read and written; one token goes through as many states as no cache holds."""
    stage = Stage(device, sizes)
    heads, d, most = sizes.n_v_head, sizes.d, max(sizes.prompts)
    memory = stage.zeros(sizes.memory // (4 * heads * d * d), heads, d, d)
    states = [memory[i] for i in range(min(len(memory), sizes.most))]
    qkv, out = stage.normal(most, (2 * sizes.n_k_head + heads) * d), stage.zeros(most, heads, d)
    alpha, beta, bias = stage.normal(most, heads), stage.normal(most, heads), stage.normal(heads)
    a = stage.put(-np.abs(stage.rng.standard_normal(heads, np.float32)))
    for n in (1, *sizes.prompts):
        calls = [(out[:n], qkv[:n], alpha[:n], beta[:n], a, bias, state) for state in (states if n == 1 else states[:1])]
        cost = {"nbytes": 2 * states[0].nbytes} if n == 1 else {"flops": 6 * n * states[0].size}
        took, shape = stage.seconds(stage.ops.delta_rule, calls), f"{sizes.n_k_head}/{heads} of {d}"
        yield figure("delta_rule", took, **cost, type="F32", tokens=n, shape=shape)
