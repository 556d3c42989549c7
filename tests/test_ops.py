"""Every verb of every backend against the reference, for each type, 1 to 33 tokens, poisoned outputs.

Tolerance: a sum of n float32 products in another order differs by about sqrt(n)·2**-24 of the sum of magnitudes; the bound
below takes 8 of those and holds for n <= 4096. Exponentials add 2 ulp.
"""

import threading

import gguf
import numpy as np
import pytest

from rgpu import ops as contract
from rgpu.kernels import most_threads
from rgpu.ops import Bank, Needs, Slots, Weight
from rgpu.ops.cpu import CpuOps
from rgpu.ops.reference import ReferenceOps
from rgpu.quants import TYPES
from rgpu.state import KVCache
from tests.tiny import random_blocks

TOKENS = (1, 2, 3, 4, 7, 33)
N_EXPERT, K, N_EMBD, N_FF = 6, 2, 512, 256
REFERENCE = ReferenceOps()
KV_TYPES = ("F32", "F16", "Q8_0")


@pytest.fixture(scope="module", params=sorted({1, min(2, most_threads())}), ids=lambda n: f"{n}-threads")
def cpu(request):
    ops = CpuOps(threads=request.param)
    every = frozenset(TYPES)
    for kv in KV_TYPES:
        sizes = dict(n_tokens=40, n_expert=N_EXPERT, n_expert_used=K, n_embd=N_EMBD, n_ff_exp=N_FF)
        ops.prepare(Needs(matrices=every, embeddings=every, experts=every, kv=kv, recurrent=True, **sizes), None)
    return ops


def poisoned(*shape):
    return np.full(shape, np.nan, np.float32)


def close(got, wanted, scale=1.0):
    assert not np.isnan(got).any(), "not all of the output was written"
    bound = 8 * 2**-24 * 64 * scale * max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


def both(cpu, call, *outputs):
    """Run `call(ops, *outputs)` on both backends, each with its own copies of the outputs; returns (cpu's, reference's)."""
    mine, theirs = [o.copy() for o in outputs], [o.copy() for o in outputs]
    call(cpu, *mine)
    call(REFERENCE, *theirs)
    return zip(mine, theirs, strict=True)


def stored(rng, quant, rows, cols, std):
    """Random rows of a type as uint8 [nbytes]."""
    if TYPES[quant].block > 1:
        return random_blocks(rng, quant, rows * cols // TYPES[quant].block, std).reshape(-1)
    values = (std * rng.standard_normal((rows, cols))).astype(np.float32)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[quant]).view(np.uint8).reshape(-1)


def weight(rng, quant, rows, cols):
    return Weight(TYPES[quant], (rows, cols), stored(rng, quant, rows, cols, 1.0))


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("quant", TYPES)
def test_matmul(cpu, quant, n):
    rng = np.random.default_rng(n)
    for rows, cols in ((1, 256), (37, 512), (70, 768)):
        w, x = weight(rng, quant, rows, cols), rng.standard_normal((n, cols), np.float32)
        for got, wanted in both(cpu, lambda ops, out, w=w, x=x: ops.matmul(out, w, x), poisoned(n, rows)):
            close(got, wanted, scale=4)


@pytest.mark.parametrize("quant", TYPES)
def test_embed(cpu, quant):
    rng = np.random.default_rng(5)
    w, tokens = weight(rng, quant, 40, 512), rng.integers(0, 40, 9).astype(np.int32)
    for got, wanted in both(cpu, lambda ops, out: ops.embed(out, w, tokens), poisoned(9, 512)):
        close(got, wanted)


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("quant", TYPES)
def test_expert_ffn(cpu, quant, n):
    rng = np.random.default_rng(n)

    def slots(rows, cols):
        data = stored(rng, quant, (N_EXPERT - 1) * rows, cols, 0.06)
        nbytes = len(data) // (N_EXPERT - 1)
        order = rng.permutation(N_EXPERT - 1)  # slots need not lie in order
        return Slots(TYPES[quant], (rows, cols), (data,), np.zeros(N_EXPERT - 1, np.int64), order * nbytes)

    bank = Bank(slots(N_FF, N_EMBD), slots(N_FF, N_EMBD), slots(N_EMBD, N_FF))
    table = np.array([3, -1, 0, 4, 1, 2], np.int32)  # expert 1 is somebody else's
    ids = np.stack([rng.permutation(N_EXPERT)[:K] for _ in range(n)]).astype(np.int32)
    x, weights = rng.standard_normal((n, N_EMBD), np.float32), rng.random((n, K), np.float32)
    start = rng.standard_normal((n, N_EMBD), np.float32)
    for got, wanted in both(cpu, lambda ops, out: ops.expert_ffn(out, x, bank, table, ids, weights), start):
        close(got, wanted, scale=16)


