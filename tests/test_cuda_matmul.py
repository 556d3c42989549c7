"""The CUDA kernels of the products on the stand-in: every type, sizes that are multiples of no tile, slots that are missing.

Two devices, with tensor cores and without, each with an order of its own; outputs are poisoned.

Tolerance: float32 sums of n terms in another order differ by about sqrt(n)·2**-24 of the sum of the terms' magnitudes; the terms
are scale·q·x and minimum·x, in these random groups not 4 times |w·x| together.
"""

from pathlib import Path

import numpy as np
import pytest

import rgpu
from rgpu.quants import TYPES
from rgpu.quants.activations import rounded
from tests.cuda_sim import SimDevice
from tests.test_kernels_matmul import matrices, poisoned

FOLDER = Path(rgpu.__file__).parent
DEVICES = [((8, 9), 0), ((6, 1), 1)]
TILE = 64  # tokens of a tile
every_type = pytest.mark.parametrize("name", TYPES)


def up(a, b):
    return -(-a // b)


def text(op, *types, **defines):
    """The text of an op: what is common, the types, what is defined, the pieces, the kernels."""
    front = ["kernels/common.cuh", *(f"quants/{name.lower()}.cuh" for name in ("blocks", "activations", *dict.fromkeys(types)))]
    back = ["kernels/matvec.cuh", "kernels/tile.cuh", f"kernels/{op}.cu"]
    lines = [f"#define {name} {value}\n" for name, value in defines.items()]
    return "".join([*((FOLDER / path).read_text() for path in front), *lines, *((FOLDER / path).read_text() for path in back)])


class Gpu:
    """A device and one stream; arrays go up as arguments, and the first argument is what the kernel writes."""

    def __init__(self, capability, seed):
        self.device = SimDevice(capability=capability, seed=seed)
        self.stream = self.device.stream()

    def put(self, array):
        address = self.device.allocate(array.nbytes)
        self.stream.upload(address, np.ascontiguousarray(array))
        return address

    def run(self, source, name, grid, block, out, *arguments, shared=0):
        """What becomes of `out`. Nothing else may change."""
        given = {i: self.put(a) for i, a in enumerate([out, *arguments]) if isinstance(a, np.ndarray)}
        values = [given.get(i, a) for i, a in enumerate([out, *arguments])]
        self.stream.launch(self.device.load(source).kernel(name), grid, block, values, shared)
        back = {i: np.empty_like([out, *arguments][i], order="C") for i in given}
        for i, array in back.items():
            self.stream.download(array, given[i])
            assert i == 0 or array.tobytes() == np.ascontiguousarray(arguments[i - 1]).tobytes()
        for address in given.values():
            self.device.free(address)
        return back[0]


@pytest.fixture(scope="module", params=DEVICES, ids=["sm_89", "sm_61"])
def gpu(request):
    gpu = Gpu(*request.param)
    yield gpu
    gpu.device.close()


# ---- geometry, as the kernels' files say ----


def warp_bytes(name):
    """WARP_BYTES of matvec.cuh."""
    quant = TYPES[name]
    nbytes = 256 // quant.block * quant.nbytes
    return 0 if quant.block == 1 else 16 * (up(nbytes, 16) * 16 + (16 if quant.nbytes % 16 else 0))


def group_rows(name, cols):
    """group_rows of matvec.cuh."""
    runs = cols // 32
    lanes = 32 if runs % 32 == 0 or runs > 64 else 16 if runs % 16 == 0 or runs > 32 else 8
    return 1 if TYPES[name].block == 1 else 64 // lanes


def matmul(gpu, name, stored, x, rows, cols, kernel, n_blocks=None):
    n, source = len(x), text("matmul", name, WEIGHT=name)
    out, arguments = poisoned(n, rows), (stored, as_read(gpu, name, x), n, rows, cols)
    if kernel == "matmul_many":
        return gpu.run(source, kernel, (up(rows, 128), up(n, TILE)), (32, 8), out, *arguments)
    grid = n_blocks or up(rows, 4 * group_rows(name, cols))
    return gpu.run(source, kernel, (grid,), (32, 4), out, *arguments, shared=4 * warp_bytes(name))


def quantize(gpu, x):
    n, cols = x.shape
    x8 = np.full(n * cols + n * cols // 4, 0x7F, np.uint8)
    return gpu.run(text("matmul"), "quantize", (up(x.size, 256),), (32, 8), x8, x, cols, n, cols)


def as_read(gpu, name, x):
    return x if TYPES[name].block == 1 else quantize(gpu, x)


def seen(name, x):
    """The values of x that products with this type see."""
    return x if TYPES[name].block == 1 else rounded(x)


def near(got, wanted, magnitude, n):
    """`magnitude`: the sum of |terms| of each sum of n."""
    assert not np.isnan(got).any(), "not all of the output was written"
    error, bound = np.abs(got - wanted), 4 * n**0.5 * 2**-24 * magnitude
    assert (error <= bound).all(), f"off by {error.max()}, {(error / bound).max()} times the bound"


def columns(name, runs):
    """About `runs` times 32 columns: whole blocks, and for floats a number that is no multiple of 16 bytes."""
    block = TYPES[name].block
    return 32 * runs + 3 if block == 1 else up(32 * runs, block) * block


# ---- matrices ----


def test_quantize(gpu):
    rng = np.random.default_rng(1)
    n, cols, stride = 5, 96, 200
    x = rng.standard_normal((n, stride), np.float32)
    x[2, 32:64] = 0
    x8 = gpu.run(text("matmul"), "quantize", (2,), (32, 8), np.full(n * cols * 5 // 4, 0x7F, np.uint8), x, stride, n, cols)
    q, (scale, total) = x8[: n * cols].view(np.int8), x8[n * cols :].view(np.float32).reshape(2, -1)
    assert (q.reshape(-1, 32) * scale[:, None] == rounded(x[:, :cols]).reshape(-1, 32)).all()
    assert (total == q.reshape(-1, 32).sum(axis=1, dtype=np.float32) * scale).all()


@every_type
def test_one_token(gpu, name):
    """All ways in which lanes share rows: 8, 16 and 32, the last piece of a row full or not; and fewer blocks than rows need."""
    rng = np.random.default_rng(2)
    for runs, rows in ((3, 70), (19, 37), (33, 21), (67, 9)):
        cols = columns(name, runs)
        (stored,), (w,) = matrices(rng, name, 1, rows, cols)
        x = rng.standard_normal((1, cols), np.float32)
        out, v = matmul(gpu, name, stored, x, rows, cols, "matmul_one"), seen(name, x)
        near(out, v @ w.T, np.abs(v) @ np.abs(w).T, cols)
        assert matmul(gpu, name, stored, x, rows, cols, "matmul_one", n_blocks=1).tobytes() == out.tobytes()


@every_type
def test_few_tokens(gpu, name):
    """Each token's result has the bits of one token alone, so that checking a draft is greedy decoding."""
    rng = np.random.default_rng(3)
    rows, cols = 13, columns(name, 20)
    (stored,), (w,) = matrices(rng, name, 1, rows, cols)
    x = rng.standard_normal((8, cols), np.float32)
    out, v = matmul(gpu, name, stored, x, rows, cols, "matmul_few"), seen(name, x)
    near(out, v @ w.T, np.abs(v) @ np.abs(w).T, cols)
    for n in range(1, 8):
        assert matmul(gpu, name, stored, x[:n], rows, cols, "matmul_few").tobytes() == out[:n].tobytes()
    assert matmul(gpu, name, stored, x[:1], rows, cols, "matmul_one").tobytes() == out[:1].tobytes()


@every_type
def test_many_tokens(gpu, name):
    rng = np.random.default_rng(4)
    for n, rows, runs in ((1, 5, 3), (9, 130, 5), (33, 37, 17), (130, 140, 9)):
        cols = columns(name, runs)
        (stored,), (w,) = matrices(rng, name, 1, rows, cols)
        x = rng.standard_normal((n, cols), np.float32)
        out, v = matmul(gpu, name, stored, x, rows, cols, "matmul_many"), seen(name, x)
        near(out, v @ w.T, np.abs(v) @ np.abs(w).T, cols)


# ---- experts ----

N_EXPERT = 11
SLOTS = np.array([5, 0, -1, 3, 7, 1, 2, 6, 10, 8, 4], np.int32)  # expert 2 is not done here, slot 9 is free


def routed(rng, n, k):
    """ids [n, k]: expert 0 takes part in every token, 10 in none; and weights [n, k]."""
    ids = 1 + rng.permuted(np.tile(np.arange(N_EXPERT - 2, dtype=np.int32), (n, 1)), axis=1)[:, :k]
    ids[:, k // 2] = 0
    return np.ascontiguousarray(ids), rng.uniform(0.1, 1, (n, k)).astype(np.float32)


class Placed:
    """Matrices in slots on the device: `table` of their addresses."""

    def __init__(self, gpu, stored):
        self.gpu, self.memory = gpu, [gpu.put(matrix) for matrix in stored]
        self.table = np.array(self.memory, np.int64)

    def __enter__(self):
        return self.table

    def __exit__(self, *_):
        for address in self.memory:
            self.gpu.device.free(address)


def group(gpu, ids):
    room = np.full(N_EXPERT + 1 + ids.size + ids.size // TILE + N_EXPERT, 77, np.int32)
    return gpu.run(text("experts"), "group_by_expert", (N_EXPERT,), (256,), room, ids, ids.size, N_EXPERT)


def product_many(gpu, name, matrices, groups, x, shared_by, n_pairs, rows, cols):
    """y [n_pairs, rows], NaN where a pair has no slot."""
    grid = up(rows, 128), n_pairs // TILE + N_EXPERT
    arguments = matrices, SLOTS, groups, as_read(gpu, name, x), len(x), shared_by, n_pairs, N_EXPERT, rows, cols
    return gpu.run(text("experts", name, WEIGHT=name), "product_many", grid, (32, 8), poisoned(n_pairs, rows), *arguments)


def hidden(gpu, gate_name, up_name, gates, ups, ids, x, rows, floats, warps):
    """h of the few-token kernel: float32 [n_pairs, rows], NaN where a pair has no slot, or its int8 blocks."""
    (n, k), cols = ids.shape, x.shape[1]
    room = poisoned(n * k, rows) if floats else np.full(n * k * rows * 5 // 4, 0x7F, np.uint8)
    arguments = gates, ups, SLOTS, ids, as_read(gpu, gate_name, x), as_read(gpu, up_name, x), n, k, rows, cols
    source = text("experts", gate_name, up_name, GATE=gate_name, UP=up_name)
    nbytes = max(warp_bytes(gate_name), warp_bytes(up_name))
    while warps * nbytes > gpu.device.shared_per_block:
        warps //= 2
    return gpu.run(source, "gate_up", (up(rows, 32), n * k), (32, warps), room, int(floats), *arguments, shared=warps * nbytes)


def swiglu(gpu, gate, up_, ids, floats):
    room = poisoned(*gate.shape) if floats else np.full(gate.size * 5 // 4, 0x7F, np.uint8)
    grid = (up(len(gate) * up(gate.shape[1], 32), 8),)
    return gpu.run(text("experts"), "swiglu_many", grid, (32, 8), room, int(floats), gate, up_, SLOTS, ids, *gate.shape)


def blocks_of(x8, shape):
    """The int8 blocks of each row, uint8 [rows, 1.25 · columns]."""
    n = np.prod(shape)
    planes = x8[:n], x8[n : n + n // 8], x8[n + n // 8 :]
    return np.concatenate([plane.reshape(shape[0], -1) for plane in planes], axis=1)


def check_gate_up(gpu, gate_name, up_name):
    """h for few tokens, and products for many; both then become the same int8 blocks as h in float32 would."""
    rng = np.random.default_rng(5)
    for n, k, rows, runs, warps in ((1, 8, 64, 3, 16), (3, 2, 40, 9, 4), (33, 3, 32, 5, 0)):
        cols = columns(max(gate_name, up_name, key=lambda name: TYPES[name].block), runs)
        (gates, gate), (ups, up_) = matrices(rng, gate_name, N_EXPERT, rows, cols), matrices(rng, up_name, N_EXPERT, rows, cols)
        ids, _ = routed(rng, n, k)
        x = rng.standard_normal((n, cols), np.float32)
        slots, done = SLOTS[ids].ravel(), SLOTS[ids].ravel() >= 0
        (g, g_all), (u, u_all) = (
            (np.einsum("prc,pc->pr", w[slots], v), np.einsum("prc,pc->pr", np.abs(w[slots]), np.abs(v)))
            for w, v in ((gate, seen(gate_name, x).repeat(k, axis=0)), (up_, seen(up_name, x).repeat(k, axis=0)))
        )
        with Placed(gpu, gates) as at_gate, Placed(gpu, ups) as at_up:
            if warps:
                h = hidden(gpu, gate_name, up_name, at_gate, at_up, ids, x, rows, True, warps)
                if rows % 32 == 0:
                    x8 = hidden(gpu, gate_name, up_name, at_gate, at_up, ids, x, rows, False, 2)
            else:
                groups = group(gpu, ids)
                arguments = groups, x, k, n * k, rows, cols
                y_gate = product_many(gpu, gate_name, at_gate, *arguments)
                y_up = product_many(gpu, up_name, at_up, *arguments)
                near(y_gate[done], g[done], g_all[done], cols)
                near(y_up[done], u[done], u_all[done], cols)
                h, x8 = (swiglu(gpu, y_gate, y_up, ids, floats) for floats in (True, False))
        # The slope of x·sigmoid(x) is at most 1.1; exp, sum, quotient and product are rounded to 2**-22 together, below the rest.
        near(h[done], (g / (1 + np.exp(-g)) * u)[done], (1.1 * g_all * np.abs(u) + np.abs(g) * u_all)[done], cols)
        assert np.isnan(h[~done]).all()
        if rows % 32 == 0:
            wanted = blocks_of(quantize(gpu, np.where(done[:, None], h, 1)), h.shape)
            assert (blocks_of(x8, h.shape)[done] == wanted[done]).all()
            assert (blocks_of(x8, h.shape)[~done] == 0x7F).all()


@every_type
def test_gate_up(gpu, name):
    check_gate_up(gpu, name, name)


def test_gate_and_up_of_two_types(gpu):
    check_gate_up(gpu, "Q4_K", "Q8_0")
    check_gate_up(gpu, "Q5_0", "F32")


def add_down(gpu, name, downs, ids, weights, h, out, cols, many):
    """out + what the kernels for few or for many tokens add."""
    (n, k), rows = ids.shape, out.shape[1]
    if many:
        y = product_many(gpu, name, downs, group(gpu, ids), h, 1, n * k, rows, cols)
        return gpu.run(text("experts"), "combine", (up(rows, 256), n), (256,), out, y, SLOTS, ids, weights, k, rows)
    warps = min(16, k * max(1, 8 // k))
    grid = up(up(rows, group_rows(name, cols)), max(1, warps // k)), n
    arguments = downs, SLOTS, ids, weights, as_read(gpu, name, h), n, k, rows, cols
    source, shared = text("experts", name, WEIGHT=name), warps * warp_bytes(name)
    return gpu.run(source, "down", grid, (32, warps), out, *arguments, shared=shared)


@every_type
def test_down(gpu, name):
    rng = np.random.default_rng(6)
    for n, k, rows, runs in ((1, 1, 77, 8), (2, 8, 37, 16), (3, 3, 19, 33), (9, 2, 33, 3), (130, 3, 140, 2)):
        cols = columns(name, runs)
        downs, down = matrices(rng, name, N_EXPERT, rows, cols)
        ids, weights = routed(rng, n, k)
        h, before = rng.standard_normal((n * k, cols), np.float32), rng.standard_normal((n, rows), np.float32)
        with Placed(gpu, downs) as at:
            out = add_down(gpu, name, at, ids, weights, h, before, cols, many=n > 8)
        factors, w, v = np.where(SLOTS[ids] >= 0, weights, 0), down[SLOTS[ids].ravel()], seen(name, h)
        y, y_all = (np.einsum("prc,pc->pr", w, v).reshape(n, k, rows) for w, v in ((w, v), (np.abs(w), np.abs(v))))
        wanted, magnitude = (a + np.einsum("tk,tkr->tr", factors, b) for a, b in ((before, y), (np.abs(before), y_all)))
        near(out, wanted, magnitude, cols)


def test_groups(gpu):
    rng = np.random.default_rng(7)
    for n, k in ((1, 1), (9, 8), (33, 3), (130, 3)):
        ids, _ = routed(rng, n, k)
        groups = group(gpu, ids)
        starts, order, tiles = np.split(groups, [N_EXPERT + 1, N_EXPERT + 1 + ids.size])
        counts = np.bincount(ids.ravel(), minlength=N_EXPERT)
        assert (starts == np.append(0, np.cumsum(counts))).all() and (order == np.argsort(ids, axis=None, kind="stable")).all()
        assert (np.bincount(tiles[tiles >= 0], minlength=N_EXPERT) == up(counts, TILE)).all()
        for e, count in enumerate(counts):
            first = starts[e] // TILE + e
            assert (tiles[first : first + up(count, TILE)] == e).all()


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_a_token_adds_its_experts_in_ascending_order(gpu, many):
    """Sums that cancel show the order: 1e8 + 1 - 1e8 is 0, 1e8 - 1e8 + 1 is 1."""
    values = np.zeros((N_EXPERT, 1, 32), np.float32)
    values[SLOTS[[0, 3, 5]], 0, 0] = 1e8, 1, -1e8
    h, weights = np.ones((6, 32), np.float32), np.ones((2, 3), np.float32)
    with Placed(gpu, values.view(np.uint8).reshape(N_EXPERT, -1)) as at:
        for ids in ([0, 3, 5, 5, 3, 0], [3, 0, 5, 5, 0, 3]):
            ids = np.array(ids, np.int32).reshape(2, 3)
            assert (add_down(gpu, "F32", at, ids, weights, h, np.zeros((2, 1), np.float32), 32, many) == 0).all()
