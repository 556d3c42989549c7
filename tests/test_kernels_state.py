"""The kernels of rows, attention and recurrence against the reference's formulas: odd sizes, and any number of parts.

Tolerances: a float32 sum of n products in another order differs by about sqrt(n)·2**-24 of the sum of magnitudes; `close`
takes 8 of those for n <= 4096, times `scale` where a result passes through several such sums.
"""

import numpy as np
import pytest

from rgpu import kernels
from rgpu.kernels import attention, elementwise, recurrent
from rgpu.kernels.microkernel import LANES, ROWS, SQUARE, add_product, transpose
from rgpu.kernels.scalar import exp, floats, sigmoid
from rgpu.ops import L2_EPS
from rgpu.ops.reference import ReferenceOps
from rgpu.quants import TYPES
from rgpu.quants.activations import rounded, row_bytes
from rgpu.state import KVCache

REFERENCE = ReferenceOps()
TOKENS = (1, 2, 3, 7, 17, 33)
PARTS = (1, 2, 5, 64)
KV_TYPES = ("F32", "F16", "Q8_0")
EPS = 1e-6


def at(x):
    return x.ctypes.data


def poisoned(*shape):
    return np.full(shape, np.nan, np.float32)


def close(got, wanted, scale=1.0):
    assert not np.isnan(got).any(), "not all of the output was written"
    bound = 8 * 2**-24 * 64 * scale * max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


def runs(kernel, tags, arguments, *outputs):
    """Run a kernel as 1, 2, 5 and 64 parts, last part first, each time on fresh copies of the outputs; returns the outputs.

    `arguments(*outputs)` gives a call's addresses and sizes. All runs must leave the same bits.
    """
    kernels.build([(kernel, *tags)])
    results = []
    for parts in PARTS:
        mine = [o.copy() for o in outputs]
        for part in reversed(range(parts)):
            kernel.dispatcher(*tags, *arguments(*mine), part, parts)
        results.append(mine)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    return results[0]


