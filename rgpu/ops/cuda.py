"""The verbs on a CUDA device: check shapes and launch kernels on one stream, or replay a step that was captured.

Everything that a step touches has a fixed address, and what changes (tokens, position) is read from device memory. A key's first
step is run, which makes all scratch; the second is captured into a graph; from then on a step is one launch.
"""

import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from . import L2_EPS, check
from .cuda_source import group_rows, jobs, text, up, warp_bytes
from .device import Device
from .device_array import DeviceArray, Heap, Memory
from .staging import Staging

BLOCK = 256
LARGE = 1 << 16  # bytes from which on an upload goes through page-locked memory
FEW = 8  # tokens of a step: products go row by row; more are tiled
KEPT_GRAPHS = 16
COMPILERS = max(os.cpu_count() or 1, 1)  # kernels that are compiled at once


def rows_of(x: DeviceArray) -> tuple[int, int, int]:
    """(floats between rows, rows, row length) of an array whose leading axes are evenly spaced rows."""
    n, stride = x.shape[-1], x.strides[-2] // 4
    assert x.dtype == np.float32 and x.strides[-1] == 4
    assert all(x.strides[i] == x.strides[i + 1] * x.shape[i + 1] for i in range(x.ndim - 2) if x.shape[i] > 1)
    return stride, x.size // n, n


