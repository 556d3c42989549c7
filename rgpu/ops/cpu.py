"""The verbs on the CPU: check shapes and hand addresses to the Numba kernels, at once or as rows of a table to be repeated.

Weights are read in place from the mapped file. What a product needs of its input beside float32, int8 blocks, is made once and
kept while the input stays as it is; kernels that produce such an input write the blocks with it.
"""

import time
from collections import OrderedDict

import numpy as np

from .. import kernels
from ..errors import OutOfMemory, RgpuError
from ..kernels import attention, elementwise, experts, matmul, post, recurrent, tile
from ..kernels.table import Table, overlap, span
from ..machine import physical_cores
from ..quants import TYPES
from ..quants.activations import row_bytes
from ..quants.isa import best
from . import L2_EPS, check

MOST_PARTS = 64  # of a row
PARTS_PER_THREAD = 8  # of a row that streams weights: enough to even out, and each long enough for the memory to get going
GRAIN = 1 << 16  # bytes of weights in a part, at least: two microseconds
OVERSUBSCRIBED = 4  # threads per processor at most
KEPT_TABLES = 16
UNHEARD = 0.1  # seconds in compiled code after which Python gets a turn, to notice Ctrl-C
FIRST_SLICE = 64  # rows, when it is not known how long they take


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
    reads_host_memory = True

    def __init__(self, threads=None):
        most = OVERSUBSCRIBED * kernels.most_threads()
        if threads is not None and threads > most:
            raise RgpuError(f"threads is {threads}, but this process may use {most} at most")
        self.threads, self.isa = threads or physical_cores(), best()
        self.recording: Table | None = None
        self.tables: OrderedDict = OrderedDict()  # key -> [table, rows to run at once]
        self.blocks: dict[tuple[int, int], np.ndarray] = {}  # (address, columns) -> its int8 blocks
        self.fresh: dict[tuple[int, int], tuple[int, tuple]] = {}  # … -> rows that are up to date while recording, their span

    # ---- memory ----

    def prepare(self, needs, progress):
        e, r, isa = elementwise, recurrent, self.isa
        plain = [e.rms_norm, e.swiglu, e.gate, e.gate_rows, e.add, e.copy, e.zero, e.rope, e.route,
                 matmul.quantize, experts.group_by_expert, post.post, post.wait, attention.attention_combine]  # fmt: skip
        if needs.recurrent:
            plain += [r.short_conv, r.delta_rule]
        kv, jobs = TYPES[needs.kv], [(k,) for k in plain]
        jobs += [(e.store_kv, kv), (attention.attention, kv)]
        jobs += [(e.embed, TYPES[name]) for name in sorted(needs.embeddings)]
        for name in sorted(needs.matrices):
            jobs += [(k, TYPES[name], isa) for k in (matmul.matmul, tile.matmul_many)]
        for gate, up in sorted(needs.gate_up or {(name, name) for name in needs.experts}):
            jobs += [(k, TYPES[gate], TYPES[up], isa) for k in (experts.gate_up, experts.gate_up_many)]
        for name in sorted(needs.down or needs.experts):
            jobs += [(k, TYPES[name], isa) for k in (experts.down, experts.down_many)]
        kernels.build(jobs, progress)
        self.pool = kernels.Pool(self.threads)
        self.needs, pairs = needs, needs.n_tokens * needs.n_expert_used
        self.hidden = np.zeros((pairs, 4 * needs.n_ff_exp), np.uint8)  # float32, or blocks in the first part of it
        self.groups = np.zeros(needs.n_expert + 1 + pairs, np.int32)
        self.partial: dict[int, np.ndarray] = {}  # by size
        return lambda: None

    def close(self):
        pass

    def empty(self, shape, dtype):
        return np.zeros(shape, dtype)

    def upload(self, array):
        return np.ascontiguousarray(array)

    def write(self, out, values):
        assert self.recording is None and out.dtype == values.dtype
        np.copyto(out, values)

    def to_host(self, x):
        return x.copy()

    def copy(self, out, x):
        assert out.shape == x.shape and out.dtype == x.dtype and x.itemsize == 4
        if self.recording is None:
            np.copyto(out, x)
        else:
            self._row(elementwise.copy, (), (at(out), at(x), x.size), 1, [x], [out])

    # ---- rows ----

    def replay(self, key, step):
        kept = self.tables.get(key)
        if kept is None:
            kept = [self._record(step), FIRST_SLICE]
            if key is not None:
                self.tables[key] = kept
                if len(self.tables) > KEPT_TABLES:
                    self.tables.popitem(last=False)
        else:
            self.tables.move_to_end(key)
        table, at_once = kept
        began = time.perf_counter()
        for first in range(0, len(table), at_once):
            self._run(table, first, min(first + at_once, len(table)))
        kept[1] = max(FIRST_SLICE, int(len(table) * UNHEARD / (time.perf_counter() - began)))

    def _record(self, step):
        """The table of what `step` calls."""
        self.recording, self.fresh = Table(), {}
        try:
            step()
            return self.recording.array()
        finally:
            self.recording, self.fresh = None, {}

    def _run(self, table, first, last, threads=None):
        try:
            self.pool.run(table, first, last, threads)
        except MemoryError as error:
            raise OutOfMemory(str(error)) from None

    def _row(self, kernel, tags, arguments, parts, reads, writes):
        """Run a kernel, or record it; `reads` and `writes`: the arrays it does that to (weights need not be named)."""
        table = self.recording or Table()
        table.add(kernel.address(*tags), kernel.shape, arguments, parts, [*map(span, reads)], [*map(span, writes)])
        if self.recording is None:
            self._run(table.array(), 0, 1, threads=1 if parts == 1 else None)
        elif self.fresh:
            written = [*map(span, writes)]
            self.fresh = {key: kept for key, kept in self.fresh.items() if not overlap([kept[1]], written)}

    def _blocks(self, x):
        """Where the int8 blocks of x [n, …] are kept, as an array; a new one for each call outside of a recording."""
        n, columns = len(x), x.size // len(x)
        if self.recording is None:
            return np.zeros((n, row_bytes(columns)), np.uint8)
        key = at(x), columns
        if key not in self.blocks:
            self.blocks[key] = np.zeros((self.needs.n_tokens, row_bytes(columns)), np.uint8)
        return self.blocks[key][:n]

    def _written(self, x):
        """Blocks, and their address, for a kernel that writes those of its output x too; none where no product can use them."""
        if self.recording is None or (x.size // len(x)) % 32:
            return (), 0
        blocks = self._blocks(x)
        return (blocks,), at(blocks)

    def _up_to_date(self, x, blocks):
        if blocks:
            self.fresh[at(x), x.size // len(x)] = len(x), span(x)

    def _input(self, quant, x):
        """x [n, columns] as products with weights of type `quant` read it: an array of float32 or of int8 blocks."""
        if quant.block == 1:
            return x
        n, columns = x.shape
        blocks = self._blocks(x)
        if self.fresh.get((at(x), columns), (0,))[0] < n:
            arguments = at(blocks), at(x), columns, n, columns
            self._row(matmul.quantize, (), arguments, min(n, MOST_PARTS), [x], [blocks])
            if self.recording:
                self._up_to_date(x, (blocks,))
        return blocks

    def _share(self, nbytes):
        """Parts for a row that reads so many bytes of weights."""
        return min(max(nbytes // GRAIN, 1), PARTS_PER_THREAD * self.threads)

    # ---- verbs ----

    def embed(self, out, weight, tokens):
        arguments = at(out), weight.address, weight.row_bytes, at(tokens), *out.shape
        self._row(elementwise.embed, (weight.quant,), arguments, min(len(out), MOST_PARTS), [tokens], [out])

    def matmul(self, out, weight, x):
        (rows, columns), n = weight.shape, len(x)
        assert x.shape == (n, columns) and out.shape == (n, rows)
        source = self._input(weight.quant, x)
        few = n <= matmul.FEW
        parts = self._share(rows * weight.row_bytes) if few else min(max(rows * n // 4096, 1), MOST_PARTS)
        arguments = at(out), weight.address, at(source), n, rows, columns
        kernel = matmul.matmul if few else tile.matmul_many
        self._row(kernel, (weight.quant, self.isa), arguments, parts, [source], [out])

    def rms_norm(self, out, x, weight, eps):
        address, stride, n_rows, n = rows_at(x)
        assert out.shape == x.shape and weight.shape == (n,)
        blocks, q8 = self._written(out) if out.ndim == 2 else ((), 0)
        arguments = at(out), address, stride, at(weight), n_rows, n, q8, eps
        self._row(elementwise.rms_norm, (), arguments, _rows(n_rows, n), [x], [out, *blocks])
        self._up_to_date(out, blocks)

    def swiglu(self, out, gate, up):
        assert out.shape == gate.shape == up.shape
        blocks, q8 = self._written(out)
        n_rows, n = len(out), out.size // len(out)
        arguments = at(out), at(gate), at(up), n_rows, n, q8
        self._row(elementwise.swiglu, (), arguments, _rows(n_rows, n), [gate, up], [out, *blocks])
        self._up_to_date(out, blocks)

    def gate(self, out, x, g):
        address, stride, n_rows, n = rows_at(g)
        assert n in (1, x.shape[-1]) and n_rows == x.size // x.shape[-1] and out.shape == x.shape
        if n == 1:
            arguments = at(out), at(x), address, stride, n_rows, x.shape[-1]
            self._row(elementwise.gate_rows, (), arguments, _rows(n_rows, x.shape[-1]), [x, g], [out])
            return
        blocks, q8 = self._written(out)
        arguments = at(out), at(x), address, stride, len(x), n_rows // len(x), n, q8
        self._row(elementwise.gate, (), arguments, _rows(len(x), x.size // len(x)), [x, g], [out, *blocks])
        self._up_to_date(out, blocks)

    def add(self, out, x):
        assert out.shape == x.shape
        self._row(elementwise.add, (), (at(out), at(x), out.size), _rows(len(out), out.size // len(out)), [out, x], [out])

    def zero(self, out):
        self._row(elementwise.zero, (), (at(out), out.size), _rows(len(out), out.size // len(out)), [], [out])

    def rope(self, x, pos, freqs):
        n, n_head, d = x.shape
        assert 2 * len(freqs) <= d
        arguments = at(x), at(pos), at(freqs), n, n_head, d, 2 * len(freqs)
        self._row(elementwise.rope, (), arguments, _rows(n, n_head * d), [x, pos], [x])

    def store_kv(self, cache, k, v, pos):
        for part, x in ((cache.k, k), (cache.v, v)):
            assert len(x) <= part.shape[0] and x.shape[1] == part.shape[1]
            arguments = at(part), part.shape[2], at(x), at(pos), *x.shape
            self._row(elementwise.store_kv, (cache.quant,), arguments, _rows(len(x), x.size // len(x)), [x, pos], [part])

    def attention(self, out, q, cache, pos, scale):
        n, n_head, d_k = q.shape
        n_head_kv, d_v = cache.k.shape[1], out.shape[2]
        assert out.shape[:2] == q.shape[:2] and n_head % n_head_kv == 0 and n <= cache.k.shape[0]
        splits = attention.splits(n, n_head_kv)
        target = out if splits == 1 else self._partial(attention.scratch(n, n_head, d_v, splits))
        arguments = (
            at(target), at(q), at(cache.k), at(cache.v), cache.k.shape[2], cache.v.shape[2], at(pos),
            n, n_head, n_head_kv, d_k, d_v, splits, scale,
        )  # fmt: skip
        parts = min(attention.items(n, n_head_kv, splits), MOST_PARTS)
        self._row(attention.attention, (cache.quant,), arguments, parts, [q, cache.k, cache.v, pos], [target])
        if splits > 1:
            arguments = at(out), at(target), n * n_head, d_v, splits
            self._row(attention.attention_combine, (), arguments, _rows(n * n_head, d_v * splits), [target], [out])

    def _partial(self, n):
        """Scratch of n floats; it stays where it is, because recorded rows know its address."""
        if n not in self.partial:
            self.partial[n] = np.zeros(n, np.float32)
        return self.partial[n]

    def short_conv(self, out, x, weight, tail):
        assert out.shape == x.shape and weight.shape[0] == x.shape[1] and tail.shape == (weight.shape[1] - 1, x.shape[1])
        arguments = at(out), at(x), at(weight), at(tail), *x.shape, weight.shape[1]
        self._row(recurrent.short_conv, (), arguments, min(max(x.size // 2048, 1), 32), [x, tail], [out, tail])

    def delta_rule(self, out, qkv, alpha, beta, a, dt_bias, state):
        n, n_v_head, d_v = out.shape
        d_k = state.shape[1]
        n_k_head = (qkv.shape[1] - n_v_head * d_v) // (2 * d_k)
        assert alpha.shape == beta.shape == (n, n_v_head) and state.shape == (n_v_head, d_k, d_v)
        arguments = (
            at(out), at(qkv), at(alpha), at(beta), at(a), at(dt_bias), at(state), n, n_k_head, n_v_head, d_k, d_v, L2_EPS
        )  # fmt: skip
        self._row(recurrent.delta_rule, (), arguments, n_v_head, [qkv, alpha, beta, state], [out, state])

    def route(self, ids, weights, logits, near=None):
        address, n_near, also = (0, 0, []) if near is None else (at(near), near.shape[1], [near])
        arguments = at(ids), at(weights), at(logits), address, *logits.shape, ids.shape[1], n_near
        self._row(elementwise.route, (), arguments, min(len(ids), MOST_PARTS), [logits], [ids, weights, logits, *also])

    def post(self, box, ids, table=None, after=None):
        assert box.dtype == ids.dtype == np.int32 and ids.size <= len(box) - 2
        known = [] if table is None else [table]
        arguments = at(box), at(ids), ids.size, at(table) if known else 0
        self._row(post.post, (), arguments, 1, [ids, *known, *([] if after is None else [after])], [box])

    def wait(self, box, answer, table):
        self._row(post.wait, (), (at(box), at(answer)), 1, [box, answer], [table])

    def publish(self, answer, count):
        post.publish(at(answer), count)

    def top_k(self, ids, values, logits):
        k = ids.shape[1]
        for row, chosen, worth in zip(logits, ids, values, strict=True):
            found = np.array([row.argmax()])  # the first of equals, or of NaN
            if k > 1:
                found = np.flatnonzero(~(row < np.partition(row, -k)[-k]))
                order = -np.where(np.isnan(row[found]), np.inf, row[found])
                found = found[np.argsort(order, kind="stable")][:k]
            chosen[:], worth[:] = found, row[found]

    def expert_ffn(self, out, x, bank, table, ids, weights):
        (n, k), n_expert = ids.shape, len(table)
        pairs, (rows, columns) = n * k, bank.gate.shape
        assert pairs <= len(self.hidden) and n_expert <= self.needs.n_expert and x.shape == (n, columns)
        assert ids.dtype == table.dtype == np.int32
        gate, up, down = (part.quant for part in bank)
        x_gate, x_up = self._input(gate, x), self._input(up, x)
        few, chosen, count = n <= matmul.FEW, ids, pairs
        if not few:
            chosen, count = self.groups, n_expert
            self._row(experts.group_by_expert, (), (at(chosen), at(ids), pairs, n_expert), 1, [ids], [chosen])
        hidden, slots = self.hidden, at(table)
        arguments = (
            at(hidden), int(down.block == 1), at(bank.gate.addresses), at(bank.up.addresses), slots, at(chosen),
            at(x_gate), at(x_up), count, k, rows, columns,
        )  # fmt: skip
        parts = self._share(pairs * rows * (bank.gate.row_bytes + bank.up.row_bytes)) if few else MOST_PARTS
        kernel = experts.gate_up if few else experts.gate_up_many
        self._row(kernel, (gate, up, self.isa), arguments, parts, [x_gate, x_up, chosen, table], [hidden])
        arguments = (
            at(out), at(bank.down.addresses), slots, at(chosen), at(weights), at(hidden), n if few else n_expert, k,
            columns, rows,
        )  # fmt: skip
        parts = self._share(pairs * columns * bank.down.row_bytes) if few else min(MOST_PARTS, max(columns // 32, 1))
        kernel = experts.down if few else experts.down_many
        self._row(kernel, (down, self.isa), arguments, parts, [hidden, chosen, weights, table, out], [out])


def _rows(n_rows: int, n: int) -> int:
    """Parts for a light row over so many rows of n values."""
    return 1 if n_rows * n <= 1 << 14 else min(n_rows, 16)
