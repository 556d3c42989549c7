"""On a real GPU (`pytest -m gpu`): the PTX, what the stand-in has passed, then CUDA itself, real shapes, whole models.

The tests of kernels, verbs and engines are those of test_cuda_*.py, each with this device instead of its own. RGPU_STAND_IN=1
runs this file on the stand-in, at smaller sizes where it would take minutes: a test is then known to work before it meets a GPU.
"""

import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import pytest

from bench import shapes
from rgpu import Engine, EngineConfig, SamplingParams, backend
from rgpu.cache import cache_dir
from rgpu.engine import builtin_model
from rgpu.errors import DeviceError, OutOfMemory
from rgpu.ops import Bank, Needs, Slots, Weight
from rgpu.ops.cpu import CpuOps
from rgpu.ops.cuda import CudaOps
from rgpu.ops.cuda_source import source
from rgpu.ops.cupy_device import CupyDevice
from rgpu.quants import TYPES
from rgpu.state import KVCache
from tests import test_cuda_engine, test_cuda_matmul, test_cuda_ops, test_cuda_state
from tests.cuda_sim import SimDevice
from tests.cuda_sim.toys import Bench
from tests.test_engine import prompt
from tests.test_ops import close, poisoned, stored

STAND_IN = bool(os.environ.get("RGPU_STAND_IN"))


def opened():
    if STAND_IN:
        return SimDevice(total=8 << 30)
    try:
        return CupyDevice(cache_dir() / "cuda")  # the engine's: what it has compiled is not compiled again
    except DeviceError as error:
        pytest.skip(str(error), allow_module_level=True)


def stand_in(*_):
    """Instead of the engine's GPU."""
    return CudaOps(SimDevice(total=8 << 30)), "CUDA stand-in"


DEVICE = opened()
pytestmark = [] if STAND_IN else [pytest.mark.gpu, test_cuda_ops.pytestmark]


@pytest.fixture(autouse=True, scope="module")
def engines_device():
    with pytest.MonkeyPatch.context() as patch:
        if STAND_IN:
            patch.setattr(backend, "_cuda", stand_in)
        yield


@pytest.fixture(scope="module")
def device():
    yield DEVICE
    DEVICE.close()


# ---- the PTX of common.cuh, one instruction after another: what no compiler for a host can check ----

INSTRUCTIONS = """
// A [16, K] and B transposed, [8, K], as words of e neighbours along K; C [16, 8].
template <class T, class F>
__device__ void product(T* c, const uint32_t* a, const uint32_t* b, F mma) {
    int g = lane_number() / 4, t = lane_number() % 4, first = 8 * g + 2 * t, at[4] = {first, first + 1, first + 64, first + 65};
    uint32_t left[4] = {a[8 * g + t], a[8 * (g + 8) + t], a[8 * g + t + 4], a[8 * (g + 8) + t + 4]};
    uint32_t right[2] = {b[8 * g + t], b[8 * g + t + 4]};
    T sums[4];
    for (int i = 0; i < 4; i++) sums[i] = c[at[i]];
    mma(sums, left, right);
    for (int i = 0; i < 4; i++) c[at[i]] = sums[i];
}
struct F16 { __device__ void operator()(float (&c)[4], uint32_t (&a)[4], uint32_t (&b)[2]) { mma_f16(c, a, b); } };
struct S8 { __device__ void operator()(int (&c)[4], uint32_t (&a)[4], uint32_t (&b)[2]) { mma_s8(c, a, b); } };
extern "C" __global__ void product_f16(float* c, const uint32_t* a, const uint32_t* b) { product(c, a, b, F16()); }
extern "C" __global__ void product_s8(int* c, const uint32_t* a, const uint32_t* b) { product(c, a, b, S8()); }
// Rows of 8 elements, 24 apart in shared memory.
extern "C" __global__ void matrices(uint32_t* out, const uint4* in) {
    __shared__ __align__(16) uint16_t tile[32 * 24];
    int lane = lane_number();
    *(uint4*)(tile + 24 * lane) = in[lane];
    __syncthreads();
    uint32_t plain[4], turned[4];
    ldmatrix(plain, tile + 24 * lane);
    ldmatrix<true>(turned, tile + 24 * lane);
    for (int i = 0; i < 4; i++) {
        out[32 * i + lane] = plain[i];
        out[32 * (i + 4) + lane] = turned[i];
    }
}
// Parts of 256 pieces of 16 bytes through two buffers, each part turned round; the next part is under way meanwhile.
extern "C" __global__ void pieces(uint4* out, const uint4* in, int n) {
    __shared__ __align__(16) uint4 buffer[2][256];
    int i = threadIdx.x;
    copy_async_16(&buffer[0][i], in + i);
    copy_async_commit();
    for (int part = 0; part < n; part++) {
        if (part + 1 < n) copy_async_16(&buffer[(part + 1) % 2][i], in + (part + 1) * 256 + i);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        out[part * 256 + i] = buffer[part % 2][255 - i];
        __syncthreads();
    }
}
extern "C" __global__ void once(uint4* out, const uint4* in) { out[threadIdx.x] = load_16_once(in + threadIdx.x); }
extern "C" __global__ void from_half(float* out, const uint16_t* in) {
    int i = blockIdx.x * 256 + threadIdx.x;
    out[i] = half_to_float(in[i]);
}
extern "C" __global__ void to_half(uint32_t* out, const float* in) {
    int i = blockIdx.x * 256 + threadIdx.x;
    uint32_t pair = floats_to_half2(in[2 * i], in[2 * i + 1]);
    uint32_t each = float_to_half(in[2 * i]) | (uint32_t)float_to_half(in[2 * i + 1]) << 16;
    out[i] = pair == each ? pair : 0xFFFFFFFF;
}
"""


