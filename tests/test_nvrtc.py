"""Every kernel is compiled for every architecture: a step's don't spill, warps enough fit, the instructions are the right ones.

Every type, too; but only three architectures get heads of all sizes and experts whose gate and up are of two types, which are a
third of the time. `python -m bench.nvrtc` compiles everything for all.
"""

import csv
import functools
import json
import re
import sys

import pytest

if sys.platform == "darwin":
    pytest.skip("there is no NVRTC for macOS", allow_module_level=True)

from bench import nvrtc as bench
from rgpu.engine import KV_TYPES
from rgpu.ops.cuda_source import SOURCES, source
from rgpu.quants import TYPES
from tests import nvrtc

ALL_TEXTS = (75, 89, 120)  # sm_61 would take a minute for heads of 256: its tensor cores are emulated
USUAL_HEAD = "128"

# Kernels that no step of one token launches; all others are held to the rules of a step.
SEVERAL = {"matmul_few", "matmul_many", "product_many", "attention_many", "group_by_expert", "swiglu_many", "combine"}
SPILLED = 32  # bytes at most, stores and loads, of those from sm_75 on: a few values around a loop of thousands of operations

# Warps that a multiprocessor must have room for in its registers: a memory's latency is hidden by bytes under way, and each warp
# has its own. Products bring some KB each (kernels/matvec.cuh); attention's warp keeps 8 queries and as many columns at work, and
# its grid is two blocks of 4 warps a multiprocessor; the state is a delta_rule's registers. The rest waits for single numbers.
WARPS = {
    "matmul_one": 24, "matmul_few": 16, "gate_up": 16, "down": 16, "attention": 8, "delta_rule": 16,
    "matmul_many": 16, "product_many": 16, "attention_many": 8,
}  # fmt: skip
WARPS_OF_ROWS = 40
REGISTERS = 65536  # of a multiprocessor, and of a block; a warp gets them by 8 a lane


@functools.cache
def built(architecture: int) -> list[tuple[str, str, nvrtc.Kernel]]:
    """(text, kernel's name, kernel) of all that is compiled here."""

    def wanted(text: str) -> bool:
        defines = dict(re.findall(r"(\w+)=(\w+)", text))
        usual = defines.get("HEAD", USUAL_HEAD) == USUAL_HEAD and defines.get("GATE") == defines.get("UP")
        return usual or architecture in ALL_TEXTS

    results = nvrtc.compile_all({name: text for name, text in nvrtc.texts().items() if wanted(name)}, architecture)
    return [(text, name, kernel) for text, kernels in results.items() for name, kernel in kernels.items()]


def types_of(text: str) -> set[str]:
    return {value for value in re.findall(r"=(\w+)", text) if value in TYPES}


def every(architecture: int, *names: str, blocks: bool | None = None):
    """(label, kernel) of those names, if asked for of types with or without blocks only."""
    for text, name, kernel in built(architecture):
        if name in names and (blocks is None or all((TYPES[quant].block > 1) == blocks for quant in types_of(text))):
            yield f"{text}: {name}", kernel


def spilt(kernels: list[tuple[str, str, nvrtc.Kernel]]) -> dict[str, tuple[int, int]]:
    """A step's kernels that keep values in memory: (bytes spilled, bytes of the stack)."""
    found = {f"{text}: {name}": (k.spills, k.stack) for text, name, k in kernels if name not in SEVERAL}
    return {label: figures for label, figures in found.items() if any(figures)}


def wide(kernel: nvrtc.Kernel, load: str) -> int:
    """Loads of 16 bytes; PTX does not say "global" where the address comes from a table, as an expert's does."""
    return kernel.count("ld.global", load) + kernel.count(f"ld{load}")


def per_lane(registers: int) -> int:
    return -(-registers // 8) * 8


architectures = pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)


