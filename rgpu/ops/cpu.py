"""The verbs on the CPU: check shapes, hand addresses to the Numba kernels. Weights are read in place from the mapped file."""

import os

import numpy as np

from .. import kernels
from ..kernels import attention, elementwise, matmul, recurrent
from ..quants import TYPES
from . import check

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
        self.threads = threads or physical_cores()

    # ---- memory ----

    def prepare(self, needs, progress):
        e, pairs = elementwise, needs.n_tokens * needs.n_expert_used
        plain = [e.rms_norm, e.swiglu, e.gate, e.gate_rows, e.add, e.zero, e.rope, e.route, e.group_by_expert, e.combine]
        if needs.recurrent:
            plain += [recurrent.short_conv, recurrent.delta_rule]
        typed = [(matmul.matmul, needs.matrices | needs.experts), (e.embed, needs.embeddings),
                 (e.store_kv, {needs.kv}), (attention.attention, {needs.kv})]  # fmt: skip
        kernels.build([(k,) for k in plain] + [(k, TYPES[name]) for k, names in typed for name in sorted(names)], progress)
        self.starts, self.order = np.zeros(needs.n_expert + 1, np.int32), np.zeros(pairs, np.int32)
        self.gates, self.ups = np.zeros((pairs, needs.n_ff_exp), np.float32), np.zeros((pairs, needs.n_ff_exp), np.float32)
        self.only, self.slot = np.zeros(1, np.int64), np.zeros(1, np.int32)
        self.all, self.each = np.zeros(2, np.int32), np.arange(max(needs.n_tokens, 16), dtype=np.int32)
        self.downs = np.zeros((pairs, needs.n_embd), np.float32)

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
        assert x.shape == (out.shape[0], cols) and out.shape[1] == rows
        # One expert in slot 0, to which every token goes.
        self.only[0], self.all[1] = weight.address, len(x)
        matmul.matmul(
            weight.quant, at(out), at(self.only), weight.row_bytes, at(self.slot), at(self.all), at(self.each), at(x),
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
            elementwise.store_kv(cache.quant, at(part), part.shape[2], at(x), at(pos), *x.shape)

    def attention(self, out, q, cache, pos, scale):
        n, n_head, d_k = q.shape
        assert out.shape[:2] == q.shape[:2] and n_head % cache.k.shape[1] == 0
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
            at(out), at(qkv), at(alpha), at(beta), at(a), at(dt_bias), at(state), n, n_k_head, n_v_head, d_k, d_v, 1e-6
        )

    def route(self, ids, weights, logits):
        elementwise.route(at(ids), at(weights), at(logits), *logits.shape, ids.shape[1])

    def expert_ffn(self, out, x, bank, table, ids, weights):
        n, k = ids.shape
        pairs, n_expert = n * k, len(table)
        starts, order = at(self.starts), at(self.order)
        gates, ups, downs = self.gates[:pairs], self.ups[:pairs], self.downs[:pairs]
        elementwise.group_by_expert(starts, order, at(ids), pairs, n_expert)
        for part, y, source, shared_by in ((bank.gate, gates, x, k), (bank.up, ups, x, k), (bank.down, downs, gates, 1)):
            if part is bank.down:
                elementwise.swiglu(at(gates), at(gates), at(ups), gates.size)
            matmul.matmul(
                part.quant, at(y), at(part.addresses), part.row_bytes, at(table), starts, order, at(source),
                n_expert, shared_by, *part.shape, self.parts(pairs * part.shape[0] * part.shape[1]),
            )  # fmt: skip
        elementwise.combine(at(out), at(downs), at(weights), at(ids), at(table), order, pairs, k, out.shape[1])