@pytest.fixture(scope="module")
def instructions(device):
    return Bench(device, source("kernels/common.cuh") + INSTRUCTIONS)


def updated(bench, name, start, *arguments):
    """What a kernel of one warp makes of its first argument."""
    addresses = [bench.put(array) for array in (start, *arguments)]
    bench.launch(name, 1, 32, *addresses)
    return bench.get(addresses[0], start.shape, start.dtype)


def test_mma_of_float16(instructions):
    """Small integers: all sums are exact, so that a wrong place in a fragment shows and rounding does not."""
    rng = np.random.default_rng(1)
    a, b, c = rng.integers(-9, 10, (16, 16)), rng.integers(-9, 10, (8, 16)), rng.integers(-99, 100, (16, 8))
    got = updated(instructions, "product_f16", c.astype(np.float32), a.astype(np.float16), b.astype(np.float16))
    np.testing.assert_array_equal(got, c + a @ b.T)


def test_mma_of_float16_keeps_float32_sums(instructions):
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal(shape).astype(np.float16) for shape in ((16, 16), (8, 16), (16, 8)))
    wanted = c + a.astype(np.float64) @ b.T
    # Terms below 16; tensor cores cut each of 16 off at 2**-23 of the largest, at worst. Float16 sums would be off by 4e-3.
    np.testing.assert_allclose(updated(instructions, "product_f16", c.astype(np.float32), a, b), wanted, rtol=0, atol=5e-5)


def test_mma_of_int8(instructions):
    rng = np.random.default_rng(3)
    a, b = (rng.integers(-128, 128, shape, np.int8) for shape in ((16, 32), (8, 32)))
    a[0], b[0], c = -128, -128, rng.integers(-(10**6), 10**6, (16, 8), np.int32)
    np.testing.assert_array_equal(updated(instructions, "product_s8", c, a, b), c + a.astype(np.int32) @ b.T.astype(np.int32))


def test_ldmatrix(instructions):
    x = np.random.default_rng(4).integers(0, 1 << 16, (4, 8, 8), np.uint16)
    got = instructions.run("matrices", ((2, 4, 32, 2), np.uint16), x)
    # Lane 4g + t: elements [g][2t] and [g][2t + 1], so rows as they are; transposed, those of the transposed matrices.
    np.testing.assert_array_equal(got[0].reshape(4, 8, 8), x)
    np.testing.assert_array_equal(got[1].reshape(4, 8, 8), x.transpose(0, 2, 1))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_cp_async(instructions, n):
    x = np.random.default_rng(5).integers(0, 1 << 32, (n, 256, 4), np.uint32)
    got = instructions.run("pieces", (x.shape, np.uint32), x, n, block=(256,))
    np.testing.assert_array_equal(got, x[:, ::-1])