@pytest.mark.parametrize("n", TOKENS)
def test_norms_and_gates(cpu, n):
    rng = np.random.default_rng(n)
    wide, w = rng.standard_normal((n, 3, 128), np.float32), rng.standard_normal(64, dtype=np.float32)
    part, other = wide[:, :, :64], wide[:, :, 64:]  # views of half of each row
    x = rng.standard_normal((n, 3, 64), np.float32)
    column = rng.standard_normal((n, 1), np.float32)
    flat = rng.standard_normal((n, 96), np.float32)
    calls = [
        (lambda ops, out: ops.rms_norm(out, part, w, 1e-6), poisoned(n, 3, 64)),
        (lambda ops, out: ops.rms_norm(out, x, w, 1e-6), poisoned(n, 3, 64)),
        (lambda ops, out: ops.rms_norm(out, out, w, 1e-6), x),
        (lambda ops, out: ops.gate(out, x, other), poisoned(n, 3, 64)),
        (lambda ops, out: ops.gate(out, flat, column), poisoned(n, 96)),
        (lambda ops, out: ops.swiglu(out, 30 * flat, flat), poisoned(n, 96)),
        (lambda ops, out: ops.add(out, flat), flat[::-1].copy()),
        (lambda ops, out: ops.zero(out), poisoned(n, 96)),
        (lambda ops, out: ops.copy(out, flat), poisoned(n, 96)),
    ]
    for call, out in calls:
        for got, wanted in both(cpu, call, out):
            close(got, wanted)


