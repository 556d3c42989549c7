"""Every quantisation type against gguf-py: geometry, `dequantize`, and the Numba `dot`, `unpack` and `pack`.

The types are taken from the registry, so a new file in `rgpu/quants` is tested by existing (and by its row in SCALES).
"""

import os
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
from numba import njit

from rgpu import quants
from rgpu.quants import vectors
from rgpu.quants.blocks import FASTMATH, half, row

NAMES = [
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
]
# Byte positions of a block's float16 factors: of the quants, then of what is added to them.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (), "F32": (), "F16": (), "BF16": (),
}  # fmt: skip
# Positive, negative, the largest, the smallest normal and two subnormal float16 numbers (the last one the smallest).
SPECIAL = np.array([1, -0.37, 65504, -(2.0**-14), 3e-7, -(2.0**-24)], np.float16)
BYTES = [0x00, 0xFF, 0x80, 0x7F, 0x55, 0xAA, 0x0F, 0xF0]

every_type = pytest.mark.parametrize("name", list(quants.TYPES))
every_packed_type = pytest.mark.parametrize("name", [name for name, tag in quants.TYPES.items() if hasattr(tag, "pack")])


def oracle(name, blocks):
    """uint8 [n, nbytes] -> float32 [n, block], by gguf-py."""
    with np.errstate(over="ignore", invalid="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]).reshape(len(blocks), -1)


def put_scales(blocks, name, scales):
    """Write float16 `scales` [n] into every factor of the blocks; the added one gets another element for each block."""
    for shift, offset in enumerate(SCALES[name]):
        blocks[:, offset : offset + 2] = np.roll(scales, shift).view(np.uint8).reshape(-1, 2)
    return blocks


def realistic_blocks(name, n, rng):
    """uint8 [n, nbytes]: random quants under scales of the same order of magnitude, some negative or subnormal."""
    tag = quants.TYPES[name]
    if tag.block == 1:
        return gguf.quants.quantize(rng.standard_normal((n, 1), np.float32), gguf.GGMLQuantizationType[name]).view(np.uint8)
    blocks = rng.integers(0, 256, (n, tag.nbytes), dtype=np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(120, 130, n)
    order = rng.choice([1.0, 1e-6])  # around 1e-6 every float16 is subnormal
    return put_scales(blocks, name, (rng.standard_normal(n) * order).astype(np.float16))


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@njit(cache=True, nogil=True, fastmath=FASTMATH)
def dot_rows(quant, out, address, nbytes, x):
    for r in range(out.size):
        out[r] = quants.dot(quant, row(address + r * nbytes, nbytes), x, x.size)


# fastmath, as a kernel has it: `unpack` and `pack` must not inherit the licence to fuse.
@njit(cache=True, nogil=True, fastmath=FASTMATH)
def unpack_row(quant, address, nbytes, out, n):
    quants.unpack(quant, row(address, nbytes), out, n)


@njit(cache=True, nogil=True, fastmath=FASTMATH)
def pack_row(quant, x, address, nbytes):
    quants.pack(quant, x, row(address, nbytes), x.size)


def placed(rows, offset):
    """Copy uint8 `rows` `offset` bytes into a buffer of 0xFF (NaN as float16): returns it and the address of the copy."""
    buffer = np.full(rows.size + 512, 0xFF, np.uint8)
    start = -buffer.ctypes.data % 64 + offset
    buffer[start : start + rows.size] = rows.ravel()
    return buffer, buffer.ctypes.data + start


def lengths(tag):
    """Row lengths in weights: a few blocks, and around the 32 lanes for the types without blocks."""
    return [tag.block * k for k in (1, 2, 3, 8, 9)] + ([31, 32, 33, 64, 95] if tag.block == 1 else [])


def test_discovery_finds_each_type_once():
    assert sorted(quants.TYPES) == sorted(NAMES)
    assert [tag.id for tag in quants.TYPES.values()] == sorted({tag.id for tag in quants.TYPES.values()})
    for name, tag in quants.TYPES.items():
        assert type(tag).__name__ == name
        assert type(tag).__module__ == f"rgpu.quants.{name.lower()}"


@every_type
def test_geometry_equals_ggml(name):
    tag, ggml = quants.TYPES[name], gguf.GGMLQuantizationType[name]
    assert tag.id == ggml.value
    assert (tag.block, tag.nbytes) == gguf.GGML_QUANT_SIZES[ggml]
    assert len(tag) == 0, "a tag carries no data"


@every_type
def test_dequantize_random_bits(name):
    """Any bits at all, factors included: infinities are compared, NaN is left out."""
    tag = quants.TYPES[name]
    blocks = np.random.default_rng(1).integers(0, 256, (4000, tag.nbytes), dtype=np.uint8)
    blocks = blocks[~np.isnan(oracle(name, blocks)).any(axis=1)]
    assert len(blocks) > 3000
    with np.errstate(over="ignore"):
        assert same_bits(tag.dequantize(blocks), oracle(name, blocks))


@every_type
def test_dequantize_extreme_bytes_and_scales(name):
    tag = quants.TYPES[name]
    blocks = np.repeat(np.array(BYTES, np.uint8)[:, None, None], len(SPECIAL), axis=1)
    blocks = np.broadcast_to(blocks, (len(BYTES), len(SPECIAL), tag.nbytes)).reshape(-1, tag.nbytes).copy()
    put_scales(blocks, name, np.tile(SPECIAL, len(BYTES)))
    expected = oracle(name, blocks)
    number = ~np.isnan(expected).any(axis=1)  # 0xFFFF is a NaN of F16, 0xFF7F… of F32
    assert number.sum() >= len(blocks) - 2 * len(SPECIAL)
    blocks.flags.writeable = False  # a view of the mapped file is read-only
    with np.errstate(over="ignore", invalid="ignore"):
        assert same_bits(tag.dequantize(blocks)[number], expected[number])


@every_type
def test_unpack_equals_dequantize(name):
    tag, rng = quants.TYPES[name], np.random.default_rng(2)
    for n in lengths(tag):
        for offset in (0, 1, 3):
            blocks = rng.integers(0, 256, (n // tag.block, tag.nbytes), dtype=np.uint8)
            put_scales(blocks, name, rng.choice(SPECIAL, len(blocks)))
            expected = oracle(name, blocks).ravel()
            buffer, address = placed(blocks, offset)
            out = np.full(n + 40, -7.5, np.float32)
            unpack_row(tag, address, blocks.size, out[3:], n)
            number = ~np.isnan(expected)
            assert same_bits(out[3 : 3 + n][number], expected[number]), (n, offset)
            assert np.isnan(out[3 : 3 + n][~number]).all()
            assert (out[:3] == -7.5).all() and (out[3 + n :] == -7.5).all(), "wrote outside the row"


@every_type
def test_dot_equals_float64(name):
    """Against Σ in float64 of the dequantised weights.

    A weight is A + B (B: the added minimum, or 0). With u = 2^-24, to first order: forming A + B costs three roundings of at
    most u(|A| + |B|) each, in the kernel and in the oracle's float32; the product with x one; a sum of n terms, in whatever
    order, n - 1. Together at most (n + 6)·u·Σ(|A| + |B|)·|x|. One average weight left out of 2304 is three times that.
    """
    tag, rng, n_rows = quants.TYPES[name], np.random.default_rng(3), 3
    for n in lengths(tag):
        for offset in (0, 1, 3):
            blocks = realistic_blocks(name, n_rows * n // tag.block, rng)
            parts = [blocks.copy() for _ in SCALES[name]] or [blocks]
            if len(parts) == 2:  # A: with the added factor 0; B: with the quants' factor 0
                for part, zeroed in zip(parts, reversed(SCALES[name]), strict=True):
                    part[:, zeroed : zeroed + 2] = 0
            magnitude = sum(np.abs(oracle(name, part).astype(np.float64)) for part in parts).reshape(n_rows, n)
            around = np.full(n + 80, np.nan, np.float32)
            x = around[40 : 40 + n]
            x[:] = rng.standard_normal(n)
            buffer, address = placed(blocks, offset)
            out = np.full(n_rows, np.nan, np.float32)
            dot_rows(tag, out, address, blocks.size // n_rows, x)
            expected = oracle(name, blocks).astype(np.float64).reshape(n_rows, n) @ x.astype(np.float64)
            tolerance = (n + 6) * 2.0**-24 * (magnitude @ np.abs(x).astype(np.float64))
            assert (np.abs(out - expected) <= tolerance).all(), (n, offset, out, expected, tolerance)


def pack_both(name, x, offset=0):
    """Rows' bytes by our `pack`, into a poisoned buffer, and by gguf-py."""
    tag = quants.TYPES[name]
    poison = np.full(x.size // tag.block * tag.nbytes, 0xA5, np.uint8)
    buffer, address = placed(poison, offset)
    start = address - buffer.ctypes.data
    pack_row(tag, x, address, poison.size)
    assert (buffer[:start] == 0xFF).all() and (buffer[start + poison.size :] == 0xFF).all(), "wrote outside the row"
    with np.errstate(over="ignore", invalid="ignore"):
        expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name]).view(np.uint8)
    return buffer[start : start + poison.size], expected


def test_types_of_the_kv_cache_pack():
    assert sorted(name for name, tag in quants.TYPES.items() if hasattr(tag, "pack")) == ["F16", "F32", "Q8_0"]


@every_packed_type
def test_pack_equals_gguf(name):
    """Same bytes, magnitudes from 1e-35 to 1e4 in one row (float16 subnormals and overflow included)."""
    tag, rng = quants.TYPES[name], np.random.default_rng(4)
    for n in [*lengths(tag), 32 * 999]:
        for offset in (0, 1):
            x = (rng.standard_normal(n) * 10.0 ** rng.integers(-35, 5, -(-n // 32)).repeat(32)[:n]).astype(np.float32)
            ours, expected = pack_both(name, x, offset)
            assert np.array_equal(ours, expected), (n, offset)


def test_q8_0_rounds_halves_away_from_zero():
    """With 127 as the largest value d is 1, so these halves are exact: C's roundf, not nearest even."""
    x = np.array([127, *(np.arange(-15, 16) + 0.5)], np.float32)
    ours, expected = pack_both("Q8_0", x)
    assert np.array_equal(ours, expected)
    assert ours[3:].view(np.int8).tolist() == [*range(-15, 0), *range(1, 17)]
    just_below = np.nextafter(np.float32(0.5), np.float32(0))
    ours, _ = pack_both("Q8_0", np.array([127] + [just_below, -just_below] * 15 + [1.5], np.float32))
    assert ours[3:].view(np.int8).tolist() == [0] * 30 + [2]


def test_q8_0_divides_as_written():
    """A fastmath kernel must not make 127/e of 1/(e/127): values of blocks (largest e) for which that rounds elsewhere."""
    rng = np.random.default_rng(6)
    e = rng.uniform(1, 2, 20_000).astype(np.float32)
    near_half = (e / 127 * (rng.integers(0, 126, e.size) + 0.5)).astype(np.float32)
    as_written, fused = near_half * (1 / (e / np.float32(127))), near_half * (np.float32(127) / e)
    telling = np.floor(as_written + np.float64(0.5)) != np.floor(fused + np.float64(0.5))
    assert telling.sum() > 100
    blocks = np.repeat(near_half[telling, None], 32, axis=1)
    blocks[:, 5] = e[telling]
    ours, expected = pack_both("Q8_0", blocks.ravel())
    assert np.array_equal(ours, expected)


def test_q8_0_packs_tiny_and_zero_blocks():
    """Where 1/d would be infinite the quants are 0, not undefined; a block of zeros is all zero bytes."""
    for x in (np.zeros(32), np.linspace(-1e-40, 1e-40, 32)):
        ours, _ = pack_both("Q8_0", x.astype(np.float32))
        assert not ours.any()


@njit
def shuffled(table, index, out):
    vectors.store(out, 0, vectors.lookup(vectors.load(table, 0, 16), vectors.load(index, 0, 16)))


@njit
def halves(w, out):
    for i in range(out.size):
        out[i] = half(w, 2 * i)


def test_lookup_and_every_half():
    rng = np.random.default_rng(5)
    table, index, out = rng.integers(0, 256, 16, np.uint8), rng.integers(0, 16, 16, np.uint8), np.full(16, 99, np.uint8)
    shuffled(table, index, out)
    assert np.array_equal(out, table[index])
    every = np.arange(65536, dtype=np.uint16)
    converted = np.full(65536, np.nan, np.float32)
    halves(every.view(np.uint8), converted)
    assert np.array_equal(converted, every.view(np.float16).astype(np.float32), equal_nan=True)


def test_outside_numba_is_an_error():
    for verb in (quants.dot, quants.unpack, quants.pack):
        with pytest.raises(TypeError, match="Numba"):
            verb(quants.TYPES["F32"], None, None, 0)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RGPU_CACHE_DIR", str(tmp_path / "ours"))
    assert quants._kernel_folder() == tmp_path / "ours" / f"numba-{quants._source_hash()}"
    monkeypatch.delenv("RGPU_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert quants._kernel_folder().parent == tmp_path / "xdg" / "rgpu"


def test_kernels_of_old_sources_are_deleted_and_recent_ones_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("RGPU_CACHE_DIR", str(tmp_path))
    for name in ("numba-old", "numba-new", "history"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / "numba-old", (1e9, 1e9))
    os.utime(tmp_path / "history", (1e9, 1e9))
    folder = quants._kernel_folder()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["history", "numba-new", folder.name])


def test_a_cache_folder_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RGPU_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="can't be kept.*RGPU_CACHE_DIR"):
        folder = quants._kernel_folder()
    assert folder.is_dir() and tmp_path not in folder.parents
    folder.rmdir()


def test_any_edit_changes_the_cache_folder(monkeypatch, tmp_path):
    """An edited, added or renamed source of what gets compiled gives another hash; the same sources the same."""
    shutil.copytree(quants.PACKAGE / "quants", tmp_path / "rgpu" / "quants", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("rgpu/kernels", "convert"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(quants, "PACKAGE", tmp_path / "rgpu")
    seen = [quants._source_hash()]
    assert quants._source_hash() == seen[0]
    source = tmp_path / "rgpu" / "quants" / "q4_0.py"
    source.write_text(source.read_text() + "\n")
    seen.append(quants._source_hash())
    (tmp_path / "rgpu" / "kernels" / "matmul.py").write_text("a = 1\n")
    seen.append(quants._source_hash())
    (tmp_path / "convert" / "quantize.py").write_text("a = 1\n")
    seen.append(quants._source_hash())
    source.rename(source.with_name("q4_9.py"))
    seen.append(quants._source_hash())
    assert len(set(seen)) == len(seen)


KERNEL = """
import numpy as np
from numba import njit
from rgpu.quants import TYPES, dot

@njit(cache=True)
def one(quant, w, x):
    return dot(quant, w, x, x.size)

w = np.frombuffer(bytes([0, 60] + list(range(32))), np.uint8)  # d = 1, q = 0, 1, .. 31
assert one(TYPES["Q8_0"], w.copy(), np.ones(32, np.float32)) == 496
print(sum(one.stats.cache_hits.values()), sum(one.stats.cache_misses.values()))
"""


def test_kernels_come_from_the_cache_in_the_next_process(tmp_path):
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL)
    environment = os.environ | {"RGPU_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(quants.PACKAGE.parent)}
    runs = [subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [run.stdout.split() for run in runs] == [["0", "1"], ["1", "0"]], runs[-1].stderr
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"numba-{quants._source_hash()}"]