def test_loads_that_skip_a_cache(instructions):
    x = np.random.default_rng(6).integers(0, 1 << 32, (128, 4), np.uint32)
    np.testing.assert_array_equal(instructions.run("once", (x.shape, np.uint32), x, block=(128,)), x)


def test_conversions_of_halves(instructions):
    """All of them, and what lies in the middle between two, to the nearest and to even ones."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    floats = halves.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(instructions.run("from_half", (1 << 16, np.float32), halves, grid=(256,), block=(256,)), floats)
    finite = np.sort(floats[np.isfinite(floats)])
    x = np.concatenate([finite, (finite[:-1] + finite[1:]) / 2, np.random.default_rng(7).standard_normal(1 << 16, np.float32)])
    x = np.resize(np.concatenate([x, np.float32([1e6, -1e6, 65519, 65520, np.inf, -np.inf, 1e-8, -1e-8])]), 512 * 400)
    got = instructions.run("to_half", (x.size, np.uint16), x, grid=(400,), block=(256,))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, x.astype(np.float16).view(np.uint16))


# ---- what the stand-in has passed ----


def of(module, *fixtures: str) -> type:
    """A class of a file's tests that ask for one of these fixtures."""
    asking = {
        name: staticmethod(test)
        for name, test in vars(module).items()
        if name.startswith("test_") and set(fixtures) & set(signature(test).parameters)
    }
    assert asking, f"no test of {module.__name__} asks for {fixtures}"
    return type(module.__name__, (), asking)


class OnDevice:
    """Instead of a device of its own, this one."""

    def __init__(self, device):
        self.device, self.stream = device, device.stream()


class Products(OnDevice, test_cuda_matmul.Gpu):
    pass


class States(OnDevice, test_cuda_state.Gpu):
    pass


class TestProducts(of(test_cuda_matmul, "gpu")):
    @pytest.fixture
    def gpu(self, device):
        return Products(device)


class TestStates(of(test_cuda_state, "gpu")):
    @pytest.fixture
    def gpu(self, device):
        return States(device)


# Fixtures of the files below, which find this file's device.
allocated, cuda, launched = test_cuda_ops.allocated, test_cuda_ops.cuda, test_cuda_ops.launched
engine, paths = test_cuda_engine.engine, test_cuda_engine.paths


class TestVerbs(of(test_cuda_ops, "device", "cuda")):
    pass


class TestEngines(of(test_cuda_engine, "device", "engine")):
    pass


# ---- CUDA itself ----

TOYS = """
extern "C" __global__ void add(float* out, const float* in, float x, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = in[i] + x;
}
extern "C" __global__ void turn(float* out, const float* in, int n) {
    extern __shared__ float shared[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) shared[i] = in[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = shared[n - 1 - i];
}
extern "C" __global__ void fault(uint64_t at) { *(volatile float*)at = 1; }
"""
N = 12_000  # floats: as shared memory, more than a block has without asking


@pytest.fixture(scope="module")
def toys(device):
    return device.load(source("kernels/common.cuh") + TOYS)


class Arrays:
    """Three arrays of N floats on the device, and page-locked memory of that size."""

    def __init__(self, device):
        self.stream, self.locked = device.stream(), device.host(4 * N)
        self.host, self.x, self.y, self.z = self.locked.array.view(np.float32), *(device.allocate(4 * N) for _ in range(3))

    def get(self, address):
        array = np.empty(N, np.float32)
        self.stream.download(array, address)
        return array


@pytest.fixture
def arrays(device):
    arrays = Arrays(device)
    yield arrays
    for address in (arrays.x, arrays.y, arrays.z):
        device.free(address)
    device.free_host(arrays.locked)


def test_copies_in_order(device, toys, arrays):
    values, stream = np.random.default_rng(1).standard_normal(N, np.float32), arrays.stream
    begin, end = (device.event(timed=True) for _ in range(2))
    arrays.host[:] = values
    stream.record(begin)
    stream.upload(arrays.x, arrays.host)
    stream.copy(arrays.y, arrays.x, 4 * N)
    stream.fill(arrays.x, 0, 4 * N)
    stream.launch(toys.kernel("add"), (1,), (256,), (arrays.z, arrays.y, 0.5, N))
    stream.download(arrays.host, arrays.z)
    stream.record(end)
    end.synchronize()
    assert end.query() and 0 < end.elapsed(begin) < 1
    np.testing.assert_array_equal(arrays.host, values + np.float32(0.5))
    assert not arrays.get(arrays.x).any()


