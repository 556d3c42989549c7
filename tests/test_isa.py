"""Instruction sets: those this machine has are run against plain arithmetic, the others compiled and their assembly read."""

import ctypes
import os
import re
import subprocess
import sys

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba import njit

from rgpu import quants
from rgpu.quants import isa, vectors

TRIPLES = {"": "x86_64-unknown-linux-gnu", "x86": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
# What the assembly of 16 lanes must have, for bytes up to 127 and up to 255.
INSTRUCTIONS = {
    "AVX512_VNNI": ({r"vpdpbusd.*%zmm": 1}, {r"vpdpbusd.*%zmm": 1}),
    "AVX_VNNI": ({r"vpdpbusd.*%ymm": 2}, {r"vpdpbusd.*%ymm": 2}),
    "AVX2": ({r"vpmaddubsw.*%ymm": 2, r"vpmaddwd.*%ymm": 2}, {r"vpmaddubsw.*%ymm": 4, r"vpmaddwd.*%ymm": 4}),
    "NEON_I8MM": ({r"\tusdot\t": 4}, {r"\tusdot\t": 4}),
    "NEON_DOT": ({r"\tsdot\t": 4}, {r"\tsdot\t": 8}),
    "Plain": ({}, {}),
}
NARROW, WIDE = quants.TYPES["Q4_K"], quants.TYPES["Q8_0"]

every_set = pytest.mark.parametrize("set_", isa.SETS, ids=lambda set_: type(set_).__name__)
both_widths = pytest.mark.parametrize("quant", [NARROW, WIDE], ids=["narrow", "wide"])


@njit(cache=True)
def add_8(set_, quant, acc, a, b):
    result = isa.multiply_add(set_, quant, vectors.load(acc, 0, 8), vectors.load(a, 0, 32), vectors.load(b, 0, 32))
    vectors.store(acc, 0, result)


@njit(cache=True)
def add_16(set_, quant, acc, a, b):
    result = isa.multiply_add(set_, quant, vectors.load(acc, 0, 16), vectors.load(a, 0, 64), vectors.load(b, 0, 64))
    vectors.store(acc, 0, result)


@njit(cache=True)
def add_32(set_, quant, acc, a, b):
    result = isa.multiply_add(set_, quant, vectors.load(acc, 0, 32), vectors.load(a, 0, 128), vectors.load(b, 0, 128))
    vectors.store(acc, 0, result)


def inputs(lanes, top):
    """Tuples (acc, a, b): random bytes, and all pairs of extreme ones, where sums of two or four products are largest."""
    rng = np.random.default_rng(lanes + top)
    for _ in range(200):
        a = rng.integers(0, top + 1, 4 * lanes, np.uint8)
        yield rng.integers(-(2**30), 2**30, lanes, np.int32), a, rng.integers(-128, 128, 4 * lanes, np.int8)
    for extreme in (0, top - 1, top, top // 2 + 1):
        for factor in (-128, -127, 0, 127):
            yield np.full(lanes, 7, np.int32), np.full(4 * lanes, extreme, np.uint8), np.full(4 * lanes, factor, np.int8)


def expected(acc, a, b):
    return acc + (a.astype(np.int32) * b).reshape(-1, 4).sum(axis=1, dtype=np.int32)


@both_widths
@pytest.mark.parametrize("set_", isa.supported(), ids=lambda set_: type(set_).__name__)
@pytest.mark.parametrize("add", [add_8, add_16, add_32], ids=["8", "16", "32"])
def test_sums_are_exact(add, set_, quant):
    for acc, a, b in inputs(int(add.__name__[4:]), 127 if quant is NARROW else 255):
        out = acc.copy()
        add(set_, quant, out, a, b)
        assert np.array_equal(out, expected(acc, a, b)), (a, b)


def module_of(set_, quant, lanes):
    """IR of void f(acc*, a*, b*), acc = multiply_add(acc, a, b)."""
    module = ir.Module()
    kinds = [ir.VectorType(ir.IntType(32), lanes), *[ir.VectorType(ir.IntType(8), 4 * lanes)] * 2]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [kind.as_pointer() for kind in kinds]), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    result = isa.emit_multiply_add(builder, type(set_), quant.top, *(builder.load(arg, align=1) for arg in function.args))
    builder.store(result, function.args[0], align=1)
    builder.ret_void()
    return module


def target(triple):
    """LLVM's target, or skip: llvmlite may be built for its own processor only."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        return llvm.Target.from_triple(triple)
    except RuntimeError as error:
        pytest.skip(f"llvmlite can't compile for {triple}: {error}")


def assembly(module, triple, features):
    machine = target(triple).create_target_machine(features=",".join(f"+{feature}" for feature in features), opt=2)
    module.triple = triple
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return machine.emit_assembly(parsed)


@every_set
@both_widths
def test_the_instruction_is_emitted(set_, quant):
    text = assembly(module_of(set_, quant, 16), TRIPLES[set_.arch], set_.features)
    wanted = INSTRUCTIONS[type(set_).__name__][quant is WIDE]
    assert {pattern: len(re.findall(pattern, text)) for pattern in wanted} == wanted, text


SDOT = """
define internal <4 x i32> @sdot(<4 x i32> %acc, <16 x i8> %a, <16 x i8> %b) {{
  %wide_a = {extend} <16 x i8> %a to <16 x i32>
  %wide_b = sext <16 x i8> %b to <16 x i32>
  %p = mul <16 x i32> %wide_a, %wide_b
  %p0 = shufflevector <16 x i32> %p, <16 x i32> undef, <4 x i32> <i32 0, i32 4, i32 8, i32 12>
  %p1 = shufflevector <16 x i32> %p, <16 x i32> undef, <4 x i32> <i32 1, i32 5, i32 9, i32 13>
  %p2 = shufflevector <16 x i32> %p, <16 x i32> undef, <4 x i32> <i32 2, i32 6, i32 10, i32 14>
  %p3 = shufflevector <16 x i32> %p, <16 x i32> undef, <4 x i32> <i32 3, i32 7, i32 11, i32 15>
  %s0 = add <4 x i32> %acc, %p0
  %s1 = add <4 x i32> %s0, %p1
  %s2 = add <4 x i32> %s1, %p2
  %s3 = add <4 x i32> %s2, %p3
  ret <4 x i32> %s3
}}
"""


@both_widths
@pytest.mark.parametrize("set_, extend", [(isa.NEON_DOT(), "sext"), (isa.NEON_I8MM(), "zext")], ids=["sdot", "usdot"])
def test_arithmetic_around_the_neon_instruction(set_, extend, quant):
    """Run here, with the instruction written out by its definition (Arm's manual: SDOT, USDOT)."""
    text = str(module_of(set_, quant, 8))
    text = re.sub(r"declare [^\n]*neon[^\n]*", SDOT.format(extend=extend), text)
    text = re.sub(r'@"?llvm\.aarch64\.neon\.u?sdot\.v4i32\.v16i8"?', "@sdot", text)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine)
    engine.finalize_object()
    add = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(engine.get_function_address("f"))
    for acc, a, b in inputs(8, 127 if quant is NARROW else 255):
        out = acc.copy()
        add(out.ctypes.data, a.ctypes.data, b.ctypes.data)
        assert np.array_equal(out, expected(acc, a, b)), (a, b)


LOOKUPS = [
    ("x86_64-unknown-linux-gnu", ("avx2",), r"vpshufb.*%ymm"),
    ("x86_64-unknown-linux-gnu", ("ssse3",), r"pshufb.*%xmm"),
    ("aarch64-unknown-linux-gnu", (), r"\ttbl\t"),
]


@pytest.mark.parametrize("triple, features, instruction", LOOKUPS, ids=["avx2", "ssse3", "neon"])
def test_a_table_is_looked_up_by_one_shuffle(triple, features, instruction):
    module = ir.Module()
    kinds = [ir.VectorType(ir.IntType(8), count) for count in (32, 16, 32)]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [kind.as_pointer() for kind in kinds]), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    enabled = ",".join(f"+{feature}" for feature in [*features, *(["ssse3"] if "avx2" in features else [])])
    table, index = (builder.load(arg, align=1) for arg in function.args[1:])
    builder.store(vectors.emit_lookup(builder, triple, enabled, table, index), function.args[0], align=1)
    builder.ret_void()
    text = assembly(module, triple, features)
    assert len(re.findall(instruction, text)) == (1 if "avx2" in features else 2), text


