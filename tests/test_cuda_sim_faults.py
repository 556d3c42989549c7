"""The CUDA stand-in catches faults of kernels and of calls, and names them; the process lives on.

At the end planted faults: a toy that is right, and what the stand-in makes of it when it is broken.
"""

import numpy as np
import pytest

from rgpu.errors import DeviceError, OutOfMemory
from tests.cuda_sim import SimDevice
from tests.cuda_sim.toys import Bench, text

POISON = 0x7FF7
BYTES = 4 * 100
SEEDS = range(8)


@pytest.fixture
def sim():
    device = SimDevice()
    yield Bench(device, text("toys.cu"))
    device.close()


@pytest.fixture
def faulty():
    device = SimDevice(patience=0.3)
    yield Bench(device, text("faulty.cu"))
    device.close()


# ---- kernels ----


@pytest.mark.parametrize(
    "kernel, arguments, block, said",
    [
        ("read", ("out", "in", 100), 1, "0 bytes behind the 400 bytes of device memory"),
        ("read", ("out", "in", 200_000), 1, "bytes before|bytes behind"),
        ("read", ("out", 0, 1), 1, "access to memory nobody owns: 0x4, no memory of the device"),
        ("write", ("out", 103), 1, "12 bytes behind the 400 bytes"),
        ("write", ("out", -2000), 1, "bytes before the 400 bytes"),
        ("misaligned", ("out", "in"), 1, "misaligned access to 'const int', line 6: it needs 4 bytes"),
        ("outside_array", ("out", 8), 1, r"index 8 of 'float \[8\]', line 9"),
        ("outside_dynamic", ("out", 8), 1, "access to memory nobody owns"),
        ("divide", ("out", 1, 0), 1, "division by zero"),
        ("trap", (), 32, r"thread \(3, 0, 0\): __trap \(line 18\)"),
        ("deep", ("out", 20000), 1, "more than 61440 bytes of local memory"),
        ("lonely_lane", ("out",), 32, r"deadlock: 1 threads wait at __syncthreads \(line 25\), 31 at a warp operation"),
        ("two_barriers", (), 32, r"different __syncthreads: lines (30 and 32|32 and 30)"),
        ("two_operations", ("out",), 32, r"different warp operations: lines (35 and 36|36 and 35)"),
        ("two_masks", ("out",), 32, "lanes wait for each other with different masks"),
        ("not_in_mask", ("out",), 2, "a lane is not in the mask of its own warp operation"),
        ("endless", ("out",), 1, "did not end within 0.3 s"),
        ("never", ("in",), 1, "what it waits for did not come within 0.3 s"),
    ],
)
def test_a_fault_is_named_and_the_process_lives(faulty, kernel, arguments, block, said):
    named = {"out": faulty.device.allocate(BYTES), "in": faulty.put(np.zeros(100, np.float32))}
    faulty.launch(kernel, 1, block, *[named.get(a, a) for a in arguments], shared=32)
    with pytest.raises(DeviceError, match=rf"kernel {kernel}, block \(0, 0, 0\), .*({said})") as first:
        faulty.stream.synchronize()
    assert "\n" not in str(first.value)
    with pytest.raises(DeviceError, match=said):  # the device is lost
        faulty.stream.fill(named["out"], 0, BYTES)
    faulty.device.free(named["out"])
    after = Bench(SimDevice(), text("toys.cu"))
    assert np.array_equal(after.run("early_exit", (3, np.int32), 3), [3, 3, 3])


def test_memory_that_was_freed(faulty):
    x, out = faulty.put(np.ones(100, np.float32)), faulty.device.allocate(4)
    faulty.device.free(x)
    with pytest.raises(DeviceError, match="which was freed: not for kernels"):
        faulty.launch("read", 1, 1, out, x, 0)
    with pytest.raises(DeviceError, match="nothing was allocated"):
        faulty.device.free(x)


@pytest.mark.parametrize("at, where", [(-1, "before"), (101, "behind")])
def test_what_was_written_beside_an_allocation_shows_when_it_is_freed(faulty, at, where):
    out = faulty.device.allocate(101)  # the bytes from there to the next 16 are not guarded
    faulty.launch("write_byte", 1, 1, out, at)
    with pytest.raises(DeviceError, match=f"something was written {where} the 101 bytes"):
        faulty.device.free(out)


def test_fresh_memory_is_poison(faulty):
    wanted = np.full(50, POISON, np.uint16)
    assert np.isnan(wanted.view(np.float16)).all() and np.isnan(wanted.view(np.float32)).all()
    assert np.array_equal(faulty.device.host(100).array.view(np.uint16), wanted)
    assert np.array_equal(faulty.get(faulty.device.allocate(100), 50, np.uint16), wanted)
    for _ in range(2):  # what the first run left in shared memory is gone
        got = faulty.run("unwritten", ((3, 32, 2), np.uint16), grid=(2,), shared=128)
        assert np.array_equal(got, np.full((3, 32, 2), POISON))