def test_more_shared_memory_than_a_block_has_without_asking(toys, arrays):
    values = np.random.default_rng(2).standard_normal(N, np.float32)
    arrays.stream.upload(arrays.x, values)
    for _ in range(2):
        arrays.stream.launch(toys.kernel("turn"), (1,), (256,), (arrays.y, arrays.x, N), shared=4 * N + 4096)
        np.testing.assert_array_equal(arrays.get(arrays.y), values[::-1])


def test_a_graph_of_two_streams(device, toys, arrays):
    stream, other, add = arrays.stream, device.stream(), toys.kernel("add")
    fork, join = device.event(), device.event()
    with stream.capture() as graph:
        stream.upload(arrays.x, arrays.host)
        stream.record(fork)
        other.wait(fork)
        other.launch(add, (1,), (256,), (arrays.y, arrays.x, 1.0, N))
        stream.launch(add, (1,), (256,), (arrays.z, arrays.x, 2.0, N))
        other.record(join)
        stream.wait(join)
        stream.launch(add, (1,), (256,), (arrays.y, arrays.y, 10.0, N))
    for value in (3, 4, 5):
        arrays.host[:] = value
        stream.replay(graph)
        assert (arrays.get(arrays.y) == value + 11).all() and (arrays.get(arrays.z) == value + 2).all()


def test_a_capture_that_is_broken_off_leaves_a_stream_that_works(arrays, toys):
    stream, values = arrays.stream, np.ones(N, np.float32)
    for error in (KeyboardInterrupt, DeviceError):
        with pytest.raises(error), stream.capture():
            stream.launch(toys.kernel("add"), (1,), (256,), (arrays.y, arrays.x, 1.0, N))
            if error is KeyboardInterrupt:
                raise KeyboardInterrupt
            stream.upload(arrays.x, values)  # not page-locked
        stream.upload(arrays.x, values)
        stream.launch(toys.kernel("add"), (1,), (256,), (arrays.y, arrays.x, 1.0, N))
        assert (arrays.get(arrays.y) == 2).all()


def test_too_much_memory_is_one_line_and_costs_nothing(device, arrays):
    free, total = device.memory()
    assert 0 < free <= total
    with pytest.raises(OutOfMemory, match=rf"^{2 * total:,} bytes of .* memory asked for") as error:
        device.allocate(2 * total)
    assert "\n" not in str(error.value)
    arrays.stream.upload(arrays.x, np.full(N, 7, np.float32))
    assert (arrays.get(arrays.x) == 7).all()


def test_what_does_not_compile_is_one_line(device):
    with pytest.raises(DeviceError, match="error") as error:
        device.load('extern "C" __global__ void broken() { no such thing; }')
    assert "\n" not in str(error.value)
    with pytest.raises(DeviceError, match="kernel absent"):
        device.load(source("kernels/common.cuh") + TOYS).kernel("absent")


def alone(code: str) -> str:
    """What a process of its own prints, which must live: it may lose its device."""
    root = Path(__file__).parents[1]
    if STAND_IN:
        code = f"from rgpu import backend\nfrom tests.test_gpu import stand_in\nbackend._cuda = stand_in\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fault_in_a_kernel_is_one_line_and_the_process_lives():
    """A wild store between two steps: it is reported by the next thing that waits, and from then on by everything."""
    said = alone("""if True:
        from rgpu import Engine
        from rgpu.engine import builtin_model
        from rgpu.errors import DeviceError
        from rgpu.ops.cuda_source import source
        from tests.test_gpu import TOYS
        with Engine.open(builtin_model(), device="cuda", n_ctx=64) as engine:
            session, ops = engine.session(), engine.executor.ops
            for token in (1, 2, 3):
                session.forward([token])
            kernel = ops.device.load(source("kernels/common.cuh") + TOYS).kernel("fault")
            ops.stream.launch(kernel, (1,), (1,), (64,))
            for use in (lambda: session.forward([4]), lambda: session.forward([5]), engine.session):
                try:
                    use()
                except DeviceError as error:
                    print("DeviceError:", error)
        print("alive")
    """)
    lines = said.splitlines()
    assert len(lines) == 4 and lines[-1] == "alive" and all(line.startswith("DeviceError: ") for line in lines[:-1]), said


