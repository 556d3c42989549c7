"""The CUDA kernels of rows, attention, recurrence, sampling and flags, on the stand-in: each is the reference's verb.

Two devices, one with tensor cores and one without, each with an order of its own; sizes that are multiples of no tile; outputs
poisoned, and whatever a kernel should leave alone compared bit by bit.

Tolerances: a float32 sum of n products in another order differs by about sqrt(n)·2**-24 of the sum of magnitudes; `close` takes
8 of those for n <= 4096, times `scale` where a result passes through several such sums.
"""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import rgpu
from rgpu.ops import L2_EPS, Weight
from rgpu.ops.reference import ReferenceOps
from rgpu.quants import TYPES
from rgpu.quants.activations import rounded
from rgpu.state import KVCache
from tests.cuda_sim import SimDevice
from tests.test_ops import KV_TYPES, close, poisoned, stored

FOLDER = Path(rgpu.__file__).parent
REFERENCE = ReferenceOps()
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 130)
SOME = (1, 5, 33)  # where the number of tokens is only one more axis
EPS = 1e-6


def text(op, *quants, **defines):
    """The text of an op: what is common, the types, what is defined, the kernels."""
    paths = [FOLDER / "kernels/common.cuh"]
    paths += [FOLDER / f"quants/{name}.cuh" for name in ("blocks", "activations", *map(str.lower, quants))]
    lines = [f"#define {name} {value}\n" for name, value in defines.items()]
    return "".join([*(path.read_text() for path in paths), *lines, (FOLDER / f"kernels/{op}.cu").read_text()])


class Out(SimpleNamespace):
    """An array that the kernel may change; `array` is its host copy, before and after."""


class Gpu:
    """Runs one kernel at a time on arrays of the host."""

    def __init__(self, capability, seed):
        self.device = SimDevice(capability=capability, seed=seed)
        self.stream = self.device.stream()

    def run(self, source, name, grid, block, *arguments):
        """Launch; arrays go up and come back. Returns what became of the `Out`s; everything else must be as it was."""
        kernel, given, addresses = self.device.load(source).kernel(name), [], []
        for a in arguments:
            array = a.array if isinstance(a, Out) else a
            if isinstance(array, np.ndarray):
                addresses.append(self.device.allocate(array.nbytes))
                self.stream.upload(addresses[-1], np.ascontiguousarray(array))
                given.append(addresses[-1])
            else:
                given.append(a)
        self.stream.launch(kernel, grid, block, given)
        results = []
        for a, address in zip(arguments, given, strict=True):
            array = a.array if isinstance(a, Out) else a
            if isinstance(array, np.ndarray):
                back = np.empty_like(array, order="C")
                self.stream.download(back, address)
                if isinstance(a, Out):
                    results.append(back)
                else:
                    same(back, array)
        for address in addresses:
            self.device.free(address)
        return results


@pytest.fixture(scope="module", params=[((6, 1), 0), ((8, 9), 1)], ids=["sm_61", "sm_89"])
def gpu(request):
    gpu = Gpu(*request.param)
    yield gpu
    gpu.device.close()


