"""Every verb of CudaOps is the reference's, and what a step keeps is used only while it is right: int8 blocks, graphs, scratch.

Kernels are tested by type and size in test_cuda_matmul.py and test_cuda_state.py; here it is what stands between a verb and its
launches, so a few types do. Two devices, with tensor cores and without. Tolerances are those of test_ops.py.
"""

import gc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rgpu.errors import OutOfMemory
from rgpu.models.blocks import halves, heads
from rgpu.ops import Bank, Needs, Slots, Weight, check
from rgpu.ops.cuda import KEPT_GRAPHS, LARGE, CudaOps
from rgpu.ops.reference import ReferenceOps
from rgpu.quants import TYPES
from rgpu.state import KVCache
from tests.cuda_sim import SimDevice
from tests.test_ops import KV_TYPES, close, poisoned, stored, weight

# What a finalizer of device memory raises is printed and forgotten, were it not for this.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

TOKENS = (1, 2, 8, 9, 33)
N_EXPERT, K, N_EMBD, N_FF, HEAD, D_K = 6, 2, 512, 256, 64, 32
EXPERTS = [("F32", "F32", "F32"), ("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "F16", "Q8_0")]  # gate, up, down
MATRICES, EMBEDDINGS = ("F32", "F16", "Q8_0", "Q6_K"), ("F32", "Q4_K")
REFERENCE = ReferenceOps()


def needs(kv: str) -> Needs:
    sizes = dict(n_tokens=40, n_expert=N_EXPERT, n_expert_used=K, n_embd=N_EMBD, n_ff_exp=N_FF, recurrent=D_K, n_embd_head=HEAD)
    gate_up, down = frozenset(types[:2] for types in EXPERTS), frozenset(types[2] for types in EXPERTS)
    types = dict(matrices=frozenset(MATRICES), embeddings=frozenset(EMBEDDINGS), experts=frozenset(sum(EXPERTS, ())))
    return Needs(kv=kv, gate_up=gate_up, down=down, **types, **sizes)


@pytest.fixture(scope="module", params=[((8, 9), 0), ((6, 1), 1)], ids=["sm_89", "sm_61"])
def device(request):
    capability, seed = request.param
    device = SimDevice(capability=capability, seed=seed)
    yield device
    device.close()  # fails if a kernel wrote beside an array


@pytest.fixture(scope="module")
def cuda(device):
    ops = CudaOps(device)
    for kv in KV_TYPES:
        ops.prepare(needs(kv), None)
    return ops


def put(ops, value):
    """The value with its arrays in the memory of a backend."""
    if isinstance(value, Weight):
        return replace(value, data=put(ops, value.data))
    if isinstance(value, Bank):
        return Bank(*(replace(part, data=tuple(put(ops, data) for data in part.data)) for part in value))
    if isinstance(value, KVCache):
        return KVCache(value.quant, put(ops, value.k), put(ops, value.v))
    return ops.upload(value.copy())


def both(cuda, call, *values):
    """Run `call(ops, *arrays)` on CUDA and on the reference, each on its own; what becomes of each array, in pairs."""
    results = []
    for ops in (cuda, REFERENCE):
        mine = [put(ops, value) for value in values]
        call(ops, *mine)
        parts = [(x.k, x.v) if isinstance(x, KVCache) else () if isinstance(x, Weight | Bank) else (x,) for x in mine]
        results.append([ops.to_host(array) for array in sum(parts, ())])
    return list(zip(*results, strict=True))


def agree(pairs, scale=1.0):
    for got, wanted in pairs:
        if got.dtype == np.float32:
            close(got, wanted, scale)
        else:
            np.testing.assert_array_equal(got, wanted)


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


@pytest.fixture
def launched(cuda, monkeypatch):
    """How often each kernel is launched, recorded ones once."""
    counts, launch = Counter(), cuda.stream.launch

    def counted(kernel, *arguments, **more):
        counts[kernel.name] += 1
        launch(kernel, *arguments, **more)

    monkeypatch.setattr(cuda.stream, "launch", counted)
    return counts


@pytest.fixture
def allocated(device, monkeypatch):
    """The sizes of what is allocated."""
    sizes, allocate = [], device.allocate
    monkeypatch.setattr(device, "allocate", lambda nbytes: sizes.append(nbytes) or allocate(nbytes))
    return sizes


def test_every_verb_is_there():
    assert check(CudaOps) is CudaOps


# ---- verbs ----


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("quant", MATRICES)
def test_matmul(cuda, quant, n):
    rng = np.random.default_rng(n)
    for rows, columns in ((1, 256), (37, 512), (140, 768)):
        w, x = weight(rng, quant, rows, columns), normal(rng, n, columns)
        agree(both(cuda, lambda ops, out, w, x: ops.matmul(out, w, x), poisoned(n, rows), w, x), scale=4)


@pytest.mark.parametrize("quant", [name for name in MATRICES if TYPES[name].block > 1])
def test_matmul_of_a_part_of_each_row(cuda, quant):
    rng = np.random.default_rng(1)
    for n in TOKENS:
        w, wide = weight(rng, quant, 20, 256), normal(rng, n, 2 * 256)
        for part in (slice(0, 256), slice(256, 512)):
            agree(both(cuda, lambda ops, out, w, x, p=part: ops.matmul(out, w, x[:, p]), poisoned(n, 20), w, wide), scale=4)


@pytest.mark.parametrize("quant", EMBEDDINGS)
def test_embed(cuda, quant):
    rng = np.random.default_rng(5)
    for n in TOKENS:
        w, tokens = weight(rng, quant, 40, 768), rng.integers(0, 40, n).astype(np.int32)
        agree(both(cuda, lambda ops, out, w, tokens: ops.embed(out, w, tokens), poisoned(n, 768), w, tokens))


def bank(rng, gate, up, down):
    """Matrices of all experts but one, in slots that do not lie in order."""

    def slots(quant, rows, columns):
        data = stored(rng, quant, (N_EXPERT - 1) * rows, columns, 0.06)
        order = rng.permutation(N_EXPERT - 1) * (len(data) // (N_EXPERT - 1))
        return Slots(TYPES[quant], (rows, columns), (data,), np.zeros(N_EXPERT - 1, np.int64), order)

    return Bank(slots(gate, N_FF, N_EMBD), slots(up, N_FF, N_EMBD), slots(down, N_EMBD, N_FF))


TABLE = np.array([3, -1, 0, 4, 1, 2], np.int32)  # expert 1 is somebody else's


def routed(rng, n):
    """ids and weights of n tokens."""
    return np.stack([rng.permutation(N_EXPERT)[:K] for _ in range(n)]).astype(np.int32), rng.random((n, K), np.float32)


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("types", EXPERTS, ids="-".join)
def test_expert_ffn(cuda, types, n):
    rng = np.random.default_rng(n)
    arrays = normal(rng, n, N_EMBD), normal(rng, n, N_EMBD), bank(rng, *types), TABLE, *routed(rng, n)
    pairs = both(cuda, lambda ops, *arrays: ops.expert_ffn(*arrays), *arrays)
    agree(pairs[1:])
    got, wanted = pairs[0]
    if TYPES[types[2]].block == 1:
        close(got, wanted, scale=16)
    else:
        # h = silu(gate) · up, summed in another order, is now and then rounded to another int8: by 1/127 of the largest of its
        # block, 3 deviations of h or so, times a weight of down: in a sum of 256, 3/127/16 of the sum's deviation.
        assert np.abs(got - wanted).max() < 3 * 3 / 127 / 16 * wanted.std()
        assert np.sqrt(np.mean((got - wanted) ** 2)) < 1e-3 * wanted.std()


@pytest.mark.parametrize("n", TOKENS)
def test_norms_and_gates(cuda, n):
    rng = np.random.default_rng(n)
    wide, x, w, wv = normal(rng, n, 3 * 128), normal(rng, n, 3 * 64), normal(rng, 64), normal(rng, 192)
    odd, column = normal(rng, n, 97), normal(rng, n, 1)
    for call in (
        lambda ops, out, wide, x, w, wv: ops.rms_norm(out, x, wv, 1e-6),
        lambda ops, out, wide, x, w, wv: ops.rms_norm(x, x, wv, 1e-6) or ops.copy(out, x),
        lambda ops, out, wide, x, w, wv: ops.rms_norm(heads(out, 3), halves(wide, 3)[0], w, 1e-6),
        lambda ops, out, wide, x, w, wv: ops.rms_norm(heads(x, 3), heads(x, 3), w, 1e-6) or ops.copy(out, x),
        lambda ops, out, wide, x, w, wv: ops.gate(heads(out, 3), heads(x, 3), halves(wide, 3)[1]),
        lambda ops, out, wide, x, w, wv: ops.gate(heads(x, 3), heads(x, 3), halves(wide, 3)[1]) or ops.copy(out, x),
        lambda ops, out, wide, x, w, wv: ops.swiglu(out, wide[:, :192], x) if n == 1 else ops.swiglu(out, x, x),
        lambda ops, out, wide, x, w, wv: ops.swiglu(x, x, x) or ops.copy(out, x),
        lambda ops, out, wide, x, w, wv: ops.zero(out),
    ):
        agree(both(cuda, call, poisoned(n, 192), wide, x, w, wv))
    for call in (
        lambda ops, out, odd, column: ops.gate(out, odd, column),
        lambda ops, out, odd, column: ops.gate(out, odd, odd),
        lambda ops, out, odd, column: ops.swiglu(out, odd, odd),
        lambda ops, out, odd, column: ops.zero(out) or ops.add(out, odd) or ops.add(out, odd),
    ):
        agree(both(cuda, call, poisoned(n, 97), odd, column))


@pytest.mark.parametrize("n", TOKENS)
def test_rope(cuda, n):
    rng = np.random.default_rng(n)
    freqs, pos = (1e4 ** -(np.arange(0, 24, 2) / 24)).astype(np.float32), np.array([1000], np.int32)
    agree(both(cuda, lambda ops, x, pos, freqs: ops.rope(x, pos, freqs), normal(rng, n, 3, 64), pos, freqs))


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("n", TOKENS)
def test_attention(cuda, kv, n):
    """In one call, and behind what is there; with more than 8 tokens and a small cache in float16, see test_cuda_state.py."""
    quant, n_head, n_kv, n_ctx, scale = TYPES[kv], 6, 2, 160, HEAD**-0.5
    delta = 6 * 2**-12 * np.sqrt(2 * HEAD / 3) * scale
    atol = 2 * (delta + 2**-11) * 5 if n > 8 and kv != "F32" else 0
    for n_past in (0, 5, 100):
        rng = np.random.default_rng(n + n_past)
        empty = np.full((n_ctx, n_kv, HEAD // quant.block * quant.nbytes), 255, np.uint8)  # poison: NaN in each type
        k, v = normal(rng, n_past + n, n_kv, HEAD), normal(rng, n_past + n, n_kv, HEAD)

        def call(ops, out, q, cache, k, v, start, pos, n_past=n_past):
            if n_past:
                ops.store_kv(cache, k[:n_past], v[:n_past], start)
            ops.store_kv(cache, k[n_past:], v[n_past:], pos)
            ops.attention(out, q, cache, pos, scale)

        pos = (np.array([past], np.int32) for past in (0, n_past))
        out, *others = both(
            cuda, call, poisoned(n, n_head, HEAD), normal(rng, n, n_head, HEAD), KVCache(quant, empty, empty), k, v, *pos
        )
        agree(others)
        np.testing.assert_allclose(*out, rtol=0, atol=atol or 8 * 2**-24 * 64 * np.abs(out[1]).max())


@pytest.mark.parametrize("n", TOKENS)
def test_recurrent(cuda, n):
    rng = np.random.default_rng(n)
    n_k_head, n_v_head, d_v, taps = 2, 4, 64, 4
    channels = 2 * n_k_head * D_K + n_v_head * d_v
    arrays = poisoned(n, channels), normal(rng, n, channels), normal(rng, channels, taps), normal(rng, taps - 1, channels)
    agree(both(cuda, lambda ops, *arrays: ops.short_conv(*arrays), *arrays))
    alpha, beta = normal(rng, n, n_v_head), normal(rng, n, n_v_head)
    a, dt_bias = -np.exp(normal(rng, n_v_head)), normal(rng, n_v_head)
    arrays = poisoned(n, n_v_head, d_v), normal(rng, n, channels), alpha, beta, a, dt_bias, normal(rng, n_v_head, D_K, d_v)
    agree(both(cuda, lambda ops, *arrays: ops.delta_rule(*arrays), *arrays), scale=4)


@pytest.mark.parametrize("n", TOKENS)
def test_route(cuda, n):
    logits = 3 * normal(np.random.default_rng(n), n, 40)
    logits[0, 7] = logits[0, 9] = 20  # a tie: the lower id comes first
    ids, weights, _ = both(
        cuda, lambda ops, *arrays: ops.route(*arrays), np.full((n, 8), -7, np.int32), poisoned(n, 8), logits
    )
    agree([ids, weights])
    assert ids[0][0, :2].tolist() == [7, 9]


@pytest.mark.parametrize("n_vocab, k", [(520, 1), (5000, 40), (5000, 1024), (300, 300)])
def test_top_k(cuda, n_vocab, k):
    rng = np.random.default_rng(k)
    for rows in (1, 3):
        logits = rng.integers(-50, 50, (rows, n_vocab)).astype(np.float32)  # ties everywhere
        agree(both(cuda, lambda ops, *arrays: ops.top_k(*arrays), np.full((rows, k), -7, np.int32), poisoned(rows, k), logits))


@pytest.mark.parametrize("n", TOKENS)
def test_post_and_wait(cuda, n):
    ids, _ = routed(np.random.default_rng(n), n)
    for absent in ([], [0, 1, 2, 3, 4, 5], [4]):
        table = np.where(np.isin(np.arange(N_EXPERT), absent), -1, 7).astype(np.int32)

        def call(ops, box, answer, ids, table):
            ops.post(box, ids, table=table, after=ids)
            ops.wait(box, answer, table)  # it is answered already
            ops.post(box, ids)

        box = np.full(2 + 2 * n, 99, np.int32)
        agree(both(cuda, call, box, np.array([2**31 - 1], np.int32), ids, table))


# ---- arrays ----

VIEWS = [
    lambda x: x[2], lambda x: x[-1], lambda x: x[1:4], lambda x: x[:, 1], lambda x: x[:, 1:3], lambda x: x[1:, :, 2:5],
    lambda x: x[3, 2],
    lambda x: x[:2, -1, 4], lambda x: x[1:1], lambda x: x[0:1, 1:2][0], lambda x: x.reshape(5, 24), lambda x: x.reshape((-1, 8)),
    lambda x: x.reshape(x.shape[0], 2, -1)[:, 1], lambda x: x[2:].reshape(9, 8)[1:], lambda x: x[1:2, :, :].reshape(24),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8])
def test_views_are_numpys(cuda, dtype):
    x = np.arange(120).astype(dtype).reshape(5, 3, 8)
    array = cuda.upload(x)
    for view in VIEWS:
        got, wanted = view(array), view(x)
        same = ("shape", "strides", "dtype", "size", "nbytes", "ndim", "itemsize")
        assert [getattr(got, name) for name in same] == [getattr(wanted, name) for name in same]
        assert got.contiguous == wanted.flags.c_contiguous or wanted.size == 0
        if wanted.size:
            np.testing.assert_array_equal(cuda.to_host(got), wanted)


def test_write_and_copy_to_views(cuda):
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.int32):
        x, a, b = (rng.integers(-(2**30), 2**30, shape).astype(dtype) for shape in ((6, 70), (2, 70), (1, 70)))
        array = cuda.upload(x)
        cuda.write(array[1:3], a)
        a[:] = 0  # may be changed as soon as it is written
        cuda.copy(array[5], cuda.upload(b)[0])
        cuda.copy(array[3:5], array[1:3])
        cuda.write(array[0, 10:20], x[4, 50:60])
        got = cuda.to_host(array)
        np.testing.assert_array_equal(got[3:5], got[1:3])
        np.testing.assert_array_equal(got[5], b[0])
        np.testing.assert_array_equal(got[0, 10:20], x[4, 50:60])
        np.testing.assert_array_equal(got[0, 20:], x[0, 20:])
        assert got[1:3].any()
    for view in (lambda x: x[:, ::2], lambda x: x[::-1], lambda x: x.T):  # an array of any layout can go up
        np.testing.assert_array_equal(cuda.to_host(cuda.upload(view(x))), view(x))
    large = rng.integers(0, 256, 3 * LARGE + 5, np.uint8)
    array = cuda.upload(large)
    cuda.write(array[16 : 16 + 2 * LARGE], large[: 2 * LARGE])
    np.testing.assert_array_equal(cuda.to_host(array), np.concatenate([large[:16], large[: 2 * LARGE], large[16 + 2 * LARGE :]]))


def test_memory_is_zero_and_is_given_back():
    ops = CudaOps(SimDevice(total=5000))
    array = ops.empty((10, 100), np.float32)
    part = array[3:5].reshape(-1)
    assert not ops.to_host(part).any() and ops.device.memory() == (1000, 5000)
    del array
    assert ops.device.memory() == (1000, 5000), "a view keeps its memory"
    with pytest.raises(OutOfMemory):
        ops.upload(np.ones(300, np.float32))
    del part
    assert ops.device.memory() == (5000, 5000)
    assert ops.to_host(ops.empty((0, 3), np.int32)[:]).shape == (0, 3)
    kept = ops.empty((7,), np.float32)
    ops.close()
    del kept  # gives nothing back any more


# ---- int8 blocks: made once for all products of an input, and out of date as soon as it changes ----


def test_an_input_is_quantised_once(cuda, launched):
    rng = np.random.default_rng(1)
    for n in (1, 5, 9):
        x, norm = normal(rng, n, 256), normal(rng, 256)
        matrices = [weight(rng, quant, 20, 256) for quant in ("Q8_0", "Q6_K", "Q8_0", "F32")]

        def products(ops, y, x, norm, *matrices, step=True, normed=True, times=1):
            def run():
                if normed:
                    ops.rms_norm(x, x, norm, 1e-6)
                for i, w in enumerate(matrices):
                    ops.matmul(y[i], w, x)

            for _ in range(times):
                if step:
                    ops.replay(None, run)
                else:
                    run()

        for how, quantised in [
            (dict(normed=True), 0),  # the norm writes the blocks, too
            (dict(normed=False), 1),
            (dict(normed=False, times=3), 3),  # between steps anything may happen to x
            (dict(normed=False, step=False), 3),
        ]:
            launched.clear()
            agree(both(cuda, lambda ops, *arrays, h=how: products(ops, *arrays, **h), poisoned(4, n, 20), x, norm, *matrices), 4)
            assert launched["quantize"] == quantised, how


POS, FREQS = np.array([7], np.int32), (1e4 ** -(np.arange(0, 64, 2) / 64)).astype(np.float32)
# What may happen to h [4, 256] between two products; `o` are values of its shape, `c` what a verb needs besides.
CHANGES = {
    "write": lambda ops, h, o, c: ops.write(h, c["values"]),
    "write of a row": lambda ops, h, o, c: ops.write(h[2:3], c["values"][:1]),
    "copy": lambda ops, h, o, c: ops.copy(h, o),
    "copy of a row": lambda ops, h, o, c: ops.copy(h[3], o[1]),
    "embed": lambda ops, h, o, c: ops.embed(h, c["matrix"], c["tokens"]),
    "matmul": lambda ops, h, o, c: ops.matmul(h, c["matrix"], o),
    "norm": lambda ops, h, o, c: ops.rms_norm(h, o, c["norm"], 1e-6),
    "norm in place": lambda ops, h, o, c: ops.rms_norm(h, h, c["norm"], 1e-6),
    "norm of heads": lambda ops, h, o, c: ops.rms_norm(heads(h, 4), heads(o, 4), c["head_norm"], 1e-6),
    "swiglu": lambda ops, h, o, c: ops.swiglu(h, o, h),
    "gate": lambda ops, h, o, c: ops.gate(h, o, o),
    "gate of heads": lambda ops, h, o, c: ops.gate(heads(h, 4), heads(h, 4), heads(o, 4)),
    "gate of rows": lambda ops, h, o, c: ops.gate(h, h, o[:, :1]),
    "add": lambda ops, h, o, c: ops.add(h, o),
    "add to a row": lambda ops, h, o, c: ops.add(h[1:2], o[:1]),
    "zero": lambda ops, h, o, c: ops.zero(h[2:]),
    "rope": lambda ops, h, o, c: ops.rope(heads(h, 4), c["pos"], c["freqs"]),
    "attention": lambda ops, h, o, c: ops.attention(heads(h, 4), heads(o, 4), c["cache"], c["start"], 0.1),
    "short_conv": lambda ops, h, o, c: ops.short_conv(h, o, c["conv"], c["tail"]),
    "tail of short_conv": lambda ops, h, o, c: ops.short_conv(c["wide"], o, c["conv"], h[:3]),
    "delta_rule": lambda ops, h, o, c: ops.delta_rule(heads(h, 4), c["qkv"], o[0:1, :16].reshape(4, 4), *c["delta"]),
    "experts": lambda ops, h, o, c: ops.expert_ffn(h.reshape(2, 512), o.reshape(2, 512), c["bank"], c["table"], *c["routed"]),
}  # fmt: skip
QUANTISES = {"norm", "norm in place", "swiglu", "gate", "gate of heads"}  # these write the blocks of what they write


def context(ops):
    """What the verbs in CHANGES need besides, the same on each backend."""
    rng = np.random.default_rng(11)
    cache = KVCache(TYPES["F32"], *normal(rng, 2, 40, 2, HEAD).view(np.uint8))
    alpha, decay, bias, state = normal(rng, 4, 4), -np.exp(normal(rng, 4)), normal(rng, 4), normal(rng, 4, D_K, 64)
    arrays = dict(
        matrix=weight(rng, "F32", 256, 256), tokens=np.array([5, 250, 0, 5], np.int32), norm=normal(rng, 256), pos=POS,
        freqs=FREQS, head_norm=normal(rng, 64), cache=cache, start=np.array([20], np.int32), conv=normal(rng, 256, 4),
        tail=normal(rng, 3, 256), wide=poisoned(4, 256), qkv=normal(rng, 4, 4 * D_K + 256), bank=bank(rng, *EXPERTS[0]),
        table=TABLE,
    )  # fmt: skip
    several = dict(delta=(alpha, decay, bias, state), routed=routed(rng, 2))
    made = {name: put(ops, array) for name, array in arrays.items()}
    made |= {name: tuple(put(ops, array) for array in group) for name, group in several.items()}
    return made | {"values": normal(rng, 4, 256)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_product_sees_what_a_verb_changed(cuda, launched, change):
    rng = np.random.default_rng(3)

    def call(ops, before, after, again, w, h, o):
        c = context(ops)

        def step():
            ops.matmul(before, w, h)
            CHANGES[change](ops, h, o, c)
            ops.matmul(after, w, h)
            ops.matmul(again, w, h)

        ops.replay(None, step)

    arrays = *(poisoned(4, 20) for _ in range(3)), weight(rng, "Q8_0", 20, 256), normal(rng, 4, 256), normal(rng, 4, 256)
    before, after, again, (h, _), _ = both(cuda, call, *arrays)
    close(*before, scale=4)
    # Blocks of the same bits on both sides would show the change exactly; where h differs by an ulp, an int8 may differ by one.
    step = np.abs(h).max() / 127 * 4
    assert np.abs(after[0] - after[1]).max() < step < np.abs(after[0] - before[0]).max()
    np.testing.assert_array_equal(after[0], again[0])
    assert launched["quantize"] == (1 if change in QUANTISES else 2)


def test_blocks_of_other_shapes_at_the_same_address(cuda):
    rng = np.random.default_rng(4)

    def call(ops, y, w, narrow, x):
        def step():
            ops.matmul(y[0, :4], w, x[:, :256])  # rows 512 apart
            ops.matmul(y[1, :4], w, x.reshape(8, 256)[:4])
            ops.matmul(y[2], w, x.reshape(8, 256))
            ops.matmul(y[3, :1], w, x.reshape(8, 256)[:1])
            ops.matmul(y[4, :4], w, x[:, :256])
            ops.matmul(y[5], narrow, x.reshape(-1, 32)[:8])

        ops.replay(None, step)

    matrices = weight(rng, "Q8_0", 20, 256), weight(rng, "Q8_0", 20, 32)
    agree(both(cuda, call, np.zeros((6, 8, 20), np.float32), *matrices, normal(rng, 4, 512)), scale=4)


# ---- steps that come back ----


class Steps:
    """Steps of n tokens on a backend: what a table's rotated rows at some position give; `calls` of the verbs are counted."""

    def __init__(self, ops, n):
        rng = np.random.default_rng(8)
        self.ops, self.calls = ops, 0
        matrices = weight(rng, "F32", 40, 256), weight(rng, "Q8_0", 30, 256)
        self.table, self.matrix, self.norm, self.freqs = (put(ops, x) for x in (*matrices, normal(rng, 256), FREQS))
        self.tokens, self.pos = ops.empty((n,), np.int32), ops.empty((1,), np.int32)
        self.x, self.y = ops.empty((n, 256), np.float32), ops.empty((n, 30), np.float32)

    def step(self):
        self.calls += 1
        self.ops.embed(self.x, self.table, self.tokens)
        self.ops.rope(heads(self.x, 4), self.pos, self.freqs)
        self.ops.matmul(self.y, self.matrix, self.x)

    def run(self, key, tokens, pos):
        self.ops.write(self.tokens, np.asarray(tokens, np.int32))
        self.ops.write(self.pos, np.array([pos], np.int32))
        self.ops.replay(key, self.step)
        return self.ops.to_host(self.y)


def check_steps(mine, key, n, times, seed=0):
    """Run it with other tokens and positions every time; all must be as the reference's."""
    rng, theirs = np.random.default_rng(seed), Steps(REFERENCE, n)
    for _ in range(times):
        inputs = rng.integers(0, 40, n), int(rng.integers(0, 5000))
        # An angle's sine and cosine differ by an ulp, and now and then an int8 by one: by 1/127 of the largest of 32.
        wanted = theirs.run(None, *inputs)
        np.testing.assert_allclose(mine.run(key, *inputs), wanted, rtol=0, atol=6 / 127)
        assert wanted.std() > 5


@pytest.mark.parametrize("n", [1, 2, 8])
def test_replay(cuda, allocated, launched, n):
    steps = Steps(cuda, n)
    check_steps(steps, key := object(), n, 2)
    assert steps.calls == 2 and launched["embed"] == 2, "run, then recorded"
    allocated.clear()
    check_steps(steps, key, n, 4, seed=1)
    assert steps.calls == 2 and launched["embed"] == 2 and not allocated
    check_steps(steps, None, n, 3)
    assert steps.calls == 5, "None comes back never"


def test_steps_take_turns(cuda):
    """Two sizes on the same scratch, and the sizes' own steps, in any order."""
    steps, rng = [(n, Steps(cuda, n), object()) for n in (1, 3)], np.random.default_rng(0)
    for i in range(12):
        n, mine, key = steps[rng.integers(2)]
        check_steps(mine, key, n, 1, seed=i)
    assert [mine.calls for _, mine, _ in steps] == [2, 2]


def test_old_graphs_go(cuda):
    steps, keys = Steps(cuda, 1), [object() for _ in range(KEPT_GRAPHS + 1)]
    check_steps(steps, keys[0], 1, 3)
    for key in keys[1:]:
        check_steps(steps, key, 1, 2)
        check_steps(steps, keys[1], 1, 1)
        assert len(cuda.graphs) <= KEPT_GRAPHS
    calls = steps.calls
    check_steps(steps, keys[1], 1, 1)
    assert steps.calls == calls, "what is used stays"
    check_steps(steps, keys[0], 1, 3)
    assert steps.calls == calls + 2 and len(cuda.graphs) == KEPT_GRAPHS


@pytest.mark.parametrize("at", [1, 2, 3], ids=["first run", "capture", "replay"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_breaks_off_can_come_back(cuda, monkeypatch, error, at):
    steps, key = Steps(cuda, 2), object()
    check_steps(steps, key, 2, at - 1)
    rope = cuda.rope

    def broken(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "rope", broken)
        if at < 3:
            with pytest.raises(error):
                steps.run(key, [1, 2], 3)
        else:
            steps.run(key, [1, 2], 3)  # what is recorded calls nothing
    assert cuda.rope == rope and not cuda.in_step and not cuda.fresh
    check_steps(steps, key, 2, 4)


def test_garbage_found_while_a_step_is_recorded(cuda):
    """Arrays that die in a capture are given back behind it: a device must not free in one."""
    steps, key = Steps(cuda, 1), object()
    check_steps(steps, key, 1, 1)
    gc.collect()
    free, _ = cuda.device.memory()
    circle = [cuda.empty((100, 100), np.float32)]
    circle.append(circle)
    embed = steps.step

    def step():
        embed()
        gc.collect()

    steps.step = step
    del circle
    check_steps(steps, key, 1, 3)
    assert steps.calls == 2 and cuda.device.memory()[0] >= free


def test_attention_over_prompts_of_any_length_has_one_scratch(cuda, allocated):
    rng = np.random.default_rng(0)
    cache = put(cuda, KVCache(TYPES["F16"], *np.zeros((2, 50, 2, 2 * HEAD), np.uint8)))
    q, out, pos = cuda.upload(normal(rng, 40, 6, HEAD)), cuda.empty((40, 6, HEAD), np.float32), cuda.upload(np.zeros(1, np.int32))
    cuda.attention(out[:9], q[:9], cache, pos, 0.1)
    allocated.clear()
    for n in (1, 2, 8, 10, 12, 17, 40):
        cuda.attention(out[:n], q[:n], cache, pos, 0.1)
    assert not allocated