def test_memory_is_limited():
    device = SimDevice(total=10_000, pinned=5_000, mapped=False)
    first = device.allocate(6_000)
    assert device.memory() == (4_000, 10_000)
    with pytest.raises(OutOfMemory, match=r"4,001 bytes of device memory asked for, 4,000 of 10,000 are free"):
        device.allocate(4_001)
    device.free(first)
    device.allocate(10_000)
    locked = device.host(5_000)
    with pytest.raises(OutOfMemory):
        device.host(1)
    device.free_host(locked)
    with pytest.raises(DeviceError, match="mapped memory is refused"):
        device.host(1, mapped=True)
    device.close()
    with pytest.raises(DeviceError, match="closed"):
        device.allocate(1)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "has 2 parameters, 0 arguments were given"),
        (("out", 2**31), "too large for a parameter of type int32"),
        (("out", 1.5), "does not fit a parameter of type int32"),
        (("out", np.int64(1)), "is not of the parameter's type, int32"),
        ((12345, 1), "no memory of the device: not for kernels"),
        (("host", 1), "host memory at .*: not for kernels"),
    ],
)
def test_arguments_are_checked(faulty, arguments, said):
    named = {"out": faulty.device.allocate(BYTES), "host": faulty.device.host(64).array.ctypes.data}
    with pytest.raises(DeviceError, match=said):
        faulty.launch("outside_array", 1, 1, *[named.get(a, a) for a in arguments])


@pytest.mark.parametrize(
    "name, grid, block, shared, said",
    [
        ("bounded", (1,), (65,), 0, "65 threads in a block, 64 at most"),
        ("trap", (0,), (1,), 0, r"no grid of \(0,\)"),
        ("trap", (1, 70_000), (1,), 0, "no grid of"),
        ("trap", (1,), (32, 64), 0, "2048 threads"),
        ("trap", (1,), (1,), 1 << 20, "1,048,576 bytes of shared memory"),
        ("nowhere", (1,), (1,), 0, "no kernel nowhere"),
    ],
)
def test_launches_are_checked(faulty, name, grid, block, shared, said):
    with pytest.raises(DeviceError, match=said):
        faulty.stream.launch(faulty.module.kernel(name), grid, block, (), shared)


def test_ranges_are_checked(sim):
    address, array = sim.device.allocate(100), np.zeros(101, np.uint8)
    mapped = sim.device.host(200, mapped=True).address
    for call in (
        lambda: sim.stream.upload(address, array),
        lambda: sim.stream.download(array, address),
        lambda: sim.stream.fill(address + 1, 0, 100),
        lambda: sim.stream.copy(address, address + 8, 16),
        lambda: sim.stream.upload(mapped, array),
    ):
        with pytest.raises(DeviceError):
            call()


def test_text_that_does_not_compile(sim):
    with pytest.raises(DeviceError, match="broken.cu:2:.*error"):
        sim.device.load('#line 1 "broken.cu"\nextern "C" __global__ void k(float* x) {\n*x = y; }')


def test_bytes_are_counted():
    sim = Bench(SimDevice(counting=True), text("toys.cu"))
    sim.run("add", (1000, np.float32), np.zeros(1000, np.float32), 1.0, 1000, grid=(8,), block=(128,))
    sim.run("pipeline", ((5, 64, 4), np.uint32), np.zeros((5, 64, 4), np.uint32), 5, block=(64,))
    assert sim.device.traffic == {"add": (4000, 4000), "pipeline": (5120, 5120)}
    assert sim.device.counted["launches"] == 2 and sim.device.counted["download"] == 9120
    sim.device.close()


def test_a_failure_on_request(sim):
    x = sim.put(np.zeros(100, np.float32))
    sim.device.fail_at = 3
    for _ in range(3):
        sim.launch("add", 1, 128, x, x, 1.0, 100)
    with pytest.raises(DeviceError, match="kernel add.*failed as asked for"):
        sim.stream.synchronize()


# ---- planted ----

REVERSE = """
extern "C" __global__ void reverse(int* out, const int* in) {
    __shared__ int tile[64];
    tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[63 - threadIdx.x];
}
extern "C" __global__ void row_sums(float* out, const float* in, int rows, int columns) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float sum = 0;
    for (int i = 0; i < columns; i++) sum += in[row * columns + i];
    out[row] = sum;
}
"""


def reverses(source, seed):
    sim = Bench(SimDevice(seed=seed), source)
    return np.array_equal(sim.run("reverse", (64, np.int32), np.arange(64, dtype=np.int32), block=(64,)), np.arange(64)[::-1])


def test_planted_a_missing_barrier():
    assert all(reverses(REVERSE, seed) for seed in SEEDS)
    assert not any(reverses(REVERSE.replace("__syncthreads();", ""), seed) for seed in SEEDS)


def test_planted_a_read_past_a_row(sim):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    right = Bench(sim.device, REVERSE)
    assert np.array_equal(right.run("row_sums", (3, np.float32), x, 3, 4), x.sum(1))
    broken = Bench(sim.device, REVERSE.replace("i < columns", "i <= columns"))
    with pytest.raises(DeviceError, match=r"row_sums, block \(0, 0, 0\), thread \(2, 0, 0\): .* 0 bytes behind the 48 bytes"):
        broken.run("row_sums", (3, np.float32), x, 3, 4)