def up(a, b):
    return -(-a // b)


def same(a, b):
    np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


def reference(verb, *arguments):
    """The first argument of a verb of the reference, after the call."""
    getattr(REFERENCE, verb)(*arguments)
    return arguments[0]


def int8_room(count):
    return Out(array=np.full(count + count // 4, 255, np.uint8))


def check_int8(buffer, x):
    """An int8 buffer holds what products see of x, and its sums are right to the bit."""
    count = x.size
    q, planes = buffer[:count].view(np.int8).reshape(-1, 32), buffer[count:].view(np.float32)
    scale, total = planes[: count // 32], planes[count // 32 :]
    np.testing.assert_array_equal((q * scale[:, None]).reshape(x.shape), rounded(x))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(total, scale * q.sum(axis=1, dtype=np.int32).astype(np.float32))


# ---- rows ----


@pytest.mark.parametrize("quant", TYPES)
def test_embed(gpu, quant):
    rng = np.random.default_rng(5)
    for columns in (768, 8 if TYPES[quant].block == 1 else TYPES[quant].block):
        w = Weight(TYPES[quant], (40, columns), stored(rng, quant, 40, columns, 1.0))
        tokens = np.array([3, 39, 0, 3, 17], np.int32)
        (out,) = gpu.run(
            text("elementwise", quant, WEIGHT=quant), "embed", (up(columns, 1024), 5), (128,),
            Out(array=poisoned(5, columns)), w.data, tokens, columns,
        )  # fmt: skip
        close(out, reference("embed", poisoned(5, columns), w, tokens))


@pytest.mark.parametrize("n", TOKENS)
def test_rms_norm(gpu, n):
    rng = np.random.default_rng(n)
    for width, threads in ((40, 32), (96, 32), (1056, 288)):
        wide, w = 3 * rng.standard_normal((n, 2 * width), np.float32), rng.standard_normal(width, np.float32)
        asked = width % 32 == 0
        for x, stride in ((wide, 2 * width), (np.ascontiguousarray(wide[:, :width]), width)):
            outs = gpu.run(
                text("elementwise"), "rms_norm", (n,), (threads,),
                Out(array=poisoned(n, width)), x, stride, w, width, int8_room(n * width) if asked else 0, EPS,
            )  # fmt: skip
            close(outs[0], reference("rms_norm", poisoned(n, width), wide[:, :width], w, EPS))
            if asked:
                check_int8(outs[1], outs[0])


def test_int8_blocks_of_any_numbers(gpu):
    """Zeros, one value, values below the normal numbers, halves between two quants; NaN and infinity spoil their own block."""
    x = np.zeros((8, 32), np.float32)
    x[1, 7], x[2], x[3] = 5, np.linspace(0, 1e-40, 32), np.arange(32) - 15.5
    x[4, :3], x[5], x[6, 30], x[7, 1] = (127, 0.5, 1.5), 3e38, np.nan, -np.inf
    ones = np.full(x.shape, np.float32(1e3))  # gate_rows would not do: it has no int8 output; sigmoid(1000) is 1
    out, blocks = gpu.run(
        text("elementwise"), "gate", (1,), (96,), Out(array=poisoned(*x.shape)), x, ones, 32, 32, x.size, int8_room(x.size)
    )
    np.testing.assert_array_equal(out, x)
    check_int8(blocks, x)


@pytest.mark.parametrize("n", TOKENS)
def test_gates(gpu, n):
    rng = np.random.default_rng(n)
    source, n_head = text("elementwise"), 3
    for width in (32, 20):
        count, grid, asked = n * n_head * width, (min(up(n * n_head * width, 256), 5),), width == 32
        x, z = (rng.standard_normal((n, n_head, width), np.float32) for _ in range(2))
        both = rng.standard_normal((n, n_head, 2 * width), np.float32)
        x8 = int8_room(count) if asked else 0
        outs = gpu.run(source, "swiglu", grid, (256,), Out(array=poisoned(*x.shape)), 30 * x, z, count, x8)
        close(outs[0], reference("swiglu", poisoned(*x.shape), 30 * x, z), scale=4)
        wide = 2 * width
        gated = gpu.run(source, "gate", grid, (256,), Out(array=poisoned(*x.shape)), x, both, wide, width, count, x8)
        close(gated[0], reference("gate", poisoned(*x.shape), x, both[..., :width]))
        if asked:
            check_int8(outs[1], outs[0])
            check_int8(gated[1], gated[0])
        (out,) = gpu.run(source, "gate_rows", grid, (256,), Out(array=poisoned(*x.shape)), x, both, wide, width, count)
        close(out, reference("gate", poisoned(*x.shape), x, both[..., :1]))


def test_plain_rows(gpu):
    rng = np.random.default_rng(1)
    source, count = text("elementwise"), 1100
    x, y = rng.standard_normal((2, count), np.float32)
    for grid in ((5,), (2,)):  # once round, and several times
        same(gpu.run(source, "add", grid, (256,), Out(array=x), y, count)[0], x + y)
        same(gpu.run(source, "copy", grid, (256,), Out(array=poisoned(count)), y.view(np.int32), count)[0], y)
        out = poisoned(count + 1)
        out[:-1] = 0
        same(gpu.run(source, "zero", grid, (256,), Out(array=poisoned(count + 1)), count)[0], out)


@pytest.mark.parametrize("pos", [0, 1000, 260_000])
@pytest.mark.parametrize("n", SOME)
def test_rope(gpu, n, pos):
    rng = np.random.default_rng(n)
    pos = np.array([pos], np.int32)
    for n_head, d, n_rot in ((3, 40, 24), (2, 64, 64)):
        freqs = (1e4 ** -(np.arange(0, n_rot, 2) / n_rot)).astype(np.float32)
        x = rng.standard_normal((n, n_head, d), np.float32)
        (out,) = gpu.run(text("elementwise"), "rope", (3,), (96,), Out(array=x), pos, freqs, n, n_head, d, n_rot // 2)
        close(out, reference("rope", x.copy(), pos, freqs))
        same(out[..., n_rot:], x[..., n_rot:])


def store(gpu, kv, n_ctx, pos, k, v):
    """Caches of NaN in which k and v were stored from `pos` on."""
    quant, n = TYPES[kv], len(k)
    caches = [np.full((n_ctx, x.shape[1], x.shape[2] // quant.block * quant.nbytes), 255, np.uint8) for x in (k, v)]
    rows = [x[0].size for x in (k, v)]
    grid = min(up(n * max(rows), 256), 7), 2
    outs = [Out(array=cache) for cache in caches]
    source = text("elementwise", kv, KV=kv)
    return gpu.run(source, "store_kv", grid, (256,), *outs, k, v, np.array([pos], np.int32), n, *rows)


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("n, pos", [(1, 0), (1, 11), (5, 2), (33, 7)])
def test_store_kv(gpu, kv, n, pos):
    rng = np.random.default_rng(n)
    k, v = rng.standard_normal((n, 2, 96), np.float32), rng.standard_normal((n, 2, 32), np.float32)
    k[0, 0, :32], v[0, 0], v[-1, 1] = 0, np.arange(32) - 15.5, 1e-39  # no scale; ties; a scale that float16 does not hold
    caches = store(gpu, kv, n + pos + 3, pos, k, v)
    wanted = KVCache(TYPES[kv], *(np.full_like(cache, 255) for cache in caches))
    with np.errstate(all="ignore"):
        REFERENCE.store_kv(wanted, k, v, np.array([pos]))
    same(caches[0], wanted.k)
    same(caches[1], wanted.v)


@pytest.mark.parametrize("n_expert, k", [(8, 3), (40, 8), (256, 8), (512, 10), (33, 32)])
@pytest.mark.parametrize("n", TOKENS)
def test_route(gpu, n, n_expert, k):
    rng = np.random.default_rng(n)
    logits = 3 * rng.standard_normal((n, n_expert)).astype(np.float32)
    logits[0, :4] = (0.0, 20, -0.0, 20)
    logits[-1] = rng.permutation(n_expert) // 4 - n_expert / 4  # ties everywhere, also of negative numbers
    wanted = np.full((n, k), -7, np.int32), poisoned(n, k)
    REFERENCE.route(*wanted, logits)
    launch = (text("elementwise"), "route", (up(n, 4),), (32, 4))
    ids, weights = gpu.run(*launch, Out(array=np.full((n, k), -7, np.int32)), Out(array=poisoned(n, k)), logits, n, n_expert, k)
    np.testing.assert_array_equal(ids, wanted[0])
    close(weights, wanted[1])
    logits[0, 5] = np.nan  # a broken router is not hidden
    ids, weights = gpu.run(*launch, Out(array=np.full((n, k), -7, np.int32)), Out(array=poisoned(n, k)), logits, n, n_expert, k)
    assert np.isnan(weights[0]).all() and ids[0, 0] == 5


# ---- attention ----


def attend(gpu, kv, q, k, v, pos, scale, ranges, many):
    """attention or attention_many, and attention_combine where the cache is split."""
    (n, n_head, d), n_head_kv = q.shape, k.shape[1]
    source, queries = text("attention", kv, KV=kv, HEAD=d), n * n_head // n_head_kv
    grid = (up(queries, 64), n_head_kv, ranges) if many else (ranges, n_head_kv, up(queries, 8))
    out = poisoned(n, n_head, d) if ranges == 1 else poisoned(n * n_head, ranges, d + 2)
    name = "attention_many" if many else "attention"
    (out,) = gpu.run(source, name, grid, (128,), Out(array=out), q, k, v, pos, n, n_head, n_head_kv, scale)
    if ranges > 1:
        (out,) = gpu.run(source, "attention_combine", (n * n_head,), (128,), Out(array=poisoned(n, n_head, d)), out, ranges)
    return out


def attention_case(gpu, rng, kv, n, n_head, n_head_kv, d, past):
    """q, the caches with everything up to past + n, and `pos`."""
    pos = np.array([past], np.int32)
    k, v = rng.standard_normal((2, past + n, n_head_kv, d), np.float32)
    caches = store(gpu, kv, past + n + 5, 0, k, v)
    return rng.standard_normal((n, n_head, d), np.float32), *caches, pos


FEW = [  # type, tokens, heads, KV heads, columns, position, ranges: each tile and each remainder of it
    ("F16", 1, 16, 2, 256, 0, 3), ("F16", 1, 16, 2, 256, 150, 7), ("F16", 2, 9, 3, 128, 77, 1), ("F16", 1, 20, 2, 128, 200, 64),
    ("F16", 4, 3, 3, 64, 31, 2), ("Q8_0", 1, 8, 1, 256, 63, 4), ("Q8_0", 3, 4, 2, 128, 130, 2), ("Q8_0", 8, 2, 1, 64, 100, 5),
    ("F32", 1, 4, 2, 32, 40, 2), ("F32", 9, 4, 2, 64, 129, 3), ("F32", 33, 2, 2, 32, 7, 1), ("F32", 130, 2, 1, 32, 0, 1),
]  # fmt: skip


@pytest.mark.parametrize("kv, n, n_head, n_head_kv, d, past, ranges", FEW)
def test_attention(gpu, kv, n, n_head, n_head_kv, d, past, ranges):
    q, k, v, pos = attention_case(gpu, np.random.default_rng(n + past), kv, n, n_head, n_head_kv, d, past)
    wanted = reference("attention", poisoned(*q.shape), q, KVCache(TYPES[kv], k, v), pos, 0.3)
    close(attend(gpu, kv, q, k, v, pos, 0.3, ranges, many=False), wanted)


MANY = [
    ("F16", 9, 16, 2, 256, 41, 1), ("F16", 33, 4, 2, 256, 0, 2), ("F16", 130, 4, 2, 64, 3, 1), ("F16", 33, 6, 1, 128, 90, 3),
    ("F16", 9, 2, 2, 32, 200, 16), ("Q8_0", 33, 4, 2, 64, 64, 1), ("Q8_0", 9, 6, 2, 128, 31, 2),
]  # fmt: skip


@pytest.mark.parametrize("kv, n, n_head, n_head_kv, d, past, ranges", MANY)
def test_attention_many(gpu, kv, n, n_head, n_head_kv, d, past, ranges):
    """Rounded to float16: a query, a value of Q8_0, a weight; each by 2**-12 of itself.

    A score Σ q·k·scale then has an error of 2**-12·sqrt(2)·scale·|q·k| per column, with random signs: its standard deviation for
    normal q, k is 2**-12·sqrt(2·d)·scale / sqrt(3) and, at 6 of them, δ; weights carry a factor 1 ± δ, plus 2**-12 of their own,
    and so do the values. No output can be further off than by 2·(δ + 2**-11) times the largest value.
    """
    scale = d**-0.5
    q, k, v, pos = attention_case(gpu, np.random.default_rng(n + past), kv, n, n_head, n_head_kv, d, past)
    cache = KVCache(TYPES[kv], k, v)
    wanted = reference("attention", poisoned(*q.shape), q, cache, pos, scale)
    out = attend(gpu, kv, q, k, v, pos, scale, ranges, many=True)
    delta = 6 * 2**-12 * np.sqrt(2 * d / 3) * scale
    assert not np.isnan(out).any()
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2 * (delta + 2**-11) * 5)  # of normal values the largest is about 5
    # As exact as that allows: the mean error is far smaller, or something is wrong that the bound does not show.
    assert np.abs(out - wanted).mean() < 2**-11


def test_attention_many_without_rounding(gpu):
    """With numbers that float16 holds, and weights that are powers of two, it is as exact as the other."""
    rng = np.random.default_rng(0)
    for n, n_head, n_head_kv, d, past, ranges in ((33, 4, 2, 64, 50, 1), (9, 6, 2, 256, 70, 3)):
        q, v = (rng.integers(-8, 9, (past + n, heads, d)).astype(np.float32) for heads in (n_head, n_head_kv))
        k = np.zeros((past + n, n_head_kv, d), np.float32)
        k[rng.random(k.shape[:2]) < 0.3, 0] = 1
        q = q[:n]
        q[..., 0] = rng.integers(-2, 3, q.shape[:2])
        pos, scale = np.array([past], np.int32), float(np.log(2))  # a score is a whole power of two
        k, v = store(gpu, "F16", past + n + 5, 0, k, v)
        wanted = reference("attention", poisoned(*q.shape), q, KVCache(TYPES["F16"], k, v), pos, scale)
        close(attend(gpu, "F16", q, k, v, pos, scale, ranges, many=True), wanted)


@pytest.mark.parametrize("ranges", [1, 8])
@pytest.mark.parametrize("where", [0, 70, 130])
@pytest.mark.parametrize("kv, many", [("F32", False), ("F16", True)])
def test_a_nan_in_the_cache_is_not_hidden(gpu, kv, many, where, ranges):
    q, k, v, pos = attention_case(gpu, np.random.default_rng(where), kv, 1, 2, 1, 32, 130)
    k[where] = 255
    assert np.isnan(attend(gpu, kv, q, k, v, pos, 0.3, ranges, many)).all()


def test_a_recorded_attention_follows_the_position(gpu):
    """One graph, three positions: what it reads of the cache depends on device memory alone."""
    n_head, d, ranges, device, stream = 4, 32, 3, gpu.device, gpu.stream
    q, k, v, pos = attention_case(gpu, np.random.default_rng(2), "F32", 1, n_head, 2, d, 99)
    module = device.load(text("attention", "F32", KV="F32", HEAD=d))
    arrays = (poisoned(1, n_head, d), poisoned(n_head, ranges, d + 2), q, k, v, pos)
    out, partial, *inputs = (device.allocate(array.nbytes) for array in arrays)
    for address, array in zip(inputs, arrays[2:], strict=True):
        stream.upload(address, array)
    with stream.capture() as graph:
        arguments = (partial, *inputs, 1, n_head, 2, 0.3)
        stream.launch(module.kernel("attention"), (ranges, 2, 1), (128,), arguments)
        stream.launch(module.kernel("attention_combine"), (n_head,), (128,), (out, partial, ranges))
    for past in (99, 0, 40):
        stream.upload(inputs[-1], np.array([past], np.int32))
        stream.replay(graph)
        got = poisoned(1, n_head, d)
        stream.download(got, out)
        cache, now = KVCache(TYPES["F32"], k, v), np.array([past], np.int32)
        close(got, reference("attention", poisoned(1, n_head, d), q, cache, now, 0.3))


# ---- recurrence ----


@pytest.mark.parametrize("channels, taps", [(200, 4), (72, 3), (16, 2)])
@pytest.mark.parametrize("n", TOKENS)
def test_short_conv(gpu, n, channels, taps):
    rng = np.random.default_rng(n)
    x, w = rng.standard_normal((n, channels), np.float32), rng.standard_normal((channels, taps), np.float32)
    tail = rng.standard_normal((taps - 1, channels), np.float32)
    wanted = poisoned(n, channels), tail.copy()
    REFERENCE.short_conv(wanted[0], x, w, wanted[1])
    source, grid = text("recurrent", HEAD=16), (up(channels, 128), up(n, 32))
    outs = Out(array=poisoned(n, channels)), Out(array=tail)
    out, moved = gpu.run(source, "short_conv", grid, (128,), outs[0], x, w, outs[1], n, channels, taps)
    close(out, wanted[0])
    same(moved, wanted[1])


@pytest.mark.parametrize("d_k, d_v", [(16, 16), (64, 40), (128, 128)])
@pytest.mark.parametrize("n", TOKENS)
def test_delta_rule(gpu, n, d_k, d_v):
    rng = np.random.default_rng(n + d_k)
    n_k_head, n_v_head = (2, 6) if d_k == 16 else (1, 2)
    qkv = rng.standard_normal((n, 2 * n_k_head * d_k + n_v_head * d_v), np.float32)
    if n > 2:
        qkv[1, :d_k], qkv[2, n_k_head * d_k :][:d_k] = 0, 0  # nothing to normalise
    alpha, beta = (3 * rng.standard_normal((n, n_v_head), np.float32) for _ in range(2))
    alpha[-1, 0] = 30  # softplus is the identity there
    a, dt_bias = -np.exp(rng.standard_normal(n_v_head)).astype(np.float32), rng.standard_normal(n_v_head).astype(np.float32)
    state = rng.standard_normal((n_v_head, d_k, d_v), np.float32)
    wanted = poisoned(n, n_v_head, d_v), state.copy()
    REFERENCE.delta_rule(wanted[0], qkv, alpha, beta, a, dt_bias, wanted[1])
    out, state = gpu.run(
        text("recurrent", HEAD=d_k), "delta_rule", (up(d_v, 32), n_v_head), (128,),
        Out(array=poisoned(n, n_v_head, d_v)), qkv, alpha, beta, a, dt_bias, Out(array=state), n, n_k_head, n_v_head, d_v, L2_EPS,
    )  # fmt: skip
    close(out, wanted[0], scale=4)
    close(state, wanted[1], scale=4)


def test_delta_rule_by_chunks_of_any_length_is_the_same(gpu):
    """Cut anywhere, the same bits: the state that is kept in registers is the one that is written."""
    rng = np.random.default_rng(3)
    n, heads, d = 21, 2, 16
    qkv, gates = rng.standard_normal((n, 3 * heads * d), np.float32), rng.standard_normal((2, n, heads), np.float32)
    a, dt = -np.ones(heads, np.float32), np.zeros(heads, np.float32)
    first = rng.standard_normal((heads, d, d), np.float32)

    def through(*cuts):
        outs, state = [], first
        for start, end in zip((0, *cuts), (*cuts, n), strict=True):
            arrays = qkv[start:end], gates[0, start:end], gates[1, start:end], a, dt
            out, state = gpu.run(
                text("recurrent", HEAD=d), "delta_rule", (1, heads), (128,),
                Out(array=poisoned(end - start, heads, d)), *arrays, Out(array=state), end - start, heads, heads, d, L2_EPS,
            )  # fmt: skip
            outs.append(out)
        return np.concatenate(outs), state

    whole = through()
    for cuts in ((1,), (8, 16), (5, 6, 19)):
        for a_part, b_part in zip(through(*cuts), whole, strict=True):
            same(a_part, b_part)


# ---- the end of a step ----


def top_k(gpu, logits, k):
    """ids and values of the k largest of each row: launches until one block is left."""
    rows, n_vocab = logits.shape
    source, best, n = text("sample"), 0, n_vocab
    while True:
        blocks = up(n, 2048)
        outs = [Out(array=np.full((rows, k), -7, np.int32)), Out(array=poisoned(rows, k))]
        left = Out(array=np.zeros((rows, blocks, k), np.uint64))
        ids, values, left = gpu.run(source, "top_k", (blocks, rows), (512,), *outs, left, best, logits, n_vocab, n, k)
        if blocks == 1:
            return ids, values
        assert (ids == -7).all()
        best, n = left, blocks * k


@pytest.mark.parametrize("n_vocab, k, rows", [(5, 5, 1), (2048, 1, 3), (2049, 40, 2), (30_001, 64, 1), (248_320, 1, 1)])
def test_top_k(gpu, n_vocab, k, rows):
    rng = np.random.default_rng(n_vocab)
    logits = (4 * rng.standard_normal((rows, n_vocab))).astype(np.float32)
    logits[0, rng.integers(0, n_vocab, 3 * k)] = logits.max()  # more equals than are wanted
    logits[-1, ::2] = np.round(logits[-1, ::2])
    logits[-1, :2] = -0.0, 0.0
    wanted = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    ids, values = top_k(gpu, logits, k)
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, wanted, axis=1))
    logits[0, n_vocab // 2] = np.nan
    ids, values = top_k(gpu, logits, k)
    assert ids[0, 0] == n_vocab // 2 and np.isnan(values[0, 0])


def test_top_k_of_fewer(gpu):
    ids, values = top_k(gpu, np.array([[-np.inf, 3, 2]], np.float32), 5)
    np.testing.assert_array_equal(ids, [[1, 2, 0, -1, -1]])
    np.testing.assert_array_equal(values, [[3, 2, -np.inf, 0, 0]])


@pytest.mark.parametrize("n", [1, 8, 32, 70])
def test_post(gpu, n):
    rng = np.random.default_rng(n)
    ids, table = rng.integers(0, 40, n).astype(np.int32), rng.integers(-1, 2, 40).astype(np.int32)
    all_there = np.zeros(40, np.int32)
    for known, count in ((None, 3), (table, 0), (all_there, 9)):
        box = np.full(2 + n, -9, np.int32)
        box[0] = count
        wanted = box.copy()
        REFERENCE.post(wanted, ids, known)
        argument = 0 if known is None else known
        (box,) = gpu.run(text("post"), "post", (1,), (32,), Out(array=box), ids, n, argument)
        np.testing.assert_array_equal(box, wanted)


def test_a_host_thread_answers_in_the_middle_of_a_stream(gpu):
    """post, wait, and a kernel that reads what the answer brought; three rounds of one graph."""
    device, stream = gpu.device, gpu.stream
    memory = device.host(256, mapped=True)
    words = memory.array.view(np.int32)
    words[:] = 0
    box, answer, brought = words[:10], words[16:17], words[32:36]
    ids, out = device.allocate(16), device.allocate(16)
    post, copy = device.load(text("post")), device.load(text("elementwise")).kernel("copy")
    at = memory.address
    with stream.capture() as graph:
        stream.launch(post.kernel("post"), (1,), (32,), (at, ids, 4, 0))
        stream.launch(post.kernel("wait"), (1,), (1,), (at, at + 64))
        stream.launch(copy, (1,), (32,), (out, at + 128, 4))
    rounds = 3

    def host():
        for count in range(1, rounds + 1):
            while box[0] < count:
                pass
            brought[:] = 10 * box[2:6] + count
            answer[0] = count

    thread = threading.Thread(target=host)
    thread.start()
    for count in range(1, rounds + 1):
        chosen, got = np.arange(4, dtype=np.int32) * count, np.empty(4, np.int32)
        stream.upload(ids, chosen)
        stream.replay(graph)
        stream.download(got, out)
        np.testing.assert_array_equal(got, 10 * chosen + count)
    thread.join()
