"""The verbs on the CPU: check shapes, hand addresses to the Numba kernels. Weights are read in place from the mapped file."""

import os

import numpy as np

from .. import kernels
from ..errors import RgpuError
from ..kernels import attention, elementwise, matmul, recurrent
from ..quants import TYPES
from . import L2_EPS, check

SMALL = 1 << 17  # multiply-adds that one thread does in the time it takes to call the others


def physical_cores() -> int:
    """Cores this process may use, counting two hardware threads of one core once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in usable:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as f:
                cores.add(f.read().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def at(x) -> int:
    """The address of a C-contiguous array."""
    assert x.flags.c_contiguous, "kernels take whole rows"
    return x.__array_interface__["data"][0]


def rows_at(x) -> tuple[int, int, int, int]:
    """(address, floats between rows, rows, row length) of an array whose leading axes are evenly spaced rows."""
    n, stride = x.shape[-1], x.strides[-2] // 4
    assert x.dtype == np.float32 and x.strides[-1] == 4
    assert all(x.strides[i] == x.strides[i + 1] * x.shape[i + 1] for i in range(x.ndim - 2) if x.shape[i] > 1)
    return x.__array_interface__["data"][0], stride, x.size // n, n


@check
class CpuOps:
    name = "cpu"

    def __init__(self, threads=None):
        most = kernels.most_threads()
        if threads is not None and threads > most:
            raise RgpuError(f"threads is {threads}, but this process may use {most} at most")
        self.threads = min(threads or physical_cores(), most)

    # ---- memory ----

    def prepare(self, needs, progress):
        e, pairs = elementwise, needs.n_tokens * needs.n_expert_used
        self.needs, self.n_pairs = needs, pairs
        plain = [e.rms_norm, e.swiglu, e.gate, e.gate_rows, e.add, e.zero, e.rope, e.route, e.group_by_expert, e.combine]
        if needs.recurrent:
            plain += [recurrent.short_conv, recurrent.delta_rule]
        typed = [(matmul.matmul, needs.matrices | needs.experts), (e.embed, needs.embeddings),
                 (e.store_kv, {needs.kv}), (attention.attention, {needs.kv})]  # fmt: skip
        kernels.build([(k,) for k in plain] + [(k, TYPES[name]) for k, names in typed for name in sorted(names)], progress)
        # Scratch of the products, and its addresses: asking an array for its address takes a microsecond.
        int32, float32 = np.int32, np.float32
        self.weight, self.counts = np.zeros(1, np.int64), np.zeros(2, int32)
        self.gates, self.ups = np.zeros((pairs, needs.n_ff_exp), float32), np.zeros((pairs, needs.n_ff_exp), float32)
        self.downs = np.zeros((pairs, needs.n_embd), float32)
        lists = np.zeros(needs.n_expert + 1, int32), np.zeros(pairs, int32)
        single = np.zeros(1, int32), np.arange(needs.n_tokens, dtype=int32)
        self.kept = lists, single  # alive as long as their addresses are
        self.starts, self.order = map(at, lists)
        self.only, self.each = map(at, single)  # the table and the order of a plain product: one expert, in slot 0
        self.weight_at, self.counts_at = at(self.weight), at(self.counts)

    def empty(self, shape, dtype):
        return np.zeros(shape, dtype)

    def upload(self, array):
        return np.ascontiguousarray(array)

    def to_host(self, x):
        return x.copy()

    def copy(self, out, x):
        np.copyto(out, x)

    def parts(self, work: int) -> int:
        """Threads for this many multiply-adds, made current for the kernel that follows."""
        n = self.threads if work > SMALL else 1
        kernels.set_threads(n)
        return n

    # ---- verbs ----

    def embed(self, out, weight, tokens):
        elementwise.embed(weight.quant, at(out), weight.address, weight.row_bytes, at(tokens), *out.shape)

    def matmul(self, out, weight, x):
        rows, cols = weight.shape
        assert x.shape == (out.shape[0], cols) and out.shape[1] == rows and len(x) <= self.needs.n_tokens
        # One expert in slot 0, to which every token goes.
        self.weight[0], self.counts[1] = weight.address, len(x)
        matmul.matmul(
            weight.quant, at(out), self.weight_at, weight.row_bytes, self.only, self.counts_at, self.each, at(x),
            1, 1, rows, cols, self.parts(len(x) * rows * cols),
        )  # fmt: skip

    def rms_norm(self, out, x, weight, eps):
        address, stride, n_rows, n = rows_at(x)
        assert out.shape == x.shape and weight.shape == (n,)
        elementwise.rms_norm(at(out), address, stride, at(weight), n_rows, n, eps)

    def swiglu(self, out, gate, up):
        assert out.shape == gate.shape == up.shape
        elementwise.swiglu(at(out), at(gate), at(up), out.size)

    def gate(self, out, x, g):
        address, stride, n_rows, n = rows_at(g)
        kernel = elementwise.gate if n == x.shape[-1] else elementwise.gate_rows
        assert n in (1, x.shape[-1]) and n_rows == x.size // x.shape[-1] and out.shape == x.shape
        kernel(at(out), at(x), address, stride, n_rows, x.shape[-1])

    def add(self, out, x):
        assert out.shape == x.shape
        elementwise.add(at(out), at(x), out.size)

    def zero(self, out):
        elementwise.zero(at(out), out.size)

    def rope(self, x, pos, freqs):
        assert 2 * len(freqs) <= x.shape[2]
        elementwise.rope(at(x), at(pos), at(freqs), *x.shape, 2 * len(freqs))

    def store_kv(self, cache, k, v, pos):
        for part, x in ((cache.k, k), (cache.v, v)):
            assert int(pos[0]) + len(x) <= part.shape[0] and x.shape[1] == part.shape[1]
            elementwise.store_kv(cache.quant, at(part), part.shape[2], at(x), at(pos), *x.shape)

    def attention(self, out, q, cache, pos, scale):
        n, n_head, d_k = q.shape
        assert out.shape[:2] == q.shape[:2] and n_head % cache.k.shape[1] == 0 and int(pos[0]) + n <= cache.k.shape[0]
        self.parts(n * n_head * (d_k + out.shape[2]) * (int(pos[0]) + n))
        attention.attention(
            cache.quant, at(out), at(q), at(cache.k), at(cache.v), cache.k.shape[2], cache.v.shape[2], at(pos),
            n, n_head, cache.k.shape[1], d_k, out.shape[2], scale,
        )  # fmt: skip

    def short_conv(self, out, x, weight, tail):
        assert out.shape == x.shape and weight.shape[0] == x.shape[1] and tail.shape == (weight.shape[1] - 1, x.shape[1])
        parts = self.parts(weight.size * len(x))
        recurrent.short_conv(at(out), at(x), at(weight), at(tail), *x.shape, weight.shape[1], parts)

    def delta_rule(self, out, qkv, alpha, beta, a, dt_bias, state):
        n, n_v_head, d_v = out.shape
        d_k = state.shape[1]
        n_k_head = (qkv.shape[1] - n_v_head * d_v) // (2 * d_k)
        assert alpha.shape == beta.shape == (n, n_v_head) and state.shape == (n_v_head, d_k, d_v)
        self.parts(3 * state.size * n)
        recurrent.delta_rule(
            at(out), at(qkv), at(alpha), at(beta), at(a), at(dt_bias), at(state), n, n_k_head, n_v_head, d_k, d_v, L2_EPS
        )

    def route(self, ids, weights, logits):
        elementwise.route(at(ids), at(weights), at(logits), *logits.shape, ids.shape[1])

    def expert_ffn(self, out, x, bank, table, ids, weights):
        n, k = ids.shape
        pairs, n_expert = n * k, len(table)
        assert pairs <= self.n_pairs and n_expert <= self.needs.n_expert and x.shape == (n, bank.gate.shape[1])
        assert ids.dtype == table.dtype == np.int32
        gates, ups, downs, chosen, slots = at(self.gates), at(self.ups), at(self.downs), at(ids), at(table)
        elementwise.group_by_expert(self.starts, self.order, chosen, pairs, n_expert)
        for part, y, source, shared_by in ((bank.gate, gates, at(x), k), (bank.up, ups, at(x), k), (bank.down, downs, gates, 1)):
            if part is bank.down:
                elementwise.swiglu(gates, gates, ups, pairs * part.shape[1])
            matmul.matmul(
                part.quant, y, at(part.addresses), part.row_bytes, slots, self.starts, self.order, source,
                n_expert, shared_by, *part.shape, self.parts(pairs * part.shape[0] * part.shape[1]),
            )  # fmt: skip
        elementwise.combine(at(out), downs, at(weights), chosen, slots, self.order, pairs, k, out.shape[1])