@check
class CudaOps:
    name = "cuda"
    reads_host_memory = False

    def __init__(self, device: Device):
        self.device, self.heap = device, Heap(device)
        self.stream = device.stream()
        self.graphs: OrderedDict = OrderedDict()  # key -> a graph, or None after the first run
        self.blocks: dict[tuple[int, int, int], DeviceArray] = {}  # (address, columns, rows) -> its int8 blocks
        self.fresh: dict[tuple[int, int], tuple[int, tuple[int, int]]] = {}  # … -> rows up to date in this step, their span
        self.banks: dict[int, tuple] = {}  # id -> the bank, and its slots' addresses on the device
        self.scratch: dict[tuple, DeviceArray] = {}
        self.modules: dict[tuple, Future] = {}
        self.kernels: dict[tuple, object] = {}
        self.staging: Staging | None = None
        self.in_step = False

    # ---- memory ----

    def close(self):
        """Give everything back to the device; arrays of these ops are worth nothing any more."""
        self.device.close()

    def empty(self, shape, dtype):
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = Memory(self.heap, nbytes)
        if nbytes:
            self.stream.fill(memory.address, 0, nbytes)
        return DeviceArray(memory, memory.address, shape, dtype)

    def upload(self, array):
        out = DeviceArray(memory := Memory(self.heap, array.nbytes), memory.address, array.shape, array.dtype)
        self.write(out, array)
        return out

    def write(self, out, values):
        assert out.shape == values.shape and out.dtype == values.dtype and out.contiguous
        values = np.ascontiguousarray(values)
        if values.nbytes > LARGE:
            self.staging = self.staging or Staging(self.device, self.stream)
            self.staging.upload(out.address, values)
        elif values.nbytes:
            self.stream.upload(out.address, values)
        self._changed(out)

    def to_host(self, x):
        out = np.empty(x.shape, x.dtype)
        if x.contiguous:
            self.stream.download(out, x.address)
        else:
            for i in range(len(x)):
                out[i] = self.to_host(x[i])
        self.stream.synchronize()
        return out

    def copy(self, out, x):
        assert out.shape == x.shape and out.dtype == x.dtype and out.contiguous and x.contiguous
        self.stream.copy(out.address, x.address, x.nbytes)
        self._changed(out)

    # ---- steps ----

    def replay(self, key, step):
        if key is None or key not in self.graphs:
            self._step(step)
        elif self.graphs[key] is None:
            with self.heap.held(), self.stream.capture() as graph:
                self._step(step)
            self.graphs[key] = graph
        if key is not None:
            if graph := self.graphs.setdefault(key, None):
                self.stream.replay(graph)
            self.graphs.move_to_end(key)
            if len(self.graphs) > KEPT_GRAPHS:
                self.graphs.popitem(last=False)

    def _step(self, step):
        self.in_step, self.fresh = True, {}
        try:
            step()
        finally:
            self.in_step, self.fresh = False, {}

    def _changed(self, *arrays):
        """What was made of these arrays is out of date."""
        if self.fresh:
            spans = [array.span for array in arrays]
            kept = ((k, v) for k, v in self.fresh.items() if not any(a < v[1][1] and v[1][0] < b for a, b in spans))
            self.fresh = dict(kept)

    # ---- kernels ----

    def prepare(self, needs, progress):
        todo = jobs(needs)
        self.needs = needs
        threads = ThreadPoolExecutor(COMPILERS, "rgpu-compiler")
        for op, defines in todo:
            key = " ".join([op, *defines]), *defines.values()
            self.modules[key] = threads.submit(self.device.load, text(op, **defines))
        threads.shutdown(wait=False)

        def finish():
            for done, (key, module) in enumerate(self.modules.items()):
                if progress and not module.done():
                    progress(done, len(todo), " ".join(map(str, key)))
                module.result()
            if progress:
                progress(len(todo), len(todo), "")

        return finish

    def _launch(self, module, name, grid, block, arguments, writes, shared=0):
        """Launch a kernel of a module, ("op DEFINED", value) or without; `writes`: the arrays that it changes."""
        if (module, name) not in self.kernels:
            self.kernels[module, name] = self.modules[module].result().kernel(name)
        self.stream.launch(self.kernels[module, name], grid, block, arguments, shared)
        self._changed(*writes)

    def _each(self, name, arguments, count, writes):
        """Launch a kernel that goes over `count` values."""
        grid = min(up(count, BLOCK), 8 * self.device.multiprocessors)
        self._launch(("elementwise",), name, (grid,), (BLOCK,), arguments, writes)

    def _scratch(self, name, shape, dtype=np.float32):
        """An array that stays where it is, because captured steps know its address."""
        key = name, shape
        if key not in self.scratch:
            self.scratch[key] = self.empty(shape, dtype)
        return self.scratch[key]

    # ---- int8 blocks of a product's input: made once, and kept while it stays as it is ----

    def _blocks(self, x):
        """Where the blocks of x [n, …] are kept; a product's kernel finds its parts by n."""
        n, columns = len(x), x.size // len(x)
        rows = max(n, self.needs.n_tokens)
        key = x.address, columns, rows
        if key not in self.blocks:
            self.blocks[key] = self.empty((rows * columns * 5 // 4,), np.uint8)
        return self.blocks[key].address

    def _written(self, x):
        """The address of blocks for a kernel that writes those of its output x too; 0 where no product can use them."""
        return 0 if (x.size // len(x)) % 32 or not self.in_step else self._blocks(x)

    def _up_to_date(self, x, blocks):
        if blocks:
            self.fresh[x.address, x.size // len(x)] = len(x), x.span

    def _input(self, quant, x):
        """The address of x [n, columns] as products with weights of type `quant` read it: float32, or int8 blocks."""
        if quant.block == 1:
            assert x.contiguous
            return x.address
        n, columns = x.shape
        blocks = self._blocks(x)
        if self.fresh.get((x.address, columns)) != (n, x.span):
            arguments = blocks, x.address, x.strides[0] // 4, n, columns
            self._launch(("matmul",), "quantize", (up(n * columns // 32, 8),), (32, 8), arguments, [])
            if self.in_step:
                self._up_to_date(x, blocks)
        return blocks

    def matmul(self, out, weight, x):
        (rows, columns), n, quant = weight.shape, len(x), weight.quant
        assert x.shape == (n, columns) and out.shape == (n, rows)
        arguments = out.address, weight.data.address, self._input(quant, x), n, rows, columns
        module = "matmul WEIGHT", type(quant).__name__
        if n > FEW:
            self._launch(module, "matmul_many", (up(rows, 128), up(n, 64)), (32, 8), arguments, [out])
            return
        groups = up(rows, group_rows(quant, columns))
        warps = min(max(groups // self.device.multiprocessors, 1), 4)  # of a block: few rows still reach all multiprocessors
        name = "matmul_one" if n == 1 else "matmul_few"
        self._launch(module, name, (up(groups, warps),), (32, warps), arguments, [out], warps * warp_bytes(quant))

    # ---- rows ----

    def embed(self, out, weight, tokens):
        n, n_embd = out.shape
        quant = type(weight.quant).__name__
        arguments = out.address, weight.data.address, tokens.address, n_embd
        self._launch(("elementwise WEIGHT", quant), "embed", (up(n_embd, 1024), n), (128,), arguments, [out])

    def rms_norm(self, out, x, weight, eps):
        stride, n_rows, n = rows_of(x)
        assert out.shape == x.shape and weight.shape == (n,) and out.contiguous
        blocks = self._written(out) if out.ndim == 2 else 0
        block = 32 if n <= 256 else min(1024, 32 * up(n, 128))
        arguments = out.address, x.address, stride, weight.address, n, blocks, float(eps)
        self._launch(("elementwise",), "rms_norm", (n_rows,), (block,), arguments, [out])
        self._up_to_date(out, blocks)

    def swiglu(self, out, gate, up):
        assert out.shape == gate.shape == up.shape and out.contiguous and gate.contiguous and up.contiguous
        blocks = self._written(out)
        self._each("swiglu", (out.address, gate.address, up.address, out.size, blocks), out.size, [out])
        self._up_to_date(out, blocks)

    def gate(self, out, x, g):
        stride, n_rows, n = rows_of(g)
        assert n in (1, x.shape[-1]) and n_rows == x.size // x.shape[-1]
        assert out.shape == x.shape and out.contiguous and x.contiguous
        if n == 1:
            self._each("gate_rows", (out.address, x.address, g.address, stride, x.shape[-1], out.size), out.size, [out])
            return
        blocks = self._written(out)
        self._each("gate", (out.address, x.address, g.address, stride, n, out.size, blocks), out.size, [out])
        self._up_to_date(out, blocks)

    def add(self, out, x):
        assert out.shape == x.shape and out.contiguous and x.contiguous
        self._each("add", (out.address, x.address, out.size), out.size, [out])

    def zero(self, out):
        self._each("zero", (out.address, out.size), out.size, [out])

    def rope(self, x, pos, freqs):
        n, n_head, d = x.shape
        assert 2 * len(freqs) <= d
        arguments = x.address, pos.address, freqs.address, n, n_head, d, len(freqs)
        self._each("rope", arguments, n * n_head * len(freqs), [x])

    # ---- attention and recurrence ----

    def store_kv(self, cache, k, v, pos):
        n, n_head_kv, d_k = k.shape
        rows = n_head_kv * d_k, n_head_kv * v.shape[2]
        arguments = cache.k.address, cache.v.address, k.address, v.address, pos.address, n, *rows
        grid = up(n * max(rows), BLOCK), 2
        self._launch(("elementwise KV", type(cache.quant).__name__), "store_kv", grid, (BLOCK,), arguments, [])

    def attention(self, out, q, cache, pos, scale):
        n, n_head, d = q.shape
        n_head_kv, module = cache.k.shape[1], ("attention KV HEAD", type(cache.quant).__name__, d)
        queries, cores = n * (n_head // n_head_kv), 2 * self.device.multiprocessors
        assert out.shape == q.shape and n_head % n_head_kv == 0 and n <= cache.k.shape[0]
        few = n <= FEW or cache.quant.nbytes > 2 * cache.quant.block
        groups, most = (up(queries, 8), 64) if few else (up(queries, 64), 16)
        ranges = min(max(cores // (n_head_kv * groups), 1), most)
        target = out if ranges == 1 else self._scratch("partial", (64 * cores, d + 2))  # for any n
        arguments = target.address, q.address, cache.k.address, cache.v.address, pos.address, n, n_head, n_head_kv, float(scale)
        name, grid = ("attention", (ranges, n_head_kv, groups)) if few else ("attention_many", (groups, n_head_kv, ranges))
        self._launch(module, name, grid, (128,), arguments, [target])
        if ranges > 1:
            arguments = out.address, target.address, ranges
            self._launch(module, "attention_combine", (n * n_head,), (128,), arguments, [out])

    def short_conv(self, out, x, weight, tail):
        n, channels = x.shape
        assert out.shape == x.shape and weight.shape[0] == channels and tail.shape == (weight.shape[1] - 1, channels)
        arguments = out.address, x.address, weight.address, tail.address, n, channels, weight.shape[1]
        module = "recurrent HEAD", self.needs.recurrent
        self._launch(module, "short_conv", (up(channels, 128), up(n, 32)), (128,), arguments, [out, tail])

    def delta_rule(self, out, qkv, alpha, beta, a, dt_bias, state):
        n, n_v_head, d_v = out.shape
        d_k = state.shape[1]
        n_k_head = (qkv.shape[1] - n_v_head * d_v) // (2 * d_k)
        assert alpha.shape == beta.shape == (n, n_v_head) and state.shape == (n_v_head, d_k, d_v)
        arrays = (x.address for x in (out, qkv, alpha, beta, a, dt_bias, state))
        arguments = *arrays, n, n_k_head, n_v_head, d_v, L2_EPS
        self._launch(("recurrent HEAD", d_k), "delta_rule", (up(d_v, 32), n_v_head), (128,), arguments, [out, state])

    # ---- experts ----

    def route(self, ids, weights, logits, near=None):
        n, n_expert = logits.shape
        assert near is None, "near misses are for arenas"
        arguments = ids.address, weights.address, logits.address, n, n_expert, ids.shape[1]
        block = (32, 1) if n == 1 else (32, 4)
        self._launch(("elementwise",), "route", (up(n, block[1]),), block, arguments, [ids, weights])

    def top_k(self, ids, values, logits):
        (rows, n_vocab), k = logits.shape, ids.shape[1]
        best, following = (self._scratch(name, (rows * up(n_vocab, 2048) * k,), np.uint64) for name in ("best", "following"))
        n, source, target = n_vocab, 0, best.address
        while True:
            blocks = up(n, 2048)
            arguments = ids.address, values.address, target, source, logits.address, n_vocab, n, k
            self._launch(("sample",), "top_k", (blocks, rows), (512,), arguments, [ids, values])
            if blocks == 1:
                return
            n, source, target = blocks * k, target, following.address if target == best.address else best.address

    def post(self, box, ids, table=None, after=None):
        arguments = box.address, ids.address, ids.size, table.address if table is not None else 0
        self._launch(("post",), "post", (1,), (32,), arguments, [])

    def wait(self, box, answer, table):
        self._launch(("post",), "wait", (1,), (1,), (box.address, answer.address), [table])

    def publish(self, answer, count):
        raise AssertionError("boxes in mapped memory are answered by the host")

    def expert_ffn(self, out, x, bank, table, ids, weights):
        assert x.shape == (len(ids), bank.gate.shape[1]) and ids.dtype == table.dtype == np.int32
        steps = self._few_experts if len(ids) <= FEW else self._many_experts
        steps(out, x, bank, table, ids, weights)

    def _slots(self, bank):
        """Device addresses of the slots' addresses, of gate, up and down."""
        if id(bank) not in self.banks:
            self.banks[id(bank)] = bank, [self.upload(part.addresses) for part in bank]
        return [addresses.address for addresses in self.banks[id(bank)][1]]

    def _few_experts(self, out, x, bank, table, ids, weights):
        """Pair by pair, one expert for one token: gate and up, then down."""
        (n, k), (rows, columns) = ids.shape, bank.gate.shape
        gate, up_, down = (part.quant for part in bank)
        gates, ups, downs = self._slots(bank)
        hidden = self._hidden(n * k, rows, down)
        stage, shared = max(warp_bytes(gate), warp_bytes(up_)), self.device.shared_per_block
        warps = next(w for w in (16, 8, 4) if w * stage <= shared)
        inputs = self._input(gate, x), self._input(up_, x)
        arguments = hidden, int(down.block == 1), gates, ups, table.address, ids.address, *inputs, n, k, rows, columns
        module = "experts GATE UP", type(gate).__name__, type(up_).__name__
        self._launch(module, "gate_up", (up(rows, 32), n * k), (32, warps), arguments, [], warps * stage)
        warps = min(16, k * max(1, 8 // k))
        grid = up(up(columns, group_rows(down, rows)), max(1, warps // k)), n
        arguments = out.address, downs, table.address, ids.address, weights.address, hidden, n, k, columns, rows
        module, shared = ("experts WEIGHT", type(down).__name__), warps * warp_bytes(down)
        self._launch(module, "down", grid, (32, warps), arguments, [out], shared)

    def _many_experts(self, out, x, bank, table, ids, weights):
        """Expert by expert: each one's matrices are read once for all of its tokens."""
        (n, k), (rows, columns) = ids.shape, bank.gate.shape
        gate, up_, down = (part.quant for part in bank)
        gates, ups, downs = self._slots(bank)
        pairs, n_expert, most = n * k, len(table), self.needs.n_tokens * k
        tiles = pairs // 64 + n_expert
        groups = self._scratch("groups", (n_expert + 1 + most + most // 64 + n_expert,), np.int32).address
        products = self._scratch("products", (most * max(2 * rows, columns),)).address
        hidden = self._hidden(pairs, rows, down)
        y_gate, y_up = products, products + 4 * pairs * rows

        def multiply(quant, y, matrices, source, x_rows, shared_by, n_rows, n_columns):
            arguments = y, matrices, table.address, groups, source, x_rows, shared_by, pairs, n_expert, n_rows, n_columns
            module = "experts WEIGHT", type(quant).__name__
            self._launch(module, "product_many", (up(n_rows, 128), tiles), (32, 8), arguments, [])

        self._launch(("experts",), "group_by_expert", (n_expert,), (256,), (groups, ids.address, pairs, n_expert), [])
        multiply(gate, y_gate, gates, self._input(gate, x), n, k, rows, columns)
        multiply(up_, y_up, ups, self._input(up_, x), n, k, rows, columns)
        arguments = hidden, int(down.block == 1), y_gate, y_up, table.address, ids.address, pairs, rows
        self._launch(("experts",), "swiglu_many", (up(pairs * up(rows, 32), 8),), (32, 8), arguments, [])
        multiply(down, products, downs, hidden, pairs, 1, columns, rows)
        arguments = out.address, products, table.address, ids.address, weights.address, k, columns
        self._launch(("experts",), "combine", (up(columns, 256), n), (256,), arguments, [out])

    def _hidden(self, pairs, rows, down):
        """The address of h for so many pairs: float32, or int8 blocks."""
        assert down.block == 1 or rows % 32 == 0
        most = max(pairs, self.needs.n_tokens * self.needs.n_expert_used)
        return self._scratch("hidden", (4 * most * rows,), np.uint8).address
