"""Products with quantised activations: the format of the activations, every type's integer view, and `dot_int8`.

The oracles are NumPy's arithmetic, step by step as the format says, and each type's `dequantize` (test_quants.py compares that
with gguf-py).
"""

import numpy as np
import pytest
from numba import njit

from rgpu import quants
from rgpu.quants import activations, isa, products
from rgpu.quants.blocks import FASTMATH, row

from .test_quants import BYTES, SCALES, SPECIAL, placed, put_scales, realistic_blocks, same_bits

BLOCKS = {name: tag for name, tag in quants.TYPES.items() if tag.block > 1}
U = 2.0**-24  # unit roundoff of float32

every_type = pytest.mark.parametrize("name", BLOCKS)


# fastmath, as a kernel has it: none of these must inherit the licence to re-order or fuse.
@njit(cache=True, nogil=True, fastmath=FASTMATH)
def quantize(x, address):
    activations.quantize(x, row(address, activations.row_bytes(x.size)))


@njit(cache=True, nogil=True, fastmath=FASTMATH)
def expand(quant, address, nbytes, q, scales, mins, n):
    products.expand(quant, row(address, nbytes), q, scales, mins, n)


@njit(cache=True, nogil=True, fastmath=FASTMATH)
def dot_rows(quant, set_, out, address, nbytes, x, n):
    for r in range(out.size):
        out[r] = products.dot_int8(quant, set_, row(address + r * nbytes, nbytes), row(x, activations.row_bytes(n)), n)


