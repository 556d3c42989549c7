"""The CUDA stand-in computes what a GPU does: every feature that kernels use, against answers known otherwise.

The same kernels run on a real GPU, where there is one: then it is common.cuh's PTX that is tested.
"""

import numpy as np
import pytest

from rgpu.errors import DeviceError
from rgpu.ops.cupy_device import CupyDevice
from tests.cuda_sim import SimDevice
from tests.cuda_sim.toys import Bench, text

CAPABILITIES = [(6, 1), (7, 5), (8, 9)]  # shuffles; small tensor-core products; large ones and late copies


def gpu():
    try:
        return CupyDevice()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[*CAPABILITIES, pytest.param("gpu", marks=pytest.mark.gpu)], ids=str)
def toys(request):
    device = gpu() if request.param == "gpu" else SimDevice(capability=request.param)
    yield Bench(device, text("toys.cu"))
    device.close()


def test_indices(toys):
    got = toys.run("indices", ((24, 60), np.int32), grid=(2, 3, 4), block=(3, 4, 5))
    assert np.array_equal(got, np.arange(24)[:, None] * 1000 + np.arange(60))


@pytest.mark.parametrize("kernel, dtype, shared", [("floats", "f4", 0), ("bytes", "u1", 0), ("dynamic", "f4", 1024)])
def test_shared_memory(toys, kernel, dtype, shared):
    x = np.random.default_rng(1).integers(0, 256, (7, 256)).astype(dtype)
    got = toys.run(f"turn_{kernel}", (x.shape, dtype), x, grid=(7,), block=(256,), shared=shared)
    assert np.array_equal(got, x[:, ::-1])


def test_shuffles(toys):
    lane, v = np.arange(32), np.arange(32) ** 2
    down = np.where(lane % 16 + 5 < 16, lane + 5, lane)
    up = np.where(lane < 3, lane, lane - 3)
    sources = [(lane * 5 + 3) % 32, up, down, lane ^ 9, 0 * lane + 7, lane // 8 * 8 + 2]
    assert np.array_equal(toys.run("shuffles", ((6, 32), np.int32)), v[np.array(sources)])


def test_votes(toys):
    got = toys.run("votes", ((5, 32), np.uint32))
    lane = np.arange(32)
    assert np.array_equal(got[0], np.full(32, sum(1 << i for i in range(0, 32, 3))))
    assert np.array_equal(got[1:3], np.full((2, 32), 2))
    assert np.array_equal(got[3], np.where(lane < 8, 8 + 7 + 6 + 5 + 4, 20))
    assert np.array_equal(got[4], lane ^ 16)


def test_threads_that_have_ended_are_not_waited_for(toys):
    got = toys.run("early_exit", (70, np.int32), 70, block=(96,))
    assert np.array_equal(got, np.full(70, 70))


def test_atomics(toys):
    start = np.array([0, 0, 9, 0, 0], np.int32), np.zeros(1, np.float32), np.zeros(1, np.uint64)
    addresses = [toys.put(array) for array in start]
    toys.launch("atomics", 5, 64, *addresses)
    counts, total, tickets = (toys.get(at, array.shape, array.dtype) for at, array in zip(addresses, start, strict=True))
    assert list(counts[:3]) == [320, 319, 0] and counts[3] == counts[4] > 0 and total == 160 and tickets == 320 << 33


def test_integers(toys):
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 256, (2, 256, 4)).astype(np.uint8)
    got = toys.run("integers", ((5, 256), np.int32), a, b, block=(256,))
    signed = (a.view(np.int8).astype(int) * b.view(np.int8)).sum(1) + 100
    bytes_of = got.view(np.uint8).reshape(5, 256, 4)
    x, y = a.view(np.int32)[:, 0], b.view(np.int32)[:, 0]
    bits = [np.array([f(int(v) & 0xFFFFFFFF) for v in w]) for w, f in ((x, int.bit_count), (y, lambda v: 32 - v.bit_length()))]
    assert np.array_equal(got[0], signed) and np.array_equal(got[1], (a.astype(int) * b).sum(1) + 100)
    assert np.array_equal(bytes_of[2], np.stack([a[:, 0], b[:, 0], a[:, 1], b[:, 1]], 1))
    assert np.array_equal(got[3], x ^ y ^ bits[0] ^ bits[1]) and np.array_equal(bytes_of[4], a - b)