# ---- real shapes: the CPU's kernels are the oracle ----

PROMPT, STEPS, REPEATS = (20, 4, 1) if STAND_IN else (512, 10, 3)
SHAPES = dict(n_tokens=600, n_expert=64, n_expert_used=8, n_embd=2048, n_ff_exp=512, recurrent=128, n_embd_head=256)
MATRICES = ((1024, 2048), (512, 4096), (512, 2048)) if STAND_IN else ((8192, 2048), (2048, 4096), (512, 2048))
REAL = ("Q4_K", "Q6_K", "Q8_0", "F16")
CONTEXT = 2048 if STAND_IN else 32768


@pytest.fixture(scope="module")
def backends(device):
    """CUDA and the CPU."""
    types = frozenset(REAL)
    both = CudaOps(device), CpuOps()
    for ops in both:
        for kv in ("F16", "Q8_0"):
            ops.prepare(Needs(matrices=types, embeddings=frozenset(), experts=types, kv=kv, **SHAPES), None)
    return both


def put(ops, array):
    return ops.upload(array.copy())


def apart(got, wanted) -> float:
    """The root of the mean square of the difference, in deviations of what is wanted."""
    assert not np.isnan(got).any(), "not all of the output was written"
    return float(np.sqrt(np.mean((got - wanted) ** 2)) / wanted.std())


@pytest.mark.parametrize("n", [1, 8, PROMPT])
@pytest.mark.parametrize("quant", REAL)
def test_matmul_of_real_shapes(backends, quant, n):
    rng = np.random.default_rng(n)
    for rows, columns in MATRICES:
        data, x = stored(rng, quant, rows, columns, columns**-0.5), rng.standard_normal((n, columns), np.float32)
        outs = []
        for ops in backends:
            out = put(ops, poisoned(n, rows))
            ops.matmul(out, Weight(TYPES[quant], (rows, columns), put(ops, data)), put(ops, x))
            outs.append(ops.to_host(out))
        close(*outs, scale=4)