def test_the_order_of_the_sets():
    assert type(isa.supported()[-1]) is isa.Plain
    assert isa.best() == isa.supported()[0]
    assert all(len(set_) == 0 for set_ in isa.SETS), "a tag carries no data"


WITHOUT = """
import numpy as np
from numba import njit
from rgpu.quants import TYPES, isa, vectors

@njit
def sums(set_, quant, acc, a, b, table):
    q = vectors.lookup(vectors.load(table, 0, 16), vectors.load(a, 0, 32))
    vectors.store(acc, 0, isa.multiply_add(set_, quant, vectors.load(acc, 0, 8), q, vectors.load(b, 0, 32)))

a, b, table = np.arange(32, dtype=np.uint8) % 16, np.arange(-16, 16, dtype=np.int8), np.arange(255, 239, -1, dtype=np.uint8)
acc = np.full(8, 9, np.int32)
sums(isa.best(), TYPES["Q8_0"], acc, a, b, table)
assert np.array_equal(acc, 9 + (table[a].astype(np.int32) * b).reshape(8, 4).sum(axis=1)), acc
print(type(isa.best()).__name__)
"""


@pytest.mark.skipif(isa.supported()[0].arch != "x86", reason="names features of x86")
@pytest.mark.parametrize("name, features, set_", [("generic", "", "Plain"), ("haswell", "+avx2,+ssse3", "AVX2")])
def test_numba_s_own_settings_choose(name, features, set_, tmp_path):
    """NUMBA_CPU_NAME and NUMBA_CPU_FEATURES decide what LLVM may emit, so they decide the set too."""
    if set_ == "AVX2" and isa.AVX2() not in isa.supported():
        pytest.skip("this processor has no AVX2")
    environment = os.environ | {"RGPU_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment, cwd=quants.PACKAGE.parent, capture_output=True, text=True
    )
    assert run.stdout.split() == [set_], run.stderr