def activations(rows, n):
    """int8 activation rows uint8 [n_rows, row_bytes(n)] -> the values d·q."""
    q = rows[:, :n].view(np.int8).astype(np.float32)
    d = np.ascontiguousarray(rows[:, n : n + n // 8]).view(np.float32)
    return q * d.repeat(32, axis=1)


def reference(verb, *arguments):
    """The first argument of a verb of the reference, after the call."""
    getattr(REFERENCE, verb)(*arguments)
    return arguments[0]


# ---- rows ----


@pytest.mark.parametrize("width", [64, 96, 40])
@pytest.mark.parametrize("n", TOKENS)
def test_norms(n, width):
    rng = np.random.default_rng(n + width)
    wide, w = rng.standard_normal((n, 2 * width), np.float32), rng.standard_normal(width, np.float32)
    q8 = np.zeros((n, row_bytes(width)), np.uint8)
    wanted = reference("rms_norm", poisoned(n, width), wide[:, :width], w, EPS)
    asked = width % 32 == 0

    def norm(out, q8):
        return at(out), at(wide), 2 * width, at(w), n, width, at(q8) if asked else 0, EPS

    out, rows = runs(elementwise.rms_norm, (), norm, poisoned(n, width), q8)
    close(out, wanted)
    if asked:
        np.testing.assert_array_equal(activations(rows, width), rounded(out))


@pytest.mark.parametrize("width", [32, 96, 20])
@pytest.mark.parametrize("n", TOKENS)
def test_gates(n, width):
    rng = np.random.default_rng(n + width)
    n_head, columns, asked = 3, 3 * width, width % 32 == 0
    x, z = (rng.standard_normal((n, n_head, width), np.float32) for _ in range(2))
    both = rng.standard_normal((n, n_head, 2 * width), np.float32)
    g, q8 = both[..., width:], np.zeros((n, row_bytes(columns)), np.uint8)
    large = 30 * x
    cases = [  # kernel, its arguments, what lies in `out` before, the reference's verb and inputs
        (elementwise.swiglu, lambda o: (at(o), at(large), at(z), n, columns), poisoned(*x.shape), ("swiglu", large, z)),
        (elementwise.swiglu, lambda o: (at(o), at(o), at(z), n, columns), x, ("swiglu", x, z)),
        (elementwise.gate, lambda o: (at(o), at(o), at(g), 2 * width, n, n_head, width), x, ("gate", x, g)),
    ]
    for kernel, sizes, start, (verb, *inputs) in cases:

        def arguments(out, q8, sizes=sizes):
            return (*sizes(out), at(q8) if asked else 0)

        out, rows = runs(kernel, (), arguments, start, q8)
        close(out, reference(verb, poisoned(*x.shape), *inputs), scale=4)
        if asked:
            np.testing.assert_array_equal(activations(rows, columns), rounded(out.reshape(n, columns)))


@pytest.mark.parametrize("n", TOKENS)
def test_plain_rows(n):
    rng = np.random.default_rng(n)
    x, y, column = (rng.standard_normal((n, width), np.float32) for width in (1100, 1100, 3))
    (out,) = runs(elementwise.add, (), lambda o: (at(o), at(y), x.size), x)
    np.testing.assert_array_equal(out, x + y)
    (out,) = runs(elementwise.zero, (), lambda o: (at(o), x.size), poisoned(n, 1100))
    assert not out.any()
    (out,) = runs(elementwise.gate_rows, (), lambda o: (at(o), at(x), at(column), 3, n, 1100), poisoned(n, 1100))
    close(out, reference("gate", poisoned(n, 1100), x, column[:, :1]))
    freqs, pos = (1e4 ** -(np.arange(0, 24, 2) / 24)).astype(np.float32), np.array([1000], np.int32)
    heads = rng.standard_normal((n, 3, 40), np.float32)
    (out,) = runs(elementwise.rope, (), lambda o: (at(o), at(pos), at(freqs), n, 3, 40, 24), heads)
    close(out, reference("rope", heads, pos, freqs))


@pytest.mark.parametrize("n_expert, k", [(8, 3), (40, 8), (256, 8), (512, 10)])
@pytest.mark.parametrize("n", TOKENS)
def test_route(n, n_expert, k):
    rng = np.random.default_rng(n)
    logits = 3 * rng.standard_normal((n, n_expert)).astype(np.float32)
    logits[0, :4] = (0.0, 20, -0.0, 20)
    logits[-1] = rng.permutation(n_expert) // 4 - n_expert / 4  # ties everywhere, also of negative numbers
    wanted = np.full((n, k), -7, np.int32), poisoned(n, k), np.full((n, k - 1), -7, np.int32)
    REFERENCE.route(*wanted[:2], logits, wanted[2])

    def arguments(ids, weights, near):
        return at(ids), at(weights), at(logits), at(near), n, n_expert, k, k - 1

    got = runs(elementwise.route, (), arguments, np.full((n, k), -7, np.int32), poisoned(n, k), np.full((n, k - 1), -7, np.int32))
    np.testing.assert_array_equal(got[0], wanted[0])
    close(got[1], wanted[1])
    np.testing.assert_array_equal(got[2], wanted[2])
    logits[0, 5] = np.nan  # a broken router is not hidden
    ids, weights = np.zeros(k, np.int32), np.zeros(k, np.float32)
    elementwise.route(at(ids), at(weights), at(logits), 0, 1, n_expert, k, 0)
    assert np.isnan(weights).all()


# ---- the pieces they are made of ----


@kernels.kernel("iiii")
def _exponentials(out, other, x, n, part, parts):
    o, s, v = floats(out, n), floats(other, n), floats(x, n)
    for i in range(n):
        o[i], s[i] = exp(v[i]), sigmoid(v[i])


def test_exp_is_within_two_ulp():
    x = np.concatenate([np.linspace(-100, 100, 100_001), [np.inf, -np.inf, np.nan, -87, 88, 0]]).astype(np.float32)
    got, sigmoids = poisoned(len(x)), poisoned(len(x))
    _exponentials(at(got), at(sigmoids), at(x), len(x))
    wanted = np.exp(np.clip(x.astype(np.float64), None, 88)) * ~(x < -87)
    np.testing.assert_allclose(got, wanted, rtol=2 * 2**-23, atol=0)
    np.testing.assert_allclose(sigmoids, 1 / (1 + np.exp(-x.astype(np.float64))), rtol=4 * 2**-23, atol=2**-126)


@kernels.kernel("iiiiiii")
def _products(out, turned, a, b, m, k, n, part, parts):
    o, x, y = floats(out, m * n).reshape((m, n)), floats(a, m * k).reshape((m, k)), floats(b, k * n).reshape((k, n))
    add_product(o, x, y)
    t = floats(turned, k * m).reshape((k, m))
    transpose(t, x)
    add_product(o, t.T, y)


@pytest.mark.parametrize("m, k, n", [(ROWS * 2, SQUARE, LANES), (ROWS * 4, 3 * SQUARE, 3 * LANES), (64, 128, 256)])
def test_products_and_transposes(m, k, n):
    rng = np.random.default_rng(m)
    a, b, out = (rng.standard_normal(shape, np.float32) for shape in ((m, k), (k, n), (m, n)))
    got, turned = out.copy(), poisoned(k, m)
    _products(at(got), at(turned), at(a), at(b), m, k, n)
    np.testing.assert_array_equal(turned, a.T)
    close(got, out + 2 * (a @ b))


# ---- attention ----


def filled(rng, quant, n_ctx, n_kv, d):
    """A cache of random rows, poisoned beyond the first n_ctx."""
    x = rng.standard_normal((n_ctx, n_kv, d), np.float32)
    rows = np.full((n_ctx + 70, n_kv, d // quant.block * quant.nbytes), 255, np.uint8)  # NaN in each type
    pos = np.zeros(1, np.int32)
    arguments = at(rows), rows.shape[2], at(x), at(pos), n_ctx, n_kv, d
    kernels.build([(elementwise.store_kv, quant)])
    elementwise.store_kv(quant, *arguments)
    return rows


def attend(quant, q, k, v, pos, d_v, splits, scale):
    """The result of `attention`, combined where it is split."""
    (n, n_head, d_k), n_kv = q.shape, k.shape[1]
    size = n * n_head * d_v if splits == 1 else attention.scratch(n, n_head, d_v, splits)

    def arguments(out):
        return at(out), at(q), at(k), at(v), k.shape[2], v.shape[2], at(pos), n, n_head, n_kv, d_k, d_v, splits, scale

    (out,) = runs(attention.attention, (quant,), arguments, poisoned(size))
    if splits > 1:
        partial = out

        def arguments(out):
            return at(out), at(partial), n * n_head, d_v, splits

        (out,) = runs(attention.attention_combine, (), arguments, poisoned(n, n_head, d_v))
    return out.reshape(n, n_head, d_v)


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("n_past", [0, 5, 64, 200])
@pytest.mark.parametrize("n", TOKENS)
def test_attention(kv, n, n_past):
    rng = np.random.default_rng(n + n_past)
    quant, pos = TYPES[kv], np.array([n_past], np.int32)
    narrow = 40 if quant.block == 1 else 32  # heads of no multiple of a tile
    for n_head, n_kv, d_k, d_v in ((6, 2, 64, 32), (16, 2, 96, 160), (3, 3, narrow, narrow)):
        k, v = filled(rng, quant, n_past + n, n_kv, d_k), filled(rng, quant, n_past + n, n_kv, d_v)
        q = rng.standard_normal((n, n_head, d_k), np.float32)
        wanted = reference("attention", poisoned(n, n_head, d_v), q, KVCache(quant, k, v), pos, 0.3)
        for splits in sorted({1, 3, attention.splits(n, n_kv)}):
            close(attend(quant, q, k, v, pos, d_v, splits, 0.3), wanted)


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("where", [0, 70, 130])
def test_a_nan_in_the_cache_is_not_hidden(where, splits):
    rng = np.random.default_rng(where)
    quant = TYPES["F32"]
    k, v = filled(rng, quant, 131, 1, 64), filled(rng, quant, 131, 1, 64)
    k[where] = 255
    q, pos = rng.standard_normal((1, 2, 64), np.float32), np.array([130], np.int32)
    assert np.isnan(attend(quant, q, k, v, pos, 64, splits, 0.3)).all()


# ---- recurrence ----


@pytest.mark.parametrize("channels, taps", [(320, 4), (72, 3), (16, 2)])
@pytest.mark.parametrize("n", TOKENS)
def test_short_conv(n, channels, taps):
    rng = np.random.default_rng(n)
    x, w = rng.standard_normal((n, channels), np.float32), rng.standard_normal((channels, taps), np.float32)
    tail = rng.standard_normal((taps - 1, channels), np.float32)
    wanted = poisoned(n, channels), tail.copy()
    REFERENCE.short_conv(wanted[0], x, w, wanted[1])

    def arguments(out, tail):
        return at(out), at(x), at(w), at(tail), n, channels, taps

    got = runs(recurrent.short_conv, (), arguments, poisoned(n, channels), tail)
    close(got[0], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])


@pytest.mark.parametrize("d_k, d_v", [(16, 16), (32, 64), (128, 128), (48, 32)])
@pytest.mark.parametrize("n", [*TOKENS, 4, 5, 9, 32, 70])
def test_delta_rule(n, d_k, d_v):
    rng = np.random.default_rng(n + d_k)
    n_k_head, n_v_head = 2, 6
    qkv = rng.standard_normal((n, 2 * n_k_head * d_k + n_v_head * d_v), np.float32)
    alpha, beta = (rng.standard_normal((n, n_v_head), np.float32) for _ in range(2))
    a, dt_bias = -np.exp(rng.standard_normal(n_v_head)).astype(np.float32), rng.standard_normal(n_v_head).astype(np.float32)
    state = rng.standard_normal((n_v_head, d_k, d_v), np.float32)
    wanted = poisoned(n, n_v_head, d_v), state.copy()
    REFERENCE.delta_rule(wanted[0], qkv, alpha, beta, a, dt_bias, wanted[1])
    sizes = n, n_k_head, n_v_head, d_k, d_v

    def arguments(out, state):
        return at(out), at(qkv), at(alpha), at(beta), at(a), at(dt_bias), at(state), *sizes, L2_EPS

    got = runs(recurrent.delta_rule, (), arguments, poisoned(n, n_v_head, d_v), state)
    close(got[0], wanted[0], scale=4)
    close(got[1], wanted[1], scale=4)