@pytest.mark.parametrize("n", [1, PROMPT])
@pytest.mark.parametrize("gate, down", [("Q4_K", "Q6_K"), ("Q8_0", "Q8_0"), ("F16", "F16")])
def test_expert_ffn_of_real_shapes(backends, gate, down, n):
    rng, n_expert, k = np.random.default_rng(n), SHAPES["n_expert"], SHAPES["n_expert_used"]
    shapes = [(gate, 512, 2048), (gate, 512, 2048), (down, 2048, 512)]
    stores = [stored(rng, quant, n_expert * rows, columns, columns**-0.5) for quant, rows, columns in shapes]
    ids = np.stack([rng.permutation(n_expert)[:k] for _ in range(n)]).astype(np.int32)
    inputs = rng.standard_normal((n, 2048), np.float32), rng.permutation(n_expert).astype(np.int32), ids
    start, weights = rng.standard_normal((n, 2048), np.float32), rng.random((n, k), np.float32)
    outs = []
    for ops in backends:
        slots = []
        for (quant, rows, columns), data in zip(shapes, stores, strict=True):
            offset = np.arange(n_expert) * (len(data) // n_expert)
            slots.append(Slots(TYPES[quant], (rows, columns), (put(ops, data),), np.zeros(n_expert, np.int64), offset))
        out = put(ops, start)
        x, table, chosen = (put(ops, array) for array in inputs)
        ops.expert_ffn(out, x, Bank(*slots), table, chosen, put(ops, weights))
        outs.append(ops.to_host(out))
    # As in test_cuda_ops.py: h is rounded to another int8 now and then.
    assert apart(*outs) < 1e-3


@pytest.mark.parametrize("n", [1, PROMPT])
@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
def test_attention_over_a_long_context(backends, kv, n):
    """A weight and a value are rounded to float16 for prompts, a score by 2e-4: of those, 8 times what is to be expected."""
    quant, rng = TYPES[kv], np.random.default_rng(n)
    data = [stored(rng, kv, CONTEXT * 2, 256, 1.0).reshape(CONTEXT, 2, -1) for _ in range(2)]
    q = rng.standard_normal((n, 16, 256), np.float32)
    for past in (CONTEXT - n, CONTEXT // 7):
        outs = []
        for ops in backends:
            out = put(ops, poisoned(n, 16, 256))
            cache = KVCache(quant, *(put(ops, part) for part in data))
            ops.attention(out, put(ops, q), cache, put(ops, np.array([past], np.int32)), 1 / 16)
            outs.append(ops.to_host(out))
        assert apart(*outs) < (2e-5 if n == 1 else 2e-3)


@pytest.mark.parametrize("n", [1, PROMPT])
def test_recurrence_of_real_shapes(backends, n):
    rng, channels = np.random.default_rng(n), 2 * 16 * 128 + 32 * 128
    x, weight = rng.standard_normal((n, channels), np.float32), rng.standard_normal((channels, 4), np.float32)
    alpha, beta = (rng.standard_normal((n, 32), np.float32) for _ in range(2))
    a, bias = -np.exp(rng.standard_normal(32)).astype(np.float32), rng.standard_normal(32).astype(np.float32)
    tail, state = rng.standard_normal((3, channels), np.float32), rng.standard_normal((32, 128, 128), np.float32)
    outs = []
    for ops in backends:
        qkv, out = put(ops, poisoned(n, channels)), put(ops, poisoned(n, 32, 128))
        mine = put(ops, tail), put(ops, state)
        ops.short_conv(qkv, put(ops, x), put(ops, weight), mine[0])
        ops.delta_rule(out, qkv, *(put(ops, array) for array in (alpha, beta, a, bias)), mine[1])
        outs.append([ops.to_host(array) for array in (qkv, out, *mine)])
    for got, wanted in zip(*outs, strict=True):
        assert apart(got, wanted) < 1e-5


# ---- whole models ----


def test_auto_takes_the_gpu_and_says_so():
    with Engine.open(builtin_model()) as engine:
        assert engine.device == "cuda" and any(DEVICE.name in line for line in engine.plan)


def test_the_command_answers():
    said = alone("""if True:
        from rgpu.chat import main
        main(["--device", "cuda", "-p", "What is the capital of France?", "--no-think", "--temp", "0", "-n", "32", "--json"])
    """)
    *answer, statistics = said.splitlines()
    assert "Paris" in " ".join(answer) and json.loads(statistics)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Four layers of the real width with a few experts: 0.3 GB."""
    path = tmp_path_factory.mktemp("gpu") / "wide.gguf"
    shapes.main([str(path), "--layers", "4", "--experts", "32", "--vocab", "8192"])
    return path


def test_a_model_of_the_real_width(wide):
    """CUDA = CPU over a prompt of several chunks and steps behind it; and the same bytes whenever it is done again."""
    tokens, found = prompt(2 * PROMPT + 5, 8000), []
    for device in ("cuda", "cpu"):
        with Engine(EngineConfig(wide, device=device, n_ctx=2048, n_batch=PROMPT)) as engine:

            def followed(engine=engine):
                session = engine.session()
                return np.stack([session.forward(tokens), *(session.forward([token]) for token in range(10, 10 + STEPS))])

            found.append(followed())
            for _ in range(REPEATS if device == "cuda" else 0):
                np.testing.assert_array_equal(followed(), found[-1])
    assert apart(*found) < 0.05  # int8 here and there, as in test_cuda_engine.py
    assert (found[0].argmax(1) == found[1].argmax(1)).mean() > 0.7


def test_a_long_answer_of_sampled_tokens(wide):
    """Steps follow each other without the host's logits; each seed gives one text."""
    with Engine(EngineConfig(wide, device="cuda", n_ctx=1024)) as engine:
        params = SamplingParams(max_tokens=6 * STEPS if STAND_IN else 200, seed=5, temperature=1.0)

        def answered():
            return [piece.token for piece in engine.session().generate(prompt(PROMPT, 8000), params)]

        first, again = answered(), [answered() for _ in range(REPEATS)]
        assert all(answer == first for answer in again) and len(first) > 2 * STEPS