@architectures
def test_every_kernel_compiles(architecture):
    """Of every file, and of every type where there are types."""
    types: dict[str, set] = {}
    for text, name, _ in built(architecture):
        types.setdefault(name, set()).update(types_of(text))
    declared = r"__global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)\("
    entries = {name for path in SOURCES.glob("kernels/*.cu") for name in re.findall(declared, source(f"kernels/{path.name}"))}
    assert types.keys() == entries and SEVERAL | WARPS.keys() <= entries
    for name in ("matmul_one", "matmul_few", "matmul_many", "gate_up", "down", "product_many", "embed"):
        assert types[name] == {*TYPES}, name
    for name in ("store_kv", "attention", "attention_many", "attention_combine"):
        assert types[name] == {kv.upper() for kv in KV_TYPES}, name


@architectures
def test_a_step_keeps_its_values_in_registers(architecture):
    assert not spilt(built(architecture))


@architectures
def test_more_tokens_spill_little(architecture):
    """Below sm_75 tensor cores are emulated, and the wide heads' prefill spills for it."""
    most = SPILLED if architecture >= 75 else 1000
    assert not {label: kernel.spills for label, kernel in every(architecture, *SEVERAL) if kernel.spills > most}


@architectures
def test_blocks_fit(architecture):
    """A block's registers are there, and its memory: more than 48 KB of it is never static."""
    for text, name, kernel in built(architecture):
        assert per_lane(kernel.registers) * kernel.threads <= REGISTERS, f"{text}: {name} needs {kernel.registers} registers"
        assert kernel.shared <= 48 << 10, f"{text}: {name}"


@architectures
def test_warps_enough(architecture):
    few = {}
    for text, name, kernel in built(architecture):
        warps = REGISTERS // (32 * per_lane(kernel.registers))
        if warps < WARPS.get(name, WARPS_OF_ROWS):
            few[f"{text}: {name}"] = warps, kernel.registers
    assert not few


@architectures
def test_products_of_int8(architecture):
    """A lane multiplies 32 weights of two rows at a time: 16 dp4a for each token and type. Float types have none."""
    for name, tokens in (("matmul_one", 1), ("matmul_few", 8), ("down", 1), ("gate_up", 1)):
        labelled = [*every(architecture, name, blocks=True)]
        assert labelled
        for label, kernel in labelled:
            assert kernel.count("dp4a.") >= 16 * tokens * len(types_of(label)), label
    for label, kernel in every(architecture, "matmul_one", "matmul_few", "down", "gate_up", blocks=False):
        loads = {".v4.f32" if TYPES[quant].nbytes == 4 else ".v4.u32" for quant in types_of(label)}
        assert kernel.count("dp4a.") == 0 and all(wide(kernel, load) for load in loads), label


@architectures
def test_copies(architecture):
    """Weights of few tokens come 16 bytes at a time: past the registers where a device can, else as the widest loads."""
    names = ("matmul_one", "matmul_few", "down", "gate_up", "matmul_many", "product_many")
    for label, kernel in every(architecture, *names, blocks=True):
        assert (kernel.count("cp.async.cg.shared.global") > 0) == (architecture >= 80), label
        assert architecture >= 80 or wide(kernel, ".v4.u32"), label


@architectures
def test_tensor_cores(architecture):
    """One mma for 32 columns and 8 tokens from sm_80 on, four of sm_75's; below, dp4a and float32."""
    integers, halves = {75: ("m8n8k16", "m16n8k8")}.get(architecture, ("m16n8k32", "m16n8k16"))
    for label, kernel in every(architecture, "matmul_many", "product_many", blocks=True):
        assert (kernel.count("mma.sync", integers, ".s8.s8") >= 8) == (architecture >= 75), label
        assert (kernel.count("ldmatrix") > 0) == (architecture >= 75), label
        assert architecture >= 75 or kernel.count("dp4a.") > 0, label
    for label, kernel in every(architecture, "attention_many"):
        assert (kernel.count("mma.sync", halves, ".f32.f16.f16.f32") > 0) == (architecture >= 75), label
        assert (kernel.count("ldmatrix") > 0) == (architecture >= 75), label
        assert architecture >= 75 or kernel.count("fma") > 0, label


# ---- whether the figures are read aright ----

SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(float* x, int n) {
    __shared__ float kept[300];
    float held[100];
#pragma unroll
    for (int i = 0; i < 100; i++) held[i] = x[i * n];
    __syncthreads();
    kept[threadIdx.x % 300] = x[0];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 100; i++) x[i * n + 1] = held[i] * held[99 - i] + kept[i];
}
extern "C" __global__ void indexed(int* x, int n) {
    int held[64];
    for (int i = 0; i < 64; i++) held[i] = x[i];
    for (int i = 0; i < n; i++) held[x[i] & 63] = __dp4a(x[i], n, held[i & 63]);
    for (int i = 0; i < 64; i++) x[i] = held[i];
}
"""


@pytest.fixture
def cold(fresh_cache):
    """Nothing is compiled yet."""


def test_what_is_read(cold):
    kernels = nvrtc.compile(SPILLING, 89)
    spilling, indexed = kernels["spilling"], kernels["indexed"]
    assert (spilling.threads, spilling.registers, spilling.shared) == (1024, 64, 1200)
    assert spilling.spills >= 2 * 4 * (100 - 64) and spilling.stack > 0  # what has no place is stored and loaded
    assert indexed.threads == nvrtc.MOST_THREADS and indexed.shared == indexed.spills == 0
    assert indexed.stack == 256  # 64 numbers that a lane picks at run time
    assert indexed.count("dp4a.") > 0 == spilling.count("dp4a.") and spilling.count("bar", ".sync") >= 2


def test_spills_are_found(cold):
    """The rule for a step's kernels, on kernels that break it."""
    planted = [("planted", name, kernel) for name, kernel in nvrtc.compile(SPILLING, 120).items()]
    assert spilt(planted).keys() == {"planted: spilling", "planted: indexed"}
    assert not spilt([("planted", "matmul_many", kernel) for _, _, kernel in planted])  # which others than a step launch


def test_complaints_name_the_text(cold):
    def changed(old: str, new: str) -> str:
        assert old in SPILLING
        return SPILLING.replace(old, new)

    texts = {
        "good": SPILLING,
        "bad": changed("kept[i]", "gone[i]"),
        "shifted": changed("x[0];", "x[1 << 40];"),
        "with one unused": changed("int held[64];", "int held[64], none;"),
    }
    with pytest.raises(nvrtc.NotCompiled) as caught:
        nvrtc.compile_all(texts, 75)
    complaint = str(caught.value)
    assert "bad: " in complaint and 'identifier "gone" is undefined' in complaint
    assert "shifted: " in complaint and "shift count is too large" in complaint
    assert "good" not in complaint and "unused" not in complaint and "ptxas" not in complaint


def test_the_cache(cold, monkeypatch):
    first = nvrtc.compile(SPILLING, 89)
    asked = []
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda *arguments: asked.append(arguments) or pytest.fail("compiled again"))
    assert nvrtc.compile(SPILLING, 89) == first and not asked
    for text, architecture in ((SPILLING + "\n", 89), (SPILLING, 86)):
        with pytest.raises(pytest.fail.Exception):
            nvrtc.compile(text, architecture)


def test_bench(tmp_path, capsys):
    """bench.nvrtc's table holds what is read here."""
    assert bench.main(["--sm", "89", "--results", str(tmp_path)]) == 0
    (summary,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = list(csv.DictReader((tmp_path / "nvrtc.csv").open()))
    kernels = built(89)
    assert summary["sm"] == 89 and summary["kernels"] == len(rows) == len(kernels)
    assert summary["registers"] == max(kernel.registers for _, _, kernel in kernels)
    found = {(row["op"], row["type"], row["head"], row["kernel"]): row for row in rows}
    assert len(found) == len(rows)
    label = "experts GATE=Q4_K UP=Q5_K"
    (kernel,) = (kernel for text, name, kernel in kernels if text == label)
    row = found["experts", "Q4_K+Q5_K", "", "gate_up"]
    figures = [int(row[key]) for key in ("sm", "registers", "shared", "cubin")]
    assert figures == [89, kernel.registers, kernel.shared, kernel.cubin]
    assert f"dp4a {kernel.count('dp4a')}" in row["instructions"].split("; ")
    assert "mma.m16n8k16 " in found["attention", "F16", "256", "attention_many"]["instructions"]
