"""The kernels of the products, called directly: each type, tile edges, instruction sets, the same bits in any number of parts.

Tolerance: each of the at most 2·cols terms of a sum is rounded once, to 2**-24 of a partial sum. Terms are scale·q·x and
minimum·x, where scale·q and the minimum may be larger than the weight they make; in these random groups not 8 times max |W|.
"""

import gguf
import numpy as np
import pytest

from rgpu import kernels
from rgpu.kernels import experts, matmul, tile
from rgpu.quants import TYPES
from rgpu.quants.activations import rounded, row_bytes
from rgpu.quants.isa import best, supported
from tests.tiny import random_blocks

# Beside every type with the best instruction set: bytes below 128 in groups of 16, and above in groups of 32, with the others.
CASES = [*((name, best()) for name in TYPES), *((name, isa) for name in ("Q6_K", "Q8_0") for isa in supported()[1:])]
every_case = pytest.mark.parametrize("name, isa", CASES, ids=[f"{name}-{type(isa).__name__}" for name, isa in CASES])
PARTS = (2, 5, 64)


def run(kernel, tags, *arguments, parts=1):
    """All parts of a kernel, the last one first; arrays are given by their address."""
    kernels.build([(kernel, *tags)])
    assert all(a.flags.c_contiguous for a in arguments if isinstance(a, np.ndarray))
    arguments = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    for part in reversed(range(parts)):
        kernel.dispatcher(*tags, *arguments, part, parts)


def poisoned(*shape):
    return np.full(shape, np.nan, np.float32)


def matrices(rng, name, n, rows, cols):
    """n matrices as the file holds them, uint8 [n, bytes], and their values, float32 [n, rows, cols]."""
    quant = TYPES[name]
    if quant.block > 1:
        stored = random_blocks(rng, name, n * rows * cols // quant.block, 0.1)
    else:
        values = np.float32(0.1) * rng.standard_normal((n * rows, cols), np.float32)
        stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8)
    return stored.reshape(n, -1), quant.dequantize(stored.reshape(-1, quant.nbytes)).reshape(n, rows, cols)


def as_read(name, x):
    """x [n, cols] as products with this type read it, and the values that they see."""
    if TYPES[name].block == 1:
        return x, x
    rows = np.zeros((len(x), row_bytes(x.shape[1])), np.uint8)
    run(matmul.quantize, (), rows, x, x.shape[1], *x.shape)
    return rows, rounded(x)