def test_half_precision(toys):
    halves = np.arange(1 << 16, dtype=np.uint16)
    floats = halves.view(np.float16).astype(np.float32)
    got = toys.run("from_half", (1 << 16, np.float32), halves, grid=(256,), block=(256,))
    assert np.array_equal(got, floats, equal_nan=True)
    # Each half, the middle between neighbours and its neighbours: where rounding decides.
    finite = floats[np.isfinite(floats)]
    middle = ((finite[:-1].astype(float) + finite[1:]) / 2).astype(np.float32)
    edges = np.array([65519.996, 65520, 1e30, -1e30, 0.0, -0.0, np.inf, 2**-25, 2**-24 * 0.50001, np.nan], np.float32)
    x = np.concatenate([floats, middle, np.nextafter(middle, np.float32(9e9)), np.nextafter(middle, np.float32(-9e9)), edges])
    x = np.resize(x, -(-len(x) // 256) * 256)
    pairs = toys.put(np.zeros(len(x), np.uint32))
    got = toys.run("to_half", (len(x), np.float16), pairs, x, grid=(len(x) // 256,), block=(256,))
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float16)
    assert np.array_equal(got, wanted, equal_nan=True) and np.array_equal(np.signbit(got), np.signbit(wanted))
    both = toys.get(pairs, (len(x), 2), np.float16)
    assert np.array_equal(both[:, 0], wanted, equal_nan=True) and (both[:, 1] == -1.5).all()


def test_functions(toys):
    x = np.random.default_rng(3).normal(0, 4, 256).astype(np.float32)
    got, wide = toys.run("functions", ((9, 256), np.float32), x, block=(256,)), x.astype(float)
    magnitude = np.abs(wide)
    scaled = wide * np.resize([2, 4], 256)
    exact = [np.exp(wide), np.exp(wide), np.log(magnitude), np.tanh(wide), magnitude**-0.5, wide * wide + 1, scaled]
    # CUDA's guide gives 2 ulp for the functions, and for __expf 2 + |1.17 x|, which is below 24 here; half an ulp is 2^-24.
    for row, wanted, ulps in zip(got, exact, (2, 24, 2, 2, 2, 1, 1), strict=False):
        assert np.all(np.abs(row - wanted) <= ulps * np.spacing(np.abs(wanted).astype(np.float32)))
    assert np.array_equal(got[7].view(np.uint32), x.view(np.uint32) & 0xFFFF0000) and np.array_equal(got[8], np.rint(x))


def test_reductions(toys):
    x = np.random.default_rng(4).integers(-100, 100, 160).astype(np.float32)  # whole numbers: sums are exact
    got = toys.run("reductions", ((5, 160), np.float32), x, block=(32, 5))
    warps = x.reshape(5, 32)
    wanted = [np.repeat(warps.sum(1), 32), np.repeat(warps.max(1), 32), np.repeat(x.reshape(20, 8).sum(1), 8), x.sum(), -x.min()]
    for row, answer in zip(got, wanted, strict=True):
        assert np.array_equal(row, np.broadcast_to(answer, 160))


def test_loads(toys):
    x = np.random.default_rng(5).integers(0, 256, 640).astype(np.uint8)
    got, words = toys.run("loads", ((4, 32), np.uint32), x), x[:512].view(np.uint32).reshape(32, 4)
    assert np.array_equal(got[0], np.bitwise_xor.reduce(words, axis=1)) and np.array_equal(got[1], words.sum(1, dtype=np.uint32))
    for row, stride, first in ((got[2], 18, 2), (got[3], 17, 1)):
        assert np.array_equal(row.view(np.uint8).reshape(32, 4), [x[stride * i + first :][:4] for i in range(32)])


@pytest.mark.parametrize("matrices", [0, 1])
@pytest.mark.parametrize("kind", ["f16", "s8"])
def test_products_of_a_warp(toys, kind, matrices):
    rng = np.random.default_rng(6)
    if kind == "f16":  # whole numbers up to 8: products and sums are exact in any order
        a, b = (rng.integers(-8, 9, (n, 16)).astype(np.float16) for n in (16, 8))
    else:
        a, b = (rng.integers(-128, 128, (n, 32)).astype(np.int8) for n in (16, 8))
    got = toys.run(f"product_{kind}", ((16, 8), np.float32 if kind == "f16" else np.int32), a, b, matrices)
    start = np.array([[1, 2], [3, 4]])[np.arange(16)[:, None] // 8, np.arange(8) % 2]
    assert np.array_equal(got, a.astype(int) @ b.astype(int).T + start)


def test_matrices_are_transposed(toys):
    x = np.random.default_rng(7).integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    got = toys.run("transposed", ((4, 32), np.uint32), x).view(np.uint16).reshape(4, 8, 4, 2)  # [matrix, g, t, which]
    assert np.array_equal(got.reshape(4, 8, 8), x.transpose(0, 2, 1))


def test_late_copies_to_shared_memory(toys):
    x = np.random.default_rng(8).integers(0, 1 << 32, (5, 64, 4)).astype(np.uint32)
    got = toys.run("pipeline", (x.shape, np.uint32), x, 5, block=(64,))
    assert np.array_equal(got, x[:, ::-1])