@pytest.mark.parametrize("n", TOKENS)
def test_rope(cpu, n):
    rng = np.random.default_rng(n)
    freqs = (1e4 ** -(np.arange(0, 24, 2) / 24)).astype(np.float32)
    pos = np.array([1000], np.int32)
    x = rng.standard_normal((n, 3, 64), np.float32)
    for got, wanted in both(cpu, lambda ops, out: ops.rope(out, pos, freqs), x):
        close(got, wanted)
    # By hand: the norm of every rotated pair stays, and the rest of the head does.
    np.testing.assert_array_equal(got[..., 24:], x[..., 24:])
    np.testing.assert_allclose(got[..., :12] ** 2 + got[..., 12:24] ** 2, x[..., :12] ** 2 + x[..., 12:24] ** 2, rtol=1e-5)


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("n_past", [0, 5, 100])
@pytest.mark.parametrize("n", TOKENS)
def test_attention(cpu, kv, n, n_past):
    rng = np.random.default_rng(n + n_past)
    n_head, n_kv, d_k, d_v, n_ctx = 6, 2, 64, 32, 160
    quant, pos = TYPES[kv], np.array([n_past], np.int32)

    def empty(d):
        return np.full((n_ctx, n_kv, d // quant.block * quant.nbytes), 255, np.uint8)  # poison: NaN in each type

    k, v = rng.standard_normal((n_past + n, n_kv, d_k), np.float32), rng.standard_normal((n_past + n, n_kv, d_v), np.float32)
    q = rng.standard_normal((n, n_head, d_k), np.float32)
    results = []
    for ops in (cpu, REFERENCE):
        cache, out = KVCache(quant, empty(d_k), empty(d_v)), poisoned(n, n_head, d_v)
        if n_past:
            ops.store_kv(cache, k[:n_past], v[:n_past], np.array([0], np.int32))
        ops.store_kv(cache, k[n_past:], v[n_past:], pos)
        ops.attention(out, q, cache, pos, 0.3)
        results.append((out, cache))
    np.testing.assert_array_equal(results[0][1].k, results[1][1].k)
    np.testing.assert_array_equal(results[0][1].v, results[1][1].v)
    close(results[0][0], results[1][0])


@pytest.mark.parametrize("n", [*TOKENS, 9, 31, 32, 40])
def test_recurrent(cpu, n):
    rng = np.random.default_rng(n)
    n_k_head, n_v_head, d_k, d_v, taps = 2, 4, 32, 64, 4
    channels = 2 * n_k_head * d_k + n_v_head * d_v
    x, w = rng.standard_normal((n, channels), np.float32), rng.standard_normal((channels, taps), np.float32)
    tail = rng.standard_normal((taps - 1, channels), np.float32)
    for got, wanted in both(cpu, lambda ops, out, tail: ops.short_conv(out, x, w, tail), poisoned(n, channels), tail):
        close(got, wanted)
    alpha, beta = (rng.standard_normal((n, n_v_head), np.float32) for _ in range(2))
    a, dt_bias = -np.exp(rng.standard_normal(n_v_head)).astype(np.float32), rng.standard_normal(n_v_head).astype(np.float32)
    state = rng.standard_normal((n_v_head, d_k, d_v), np.float32)

    def call(ops, out, state):
        ops.delta_rule(out, x, alpha, beta, a, dt_bias, state)

    for got, wanted in both(cpu, call, poisoned(n, n_v_head, d_v), state):
        close(got, wanted, scale=4)


@pytest.mark.parametrize("n", TOKENS)
def test_route(cpu, n):
    rng = np.random.default_rng(n)
    logits = rng.standard_normal((n, 40)).astype(np.float32) * 3
    logits[0, 7] = logits[0, 9] = 20  # a tie: the lower id comes first
    results = []
    for ops in (cpu, REFERENCE):
        ids, weights = np.full((n, 8), -7, np.int32), poisoned(n, 8)
        ops.route(ids, weights, logits.copy())
        results.append((ids, weights))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert list(results[0][0][0, :2]) == [7, 9]
    close(results[0][1], results[1][1])
    np.testing.assert_allclose(results[0][1].sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("n", TOKENS)
def test_post(cpu, n):
    """Of six experts all, none, or some have a slot; the box holds an older question."""
    ids = np.stack([np.random.default_rng(i).permutation(6)[:2] for i in range(n)]).astype(np.int32)
    for absent in ([], [0, 1, 2, 3, 4, 5], [4], None):
        table = None if absent is None else np.where(np.isin(np.arange(6), absent), -1, 7).astype(np.int32)
        expected = [e for e in ids.reshape(-1) if absent is None or e in absent]
        for after in (None, poisoned(3)):
            box = np.full(2 + 2 * n, 99, np.int32)
            for got, wanted in both(cpu, lambda ops, box, t=table, a=after: ops.post(box, ids, table=t, after=a), box):
                np.testing.assert_array_equal(got, wanted)
                if expected:
                    assert got[: 2 + len(expected)].tolist() == [100, len(expected), *expected]
                else:
                    assert (got == 99).all(), "who needs nothing asks for nothing"


def test_wait_and_publish(cpu):
    """It goes on at once when nothing is asked for; else when it is answered, late and from another thread."""
    table = np.full(6, -1, np.int32)
    for ops in (cpu, REFERENCE):
        box, answer = np.array([5, 0], np.int32), np.array([4], np.int32)
        ops.publish(answer, 5)
        ops.wait(box, answer, table)
        box[0] = 7
        for count in (6, 7):
            threading.Timer(0.05 * (count - 5), ops.publish, (answer, count)).start()
        ops.wait(box, answer, table)
        assert answer.tolist() == [7]
        answer[0] = 2**31 - 1  # who has gone lets everyone pass
        ops.wait(box, answer, table)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_copy(cpu, dtype):
    x = np.random.default_rng(0).integers(-(2**30), 2**30, (5, 70)).astype(dtype)
    for got, _ in both(cpu, lambda ops, out: ops.copy(out, x), np.full_like(x, 7)):
        np.testing.assert_array_equal(got, x)


def test_threads_do_not_change_a_bit():
    rng = np.random.default_rng(3)
    w, outs = weight(rng, "Q4_K", 130, 1024), []
    needs = Needs(40, N_EXPERT, K, N_EMBD, N_FF, frozenset({"Q4_K"}), frozenset(), frozenset(), "F16", False)
    for threads in sorted({1, min(2, most_threads()), most_threads()}):
        ops = CpuOps(threads)
        ops.prepare(needs, None)
        for n in (1, 33):
            out = poisoned(n, 130)
            ops.matmul(out, w, np.random.default_rng(n).standard_normal((n, 1024), np.float32))
            outs.append(out)
    for got in outs[2:]:
        np.testing.assert_array_equal(got, outs[0] if len(got) == 1 else outs[1])


def test_more_threads_than_there_are():
    with pytest.raises(contract.DeviceError.__base__, match=r"threads is 1000, but this process may use \d+"):
        CpuOps(1000)


def test_a_nan_is_not_hidden(cpu):
    """A broken weight must come out as NaN, never as a plausible answer."""
    x = np.ones((1, 96), np.float32)
    x[0, 3] = np.nan
    for call in (lambda ops, out: ops.gate(out, np.ones_like(x), x), lambda ops, out: ops.swiglu(out, x, np.ones_like(x))):
        for got, wanted in both(cpu, call, np.zeros((1, 96), np.float32)):
            np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
            assert np.isnan(got[0, 3])
    q, k = np.ones((1, 2, 64), np.float32), np.ones((3, 1, 64), np.float32)
    k[1, 0, 5] = np.nan
    quant = TYPES["F32"]
    cache = KVCache(quant, np.zeros((8, 1, 256), np.uint8), np.zeros((8, 1, 256), np.uint8))
    cpu.store_kv(cache, k, k, np.array([0], np.int32))
    out = np.zeros((1, 2, 64), np.float32)
    cpu.attention(out, q, cache, np.array([2], np.int32), 1.0)
    assert np.isnan(out).any(axis=2).all()


def test_a_backend_without_a_verb_is_refused():
    class Half(ReferenceOps):
        name, gate = "half", None

    with pytest.raises(contract.DeviceError, match=r"lacks the verb gate\(out, x, g\)"):
        contract.check(Half)
    assert contract.check(CpuOps) is CpuOps


@pytest.mark.parametrize("k", [1, 7, 64])
def test_top_k(cpu, k):
    rng = np.random.default_rng(k)
    logits = np.round(rng.standard_normal((3, 900)), 1).astype(np.float32)  # with ties
    logits[1, 300], logits[2, [5, 700]] = np.nan, -np.inf
    ids, values = np.full((3, k), -7, np.int32), np.full((3, k), 99, np.float32)
    for got, wanted in both(cpu, lambda ops, ids, values: ops.top_k(ids, values, logits), ids, values):
        np.testing.assert_array_equal(got, wanted)
