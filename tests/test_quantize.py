"""The encoders: gguf-py's bytes where it has an encoder, llama.cpp's errors where it has not, and blocks that are hard."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from llvmlite.binding import get_host_cpu_features

from bench.quantize import error, llama_encoder, samples
from convert.quantize import CHUNK, ENCODERS, LANES, quantize
from rgpu.quants import TYPES

K_QUANTS = ["Q4_K", "Q5_K", "Q6_K"]
LIKE_GGUF_PY = [name for name in ENCODERS if name not in K_QUANTS]
# Largest error over the range of a block (zero included). Half a step; a whole one where the second extreme has no code
# (Q4_0, Q5_0); K-quants also clip on purpose and round their scales, here to a step and a quarter.
WORST = {"Q8_0": 1 / 254, "Q4_0": 1 / 8, "Q5_0": 1 / 16, "Q4_1": 1 / 30, "Q5_1": 1 / 62}
WORST |= {"Q4_K": 1.25 / 15, "Q5_K": 1.25 / 31, "Q6_K": 1.25 / 32}
VECTORS = json.loads((Path(__file__).parent / "vectors" / "quantize_llamacpp.json").read_text())
SAMPLES = samples()

every_type = pytest.mark.parametrize("quant", ENCODERS)


def decode(blocks, quant):
    """uint8 [rows, row_bytes] -> float32 [rows, cols], by gguf-py."""
    with np.errstate(over="ignore", invalid="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[quant])


def poisoned(x, quant):
    tag = TYPES[quant]
    return np.full((len(x), x.shape[1] // tag.block * tag.nbytes), 0xA5, np.uint8)


# ---- against other programs ----


@pytest.mark.parametrize("quant", LIKE_GGUF_PY)
@pytest.mark.parametrize("name", SAMPLES)
def test_bytes_equal_gguf_py(quant, name):
    x = SAMPLES[name].copy()
    x[0, :32] = 0  # a block of zeros
    x[1, :32] = np.float32(0.1)  # of one value
    x[2, :32] = np.tile([-1, 1], 16)  # of equal extremes: the first one counts
    expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[quant]).view(np.uint8)
    np.testing.assert_array_equal(quantize(x, quant, poisoned(x, quant)), expected.reshape(len(x), -1))


def test_bf16_rounding_at_its_edges():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x00008000], np.uint32)
    x = bits.view(np.float32)[None]
    np.testing.assert_array_equal(quantize(x, "BF16"), gguf.quants.quantize(x, gguf.GGMLQuantizationType.BF16))


@pytest.mark.parametrize("quant", VECTORS)
@pytest.mark.parametrize("name", SAMPLES)
def test_error_within_two_percent_of_llama_cpp(quant, name):
    x = SAMPLES[name]
    assert error(x, quantize(x, quant), quant) <= 1.02 * VECTORS[quant][name]


@pytest.mark.parametrize("quant, expected", [("Q4_K", 0.071), ("Q5_K", 0.036), ("Q6_K", 0.018)])
def test_error_on_gaussian_weights(quant, expected):
    """The figures of gguf.md, section 5, to their two digits."""
    assert error(SAMPLES["gaussian"], quantize(SAMPLES["gaussian"], quant), quant) == pytest.approx(expected, rel=0.03)


def test_vectors_are_those_of_llama_cpp():
    encode = llama_encoder()
    if encode is None:
        pytest.skip("needs llama_cpp (extra `bench`)")
    for quant, errors in VECTORS.items():
        for name, expected in errors.items():
            assert error(SAMPLES[name], encode(SAMPLES[name], quant), quant) == pytest.approx(expected, rel=1e-6)


# ---- any number of threads, any size, any processor ----


@every_type
def test_threads_and_position_do_not_change_bytes(quant):
    rng = np.random.default_rng(7)
    x = 0.02 * rng.standard_t(3, (2 * CHUNK // 1792 + 5, 1792))  # several pieces, the last one short
    x = x.astype(np.float32)
    one = quantize(x, quant, poisoned(x, quant))
    np.testing.assert_array_equal(quantize(x, quant, poisoned(x, quant), threads=2), one)
    for first in (1, LANES // 8 + 3):  # other columns of the search, and fewer of them
        np.testing.assert_array_equal(quantize(x[first : first + 2], quant), one[first : first + 2])


def test_input_may_be_read_only_and_strided():
    x = SAMPLES["laplace"]
    expected = quantize(np.ascontiguousarray(x[:, :1024]), "Q4_K")
    np.testing.assert_array_equal(quantize(x[:, :1024], "Q4_K"), expected)
    frozen = x[:, :1024].copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(quantize(frozen, "Q4_K"), expected)


def has_avx512():
    try:
        return get_host_cpu_features().get("avx512f", False)
    except RuntimeError:  # LLVM knows the features of some processors only
        return False


@pytest.mark.skipif(not has_avx512(), reason="needs a processor with more than AVX2 to compare with")
def test_bytes_do_not_depend_on_vector_width(tmp_path):
    """Conversions can be compared by their digest."""
    script = (
        "import hashlib; from bench.quantize import samples; from convert.quantize import quantize; x = samples(8)['laplace'];"
        "print([hashlib.sha256(quantize(x, quant)).hexdigest() for quant in ('Q4_K', 'Q5_K', 'Q6_K')])"
    )
    narrow = {"RGPU_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+f16c"}
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, env=os.environ | narrow, check=True, capture_output=True, text=True).stdout
    x = samples(8)["laplace"]
    assert printed.split("'")[1::2] == [hashlib.sha256(quantize(x, quant)).hexdigest() for quant in K_QUANTS]


# ---- blocks that are hard ----


def spread(x, tag):
    """The range of every block, zero included, for each of its weights."""
    blocks = x.reshape(-1, min(tag.block, 32))
    width = np.maximum(blocks.max(1), 0) - np.minimum(blocks.min(1), 0)
    return np.repeat(width, blocks.shape[1]).reshape(x.shape)


@pytest.mark.parametrize("quant", WORST)
def test_round_trip_stays_as_near_as_its_codes(quant):
    x = SAMPLES["scaled"]
    got = decode(quantize(x, quant), quant)
    # and the float16 factors d and m: half a unit in the last of 11 bits each
    np.testing.assert_array_less(abs(got - x), (WORST[quant] + 2**-10) * spread(x, TYPES[quant]))


@every_type
def test_zeros_stay_zero(quant):
    x = np.zeros((3, 512), np.float32)
    x[1] = SAMPLES["gaussian"][1, :512]  # not a test on zeros alone: the rows beside them are not
    got = decode(quantize(x, quant, poisoned(x, quant)), quant)
    assert not got[[0, 2]].any() and got[1].any()


@every_type
@pytest.mark.parametrize("value", [1.0, -1.0, 0.37, -0.037])
def test_constant_blocks(quant, value):
    got = decode(quantize(np.full((2, 512), value, np.float32), quant), quant)
    np.testing.assert_allclose(got, value, rtol=2**-7)  # BF16's and Q6_K's scales have 8 bits, float16 factors 11


@pytest.mark.parametrize("quant", WORST)
def test_one_huge_outlier(quant):
    x = np.float32(0.02) * np.random.default_rng(3).standard_normal((4, 512), np.float32)
    x[1, 300] = 1e4
    x[2, 5] = -1e4
    got = decode(quantize(x, quant), quant)
    np.testing.assert_allclose(got[[1, 2], [300, 5]], [1e4, -1e4], rtol=0.02)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[[0, 3]], decode(quantize(x[[0, 3]], quant), quant))


@every_type
def test_tiny_values_stay_small(quant):
    """Factors below float16's smallest number round to zero or to it: never to anything large."""
    for size in (1e-45, 1e-39, 1e-30, 1e-12, 1e-8):
        x = np.float32(size) * np.random.default_rng(4).integers(-100, 101, (2, 512)).astype(np.float32)
        assert abs(decode(quantize(x, quant, poisoned(x, quant)), quant)).max() <= max(100 * size, 2**-24 * 63 * 2)


@every_type
def test_infinities_and_nans_do_not_leave_their_row(quant):
    x = SAMPLES["laplace"][:6, :512].copy()
    expected = quantize(x, quant)
    x[1, 17], x[2, 200], x[4, 300] = np.inf, -np.inf, np.nan
    x[5] = np.nan
    got = quantize(x, quant, poisoned(x, quant), threads=2)
    np.testing.assert_array_equal(got[[0, 3]], expected[[0, 3]])


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        quantize(np.ones((2, 128), np.float32), "Q4_K")
    with pytest.raises(AssertionError):
        quantize(np.ones((2, 256)), "Q4_K")
    with pytest.raises(AssertionError):
        quantize(np.ones((2, 256), np.float32), "Q4_K", np.empty((2, 143), np.uint8))