def quantized(x, offset=0):
    """The planes (q, d, s32, s16) of float32 `x`, and the row's bytes, written into poison at some alignment."""
    n = x.size
    buffer, address = placed(np.full(activations.row_bytes(n), 0xA5, np.uint8), offset)
    quantize(x, address)
    start = address - buffer.ctypes.data
    assert (buffer[:start] == 0xFF).all() and (buffer[start + n + n // 2 :] == 0xFF).all(), "wrote outside the row"
    bits = buffer[start : start + n + n // 2].copy()
    q, d, s32, s16 = np.split(bits, [n, n + n // 8, n + n // 4])
    return (q.view(np.int8), d.view(np.float32), s32.view(np.float32), s16.view(np.float32)), bits


def by_numpy(x):
    """The same planes, as the format defines them."""
    groups = x.reshape(-1, 32)
    with np.errstate(over="ignore", invalid="ignore"):
        d = np.abs(groups).max(axis=1) / np.float32(127)
    d[d < np.finfo(np.float32).tiny] = 0
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 0)
    q = np.rint(groups * inverse[:, None]).astype(np.int8)
    sums = q.reshape(-1, 2, 16).sum(axis=2, dtype=np.int32)
    with np.errstate(over="ignore"):
        return q.ravel(), d, d * sums.sum(axis=1).astype(np.float32), (d[:, None] * sums.astype(np.float32)).ravel()


SAMPLES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "magnitudes": lambda rng, n: rng.standard_normal(n) * 10.0 ** rng.integers(-44, 38, n // 32).repeat(32),
    "ties": lambda rng, n: np.where(np.arange(n) % 32, rng.integers(-126, 126, n) + 0.5, 127) * 2.0**-5,
    "subnormal": lambda rng, n: rng.standard_normal(n) * 1e-40,
    "around the smallest": lambda rng, n: rng.standard_normal(n) * 127 * 2.0**-127,
    "huge": lambda rng, n: rng.uniform(-1, 1, n) * np.finfo(np.float32).max,
    "negative": lambda rng, n: -rng.uniform(1, 2, n),
    "one column": lambda rng, n: np.where(np.arange(n) % 32 == 31, rng.standard_normal(n), 0),
    "zeros": lambda rng, n: np.zeros(n),
    "negative zeros": lambda rng, n: -np.zeros(n),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("n", [32, 96, 2048])
def test_activations_equal_numpy(sample, n):
    x = SAMPLES[sample](np.random.default_rng(7), n).astype(np.float32)
    for offset in (0, 1):
        planes, _ = quantized(x, offset)
        for ours, numpy_s in zip(planes, by_numpy(x), strict=True):
            assert same_bits(ours, numpy_s)
        q, d = planes[:2]
        assert np.array_equal(activations.rounded(x), (q.reshape(-1, 32) * d[:, None]).ravel())
        assert q.min() >= -127


def test_activations_cover_the_samples_they_are_for():
    """Some groups of 'around the smallest' are zeros and some are not; half a step is rounded to even."""
    rng = np.random.default_rng(7)
    d = by_numpy(SAMPLES["around the smallest"](rng, 2048).astype(np.float32))[1]
    assert 0 < (d == 0).sum() < d.size
    x = SAMPLES["ties"](rng, 2048).astype(np.float32)
    q, d = quantized(x)[0][:2]
    assert (d == 2.0**-5).all() and (q[np.arange(2048) % 32 > 0] % 2 == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_stays_so(bad):
    x = np.random.default_rng(8).standard_normal(96).astype(np.float32)
    x[40] = bad
    (_, d, s32, s16), _ = quantized(x)
    for plane in (d, s32, s16):
        assert np.array_equal(np.isnan(plane), np.arange(plane.size) * 3 // plane.size == 1)
    with np.errstate(invalid="ignore"):
        values = activations.rounded(x)
    assert np.isnan(values[32:64]).all() and not np.isnan(values[:32]).any() and not np.isnan(values[64:]).any()


def test_rounded_keeps_shapes():
    x = np.random.default_rng(9).standard_normal((3, 5, 64)).astype(np.float32)
    values = activations.rounded(x)
    assert values.shape == x.shape and values.dtype == np.float32
    assert same_bits(values[2, 4], activations.rounded(x[2, 4]))
    # A step is max/127, and d and 1/d are rounded: half a step and a little.
    step = np.abs(x).reshape(-1, 32).max(axis=1) / 127
    assert (np.abs(values - x).reshape(-1, 32).max(axis=1) <= step * (0.5 + 127 * 4 * U)).all()


def lengths(tag):
    return [256, 512, 768] + ([32, 96, 288] if tag.block == 32 else [])


def expanded(name, blocks, offset=0):
    """(q, scales, mins) of one row of blocks, by `expand` into poisoned arrays."""
    tag = BLOCKS[name]
    n = len(blocks) * tag.block
    q, scales, mins = np.full(n + 64, 0xA5, np.uint8), *(np.full(n // tag.group + 16, -7.5, np.float32) for _ in range(2))
    _, address = placed(blocks, offset)
    expand(tag, address, blocks.size, q, scales, mins, n)
    ends = n, n // tag.group, n // tag.group
    for array, end, poison in zip((q, scales, mins), ends, (0xA5, -7.5, -7.5), strict=True):
        assert (array[end:] == poison).all(), "wrote outside"
    return tuple(array[:end] for array, end in zip((q, scales, mins), ends, strict=True))


@every_type
def test_the_integer_view_is_the_weights(name):
    """Scale, q and minimum give `dequantize` to the bit, in its order of operations; any bits, and extreme ones."""
    tag, rng = BLOCKS[name], np.random.default_rng(10)
    extreme = np.repeat(np.array(BYTES, np.uint8)[:, None], tag.nbytes, axis=1)
    for blocks in (rng.integers(0, 256, (64, tag.nbytes), dtype=np.uint8), extreme):
        put_scales(blocks, name, rng.choice(SPECIAL, len(blocks)))
        q, scales, mins = expanded(name, blocks, offset=3)
        with np.errstate(over="ignore", invalid="ignore"):
            weights = tag.dequantize(blocks).ravel()
            scale, minimum = scales.repeat(tag.group), mins.repeat(tag.group)
            if tag.zero:
                assert same_bits(mins, scales * np.float32(tag.zero))
                ours = scale * (q.astype(np.float32) - np.float32(tag.zero))
            else:
                ours = scale * q.astype(np.float32) - minimum
        number = ~np.isnan(weights)
        assert same_bits(ours[number], weights[number]) and np.isnan(ours[~number]).all()
        assert q.max() <= tag.top
        if blocks is not extreme:
            assert q.max() == tag.top, "multiply_add may rely on a smaller bound"


@pytest.mark.parametrize("set_", isa.supported(), ids=lambda set_: type(set_).__name__)
@every_type
def test_dot_int8_equals_float64(name, set_):
    """Against Σ in float64 of the dequantised weights times the rounded activations.

    M is Σ (|scale·q| + |minimum|)·|x| with x = d·q. In units of u·M, u = 2^-24: a dequantised weight is rounded twice and x once:
    3. The kernel's sums of q·q are exact; scale·d, the sums' own rounding and the final difference: 3. Additions: a lane of 32
    takes n/128 products, a lane of the minima n/256 or fewer, what is left of a row up to 7 of either, and adding 32 and 16 lanes
    in whatever order 31 + 15: less than n/128 + 7 + 46. To leave out a weight of average size would be fifty times as much.
    """
    tag, rng, n_rows = BLOCKS[name], np.random.default_rng(11), 3
    for n in lengths(tag):
        for offset in (0, 1):
            blocks = realistic_blocks(name, n_rows * n // tag.block, rng)
            x = rng.standard_normal(n).astype(np.float32)
            (_, _, _, _), bits = quantized(x)
            activation, x_address = placed(bits, offset)
            weights, address = placed(blocks, offset)
            out = np.full(n_rows, np.nan, np.float32)
            dot_rows(tag, set_, out, address, blocks.size // n_rows, x_address, n)
            values = activations.rounded(x).astype(np.float64)
            expected = tag.dequantize(blocks).astype(np.float64).reshape(n_rows, n) @ values
            q, scales, mins = (part.astype(np.float64).reshape(n_rows, -1) for part in expanded(name, blocks))
            magnitude = np.abs(scales).repeat(tag.group, axis=1) * q + np.abs(mins).repeat(tag.group, axis=1)
            tolerance = (n / 128 + 7 + 46 + 6) * U * (magnitude @ np.abs(values))
            assert (np.abs(out - expected) <= tolerance).all(), (n, offset, out, expected, tolerance)


@every_type
def test_dot_int8_does_not_depend_on_its_surroundings(name):
    """The same bits for a row alone and among others, at any alignment of the weights and of the activations."""
    tag, rng = BLOCKS[name], np.random.default_rng(12)
    for n in (768, 288) if tag.block == 32 else (768,):
        blocks = realistic_blocks(name, 5 * n // tag.block, rng)
        _, bits = quantized(rng.standard_normal(n).astype(np.float32))
        seen = []
        for offset in (0, 1, 16, 63):
            activation, x_address = placed(bits, offset)
            weights, address = placed(blocks, 7 * offset)
            nbytes = blocks.size // 5
            out, alone = np.full(5, np.nan, np.float32), np.full(1, np.nan, np.float32)
            dot_rows(tag, isa.best(), out, address, nbytes, x_address, n)
            dot_rows(tag, isa.best(), alone, address + 3 * nbytes, nbytes, x_address, n)
            assert same_bits(alone, out[3:4])
            seen.append(out.tobytes())
        assert len(set(seen)) == 1


@every_type
def test_nan_goes_through_dot_int8(name):
    """A NaN or infinity among the activations, whatever the weights, zeros included."""
    tag, rng = BLOCKS[name], np.random.default_rng(13)
    n = 288 if tag.block == 32 else 256
    for blocks in (realistic_blocks(name, n // tag.block, rng), np.zeros((n // tag.block, tag.nbytes), np.uint8)):
        for bad in (np.nan, np.inf):
            for column in (0, n // 2, n - 1):
                x = rng.standard_normal(n).astype(np.float32)
                x[column] = bad
                activation, x_address = placed(quantized(x)[1], 0)
                weights, address = placed(blocks, 0)
                out = np.zeros(1, np.float32)
                dot_rows(tag, isa.best(), out, address, blocks.size, x_address, n)
                assert np.isnan(out).all()


def test_every_type_of_blocks_has_an_integer_view():
    for tag in quants.TYPES.values():
        if tag.block == 1:
            assert not hasattr(tag, "integers")
        else:
            assert tag.block in (32, 256) and tag.group in (16, 32) and 0 <= tag.zero <= tag.top <= 255
            assert bool(tag.zero) == (len(SCALES[type(tag).__name__]) < 2), "two factors: minima are stored"


def test_outside_numba_is_an_error():
    for verb, count in ((products.dot_int8, 5), (products.expand, 6)):
        with pytest.raises(TypeError, match="Numba"):
            verb(*[None] * count)