def columns(name, at_least):
    """As few columns as the type allows; an odd number of 32, or of floats."""
    block = TYPES[name].block
    return at_least + 3 if block == 1 else -(-at_least // 64) * 64 + 32 if block == 32 else -(-at_least // block) * block


def bound(w, x):
    return 2 * w.shape[-1] * 2**-24 * 8 * np.abs(w).max() * np.abs(x).sum(axis=-1).max()


def close(got, wanted, bound):
    assert not np.isnan(got).any(), "not all of the output was written"
    np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


def test_activation_rows():
    rng = np.random.default_rng(1)
    n, cols, stride = 5, 96, 200
    x = rng.standard_normal((n, stride), np.float32)
    x[2, 32:64] = 0
    rows = np.full((n, row_bytes(cols)), 0x55, np.uint8)
    run(matmul.quantize, (), rows, x, stride, n, cols, parts=3)
    q = rows[:, :cols].view(np.int8).astype(np.float32).reshape(n, -1, 32)
    d, sums, halves = (rows[:, a * cols // 8 : b * cols // 8].copy().view(np.float32) for a, b in ((8, 9), (9, 10), (10, 12)))
    assert (q * d[:, :, None] == rounded(x[:, :cols]).reshape(n, -1, 32)).all()
    assert (sums == q.sum(axis=2) * d).all()
    assert (halves == q.reshape(n, -1, 16).sum(axis=2) * d.repeat(2, axis=1)).all()


@pytest.mark.parametrize("kernel", [matmul.matmul, tile.matmul_many], ids=lambda kernel: kernel.name)
@every_case
def test_matmul(name, isa, kernel):
    rng = np.random.default_rng(2)
    rows, cols, tags = 77, columns(name, 600), (TYPES[name], isa)
    (stored,), (w,) = matrices(rng, name, 1, rows, cols)
    for n in (1, 2, 3, 4, 5, 16, 33, tile.BATCH + 2):
        x, values = as_read(name, rng.standard_normal((n, cols), np.float32))
        out = poisoned(n, rows)
        run(kernel, tags, out, stored, x, n, rows, cols)
        close(out, values @ w.T, bound(w, values))
        for parts in PARTS:
            again = poisoned(n, rows)
            run(kernel, tags, again, stored, x, n, rows, cols, parts=parts)
            assert again.tobytes() == out.tobytes()


# ---- experts ----

N_EXPERT, K = 9, 3
SLOTS = np.array([5, 0, -1, 3, 7, 1, 2, 6, 4], np.int32)  # expert 2 is not done here
few_and_many = pytest.mark.parametrize("many", [False, True], ids=["few", "many"])


def routed(rng, n):
    """ids [n, K]: expert 0 takes part in every token, 8 in none; and weights [n, K]."""
    ids = 1 + rng.permuted(np.tile(np.arange(N_EXPERT - 2, dtype=np.int32), (n, 1)), axis=1)[:, :K]
    ids[:, 1] = 0
    return np.ascontiguousarray(ids), rng.uniform(0.1, 1, (n, K)).astype(np.float32)


def pairs_of(ids, many):
    """What kernels for few and for many tokens are told of the pairs, and the length that goes with it."""
    if not many:
        return ids, ids.size
    groups = np.full(N_EXPERT + 1 + ids.size, -1, np.int32)
    run(experts.group_by_expert, (), groups, ids, ids.size, N_EXPERT, parts=2)
    assert (groups[N_EXPERT + 1 :] == np.argsort(ids, axis=None, kind="stable")).all()
    return groups, N_EXPERT


def addresses(stored):
    return np.array([matrix.ctypes.data for matrix in stored], np.int64)


def check_gate_up(gate_name, up_name, isa, many):
    rng = np.random.default_rng(3)
    cols, tags = max(columns(gate_name, 500), columns(up_name, 500)), (TYPES[gate_name], TYPES[up_name], isa)
    kernel = experts.gate_up_many if many else experts.gate_up
    for n, rows in ((1, 70), (3, 96), (33, 64)):
        gates, gate = matrices(rng, gate_name, N_EXPERT, rows, cols)
        ups, up = matrices(rng, up_name, N_EXPERT, rows, cols)
        ids, _ = routed(rng, n)
        x = rng.standard_normal((n, cols), np.float32)
        (x_gate, gate_values), (x_up, up_values) = as_read(gate_name, x), as_read(up_name, x)
        pairs, count = pairs_of(ids, many)

        def hidden(h, floats, parts=1):
            arguments = addresses(gates), addresses(ups), SLOTS, pairs, x_gate, x_up, count, K, rows, cols  # noqa: B023
            run(kernel, tags, h, floats, *arguments, parts=parts)
            return h

        h = hidden(poisoned(n * K, rows), 1)
        slots, done = SLOTS[ids].ravel(), SLOTS[ids].ravel() >= 0
        g, u = (np.einsum("prc,pc->pr", w[slots], v.repeat(K, axis=0)) for w, v in ((gate, gate_values), (up, up_values)))
        wanted = g / (1 + np.exp(-g)) * u
        # The slope of x·sigmoid(x) is at most 1.1; exp, sum, quotient and two products are rounded, to 2**-22 together.
        error = 1.1 * bound(gate, gate_values) * np.abs(u).max() + bound(up, up_values) * np.abs(g).max()
        close(h[done], wanted[done], error + 2**-22 * np.abs(wanted).max())
        assert np.isnan(h[~done]).all()
        for parts in PARTS:
            assert hidden(poisoned(n * K, rows), 1, parts).tobytes() == h.tobytes()
        if rows % 32 == 0:
            blocks = np.zeros((n * K, row_bytes(rows)), np.uint8)
            run(matmul.quantize, (), blocks, h, rows, n * K, rows)
            for parts in (1, *PARTS):
                assert (hidden(np.zeros_like(blocks), 0, parts)[done] == blocks[done]).all()


@few_and_many
@every_case
def test_gate_up(name, isa, many):
    check_gate_up(name, name, isa, many)


@few_and_many
def test_gate_and_up_of_two_types(many):
    check_gate_up("Q8_0", "F32", best(), many)


@few_and_many
@every_case
def test_down(name, isa, many):
    rng = np.random.default_rng(4)
    rows, cols, tags = 77, columns(name, 60), (TYPES[name], isa)
    kernel = experts.down_many if many else experts.down
    downs, down = matrices(rng, name, N_EXPERT, rows, cols)
    for n in (1, 2, 33, tile.BATCH + 2):
        ids, weights = routed(rng, n)
        pairs, count = pairs_of(ids, many)
        h, values = as_read(name, rng.standard_normal((n * K, cols), np.float32))
        before = rng.standard_normal((n, rows), np.float32)

        def added(parts):
            out = before.copy()  # noqa: B023
            arguments = addresses(downs), SLOTS, pairs, weights, h, count if many else n, K, rows, cols  # noqa: B023
            run(kernel, tags, out, *arguments, parts=parts)
            return out

        y = np.einsum("prc,pc->pr", down[SLOTS[ids].ravel()], values).reshape(n, K, rows)
        wanted = before + np.einsum("tk,tkr->tr", np.where(SLOTS[ids] >= 0, weights, 0), y)
        out = added(1)
        close(out, wanted, K * bound(down, values) + 2 * K * 2**-24 * np.abs(wanted).max())
        assert all(added(parts).tobytes() == out.tobytes() for parts in PARTS)


def test_a_token_adds_its_experts_in_ascending_order():
    """Sums that cancel show the order: 1e8 + 1 - 1e8 is 0, 1e8 - 1e8 + 1 is 1."""
    quant, rows, cols = TYPES["F32"], 1, 32
    downs = np.zeros((3, cols), np.float32)
    downs[:, 0] = 1e8, 1, -1e8
    h, weights, table = np.ones((6, cols), np.float32), np.ones(6, np.float32), np.arange(3, dtype=np.int32)
    for ids in ([0, 1, 2, 2, 1, 0], [1, 0, 2, 2, 0, 1]):
        ids = np.array(ids, np.int32).reshape(2, 3)
        groups = np.zeros(4 + 6, np.int32)
        run(experts.group_by_expert, (), groups, ids, 6, 3)
        for kernel, pairs, count in ((experts.down, ids, 2), (experts.down_many, groups, 3)):
            out = np.zeros((2, rows), np.float32)
            run(kernel, (quant, best()), out, addresses(downs), table, pairs, weights, h, count, 3, rows, cols)
            assert (out == 0).all(), kernel.name
