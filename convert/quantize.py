"""Encoders: float32 rows -> the blocks of a ggml type, in Numba, on as many threads as asked.

Owns the arithmetic only: which tensor gets which type is `mix`, where its rows come from and go to is the converter's.
F16, BF16 and the 32-value types give gguf-py's bytes. Q4_K, Q5_K and Q6_K do the search of llama.cpp's encoders without an
importance matrix (ggml-quants.c): weighted least squares over a range of trial scales, then 6- or 8-bit scales.

The search runs on `LANES` sub-blocks side by side, one per column, so that every sum stays in its own vector lane: no
horizontal adds, no re-ordered sums, and therefore the same bytes from any CPU, any vector width and any number of threads.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rgpu.quants import TYPES  # before numba's decorators: it sets the folder of compiled kernels
from rgpu.quants.blocks import from_half, to_half

from numba import njit  # isort: skip

LANES = 128  # sub-blocks searched together: two float32 arrays [32, LANES] just fill a 32 KB L1 cache
CHUNK = 1 << 18  # weights per piece of work: about a millisecond, and a whole number of every block and of LANES sub-blocks

kernel = njit(nogil=True, cache=True, error_model="numpy")


def quantize(x, quant, out=None, threads=1):
    """Encode float32 `x` [rows, cols] as ggml type `quant` into uint8 `out` [rows, row_bytes], made if None, and return it.

    `cols` is a multiple of the type's block. Infinities and NaNs give unspecified codes in their own block, never an error:
    the caller looks for them where it can name the tensor.
    """
    tag = TYPES[quant]
    rows, cols = x.shape
    assert x.dtype == np.float32 and cols % tag.block == 0, (quant, x.dtype, x.shape)
    if out is None:
        out = np.empty((rows, cols // tag.block * tag.nbytes), np.uint8)
    assert out.shape == (rows, cols // tag.block * tag.nbytes) and out.dtype == np.uint8 and out.flags.c_contiguous
    weights = np.ascontiguousarray(x).reshape(-1)
    blocks = out.reshape(-1, tag.nbytes)
    encode, arguments = ENCODERS[quant]

    def piece(start):
        stop = min(start + CHUNK, weights.size)
        encode(weights[start:stop], blocks[start // tag.block : stop // tag.block], *arguments)

    # Plain threads around nogil kernels: unlike prange, they may be called from several threads at once.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(piece, range(0, weights.size, CHUNK)))
    return out


@kernel
def put_half(value, out, o):
    """float32 -> the two bytes at `o`; returns the float32 that a reader will see."""
    bits = to_half(value)
    out[o] = bits & 255
    out[o + 1] = bits >> 8
    return from_half(bits)


# ---- one value per block ----


@kernel
def encode_f32(x, out):
    """float32 [n] -> uint8 [n, 4], unchanged."""
    out.view(np.float32)[:, 0] = x


@kernel
def encode_f16(x, out):
    """float32 [n] -> uint8 [n, 2], rounded to nearest even."""
    bits = out.view(np.uint16)
    for i in range(x.size):
        bits[i, 0] = to_half(x[i])


@kernel
def encode_bf16(x, out):
    """float32 [n] -> uint8 [n, 2]: the upper half rounded to nearest even; a NaN stays one and becomes quiet."""
    source, bits = x.view(np.uint32), out.view(np.uint16)
    for i in range(x.size):
        n = source[i]
        rounded = n + np.uint32(0x7FFF) + ((n >> np.uint32(16)) & np.uint32(1))
        is_nan = (n & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        bits[i, 0] = ((n | np.uint32(0x400000)) if is_nan else rounded) >> np.uint32(16)


# ---- 32 values per block, as gguf-py (and ggml's reference code) rounds them ----


@kernel
def encode_q8_0(x, out):
    """float32 [32·n] -> uint8 [n, 34]: d = largest |x| / 127, codes rounded half away from zero."""
    for b in range(len(out)):
        extreme = np.float32(0)
        for i in range(32):
            extreme = max(extreme, abs(x[32 * b + i]))
        d = extreme / np.float32(127)
        inverse = np.float32(1) / d if d > 0 else np.float32(0)
        put_half(d, out[b], 0)
        for i in range(32):
            v = x[32 * b + i] * inverse
            size = abs(v)
            whole = np.floor(size)
            whole += np.floor(np.float32(2) * (size - whole))
            whole = whole if whole < np.float32(127) else np.float32(127)  # also where inverse overflowed
            out[b, 2 + i] = np.uint8(np.int8(-whole if v < 0 else whole))


@kernel
def encode_symmetric_32(x, out, levels):
    """Q4_0, Q5_0 (16, 32 levels): float32 [32·n] -> uint8 [n, 18 or 22]; the first of the largest |x| becomes the lowest code."""
    codes = np.empty(32, np.uint8)
    for b in range(len(out)):
        extreme = x[32 * b]
        for i in range(1, 32):
            extreme = x[32 * b + i] if abs(x[32 * b + i]) > abs(extreme) else extreme
        d = extreme / np.float32(-levels // 2)
        inverse = np.float32(1) / d if d != 0 else np.float32(0)
        round_codes(x[32 * b : 32 * b + 32], np.float32(0), inverse, np.float32(levels // 2 + 0.5), levels - 1, codes)
        put_half(d, out[b], 0)
        pack_codes_32(codes, out[b], 2, levels)


@kernel
def encode_affine_32(x, out, levels):
    """Q4_1, Q5_1 (16, 32 levels): float32 [32·n] -> uint8 [n, 20 or 24]; lowest and highest value become the end codes."""
    codes = np.empty(32, np.uint8)
    for b in range(len(out)):
        low = high = x[32 * b]
        for i in range(1, 32):
            low, high = min(low, x[32 * b + i]), max(high, x[32 * b + i])
        d = (high - low) / np.float32(levels - 1)
        inverse = np.float32(1) / d if d != 0 else np.float32(0)
        round_codes(x[32 * b : 32 * b + 32], low, inverse, np.float32(0.5), levels - 1, codes)
        put_half(d, out[b], 0)
        put_half(low, out[b], 2)
        pack_codes_32(codes, out[b], 4, levels)


@kernel
def round_codes(x, low, inverse, offset, top, codes):
    """codes = truncate((x - low)·inverse + offset), kept in 0..top; a NaN becomes 0."""
    for i in range(x.size):
        v = (x[i] - low) * inverse + offset
        v = v if v > np.float32(0) else np.float32(0)
        codes[i] = np.uint8(v if v < np.float32(top) else np.float32(top))


@kernel
def pack_codes_32(codes, out, o, levels):
    """32 codes -> at `o`: with 32 levels the fifth bits as a uint32, then value i in the low, i + 16 in the high nibble."""
    if levels == 32:
        for j in range(4):
            fifth = 0
            for i in range(8):
                fifth |= (codes[8 * j + i] >> 4) << i
            out[o + j] = fifth
        o += 4
    for i in range(16):
        out[o + i] = codes[i] & 15 | (codes[i + 16] & 15) << 4


# ---- 256 values per block: search in columns, then pack ----


@kernel
def columns(rows):
    """float32 [rows · LANES], flat, zeros: row r from r·LANES. It starts a cache line: vectors across two of them cost dear.

    Flat, because constant offsets from one pointer are what LLVM needs to see that rows don't overlap, and to vectorise.
    """
    memory = np.zeros(rows * LANES + 16, np.float32)
    skip = (-memory.ctypes.data % 64) // 4
    return memory[skip : skip + rows * LANES]


@kernel
def gather(x, start, length, out):
    """Sub-block `l` of `length` weights, from x[start:], becomes column l of `out` [length, LANES], as many as there are."""
    for lane in range(min(LANES, (x.size - start) // length)):
        for i in range(length):
            out[LANES * i + lane] = x[start + lane * length + i]


# Rows of the affine search's state: sums over the trial codes q; sums over u; where x = 0 lies; the best fit; the sub-block.
Q, QQ, QU, W, WU, WUU, ZERO, BEST, SLOPE, OFFSET, LOW, SPAN, RMS = LANES * np.arange(13)


@kernel
def normalise_affine(u, w, state):
    """Columns u [32, LANES] -> (u - low) / span, low <= 0, span = largest - low; w = (rms + |x|) / span; clears `state`."""
    state[:] = 0
    for lane in range(LANES):
        state[SPAN + lane] = -np.inf
    for i in range(32):
        for lane in range(LANES):
            v = u[LANES * i + lane]
            state[LOW + lane] = min(state[LOW + lane], v)
            state[SPAN + lane] = max(state[SPAN + lane], v)
            state[RMS + lane] += v * v
    for lane in range(LANES):
        state[SPAN + lane] -= state[LOW + lane]
        state[RMS + lane] = np.sqrt(state[RMS + lane] / np.float32(32))
        state[ZERO + lane] = -state[LOW + lane] / state[SPAN + lane]
        state[BEST + lane] = np.inf
    for i in range(32):
        for lane in range(LANES):
            v = u[LANES * i + lane]
            inverse = np.float32(1) / state[SPAN + lane] if state[SPAN + lane] > 0 else np.float32(0)
            weight = (state[RMS + lane] + abs(v)) * inverse
            v = (v - state[LOW + lane]) * inverse
            w[LANES * i + lane] = weight
            u[LANES * i + lane] = v
            state[W + lane] += weight
            state[WU + lane] += weight * v
            state[WUU + lane] += weight * v * v


@kernel
def sum_affine(u, w, k, top, state):
    """Codes q = round(k·(u - offset)) in 0..top; Q, QQ, QU of `state` = Σw·q, Σw·q², Σw·q·u of each column."""
    state[:W] = 0
    for i in range(32):
        for lane in range(LANES):
            v = u[LANES * i + lane]
            q = min(max(np.rint(k * (v - state[OFFSET + lane])), np.float32(0)), top)
            wq = w[LANES * i + lane] * q
            state[Q + lane] += wq
            state[QQ + lane] += wq * q
            state[QU + lane] += wq * v


@kernel
def solve_affine(state):
    """Where the weighted least squares for the summed codes beats BEST: its error, SLOPE and OFFSET (u = slope·q + offset)."""
    two = np.float32(2)
    for lane in range(LANES):
        q, qq, qu = state[Q + lane], state[QQ + lane], state[QU + lane]
        one, u, uu, zero = state[W + lane], state[WU + lane], state[WUU + lane], state[ZERO + lane]
        spread = one * qq - q * q
        s = (one * qu - u * q) / spread
        m = (qq * u - q * qu) / spread
        s_through_zero = (qu - zero * q) / qq
        # Minima are stored without a sign, so no offset may be above zero; equal codes have no slope but that from zero.
        through_zero = (m > zero) | (spread < np.float32(1e-5) * one * qq)
        s = s_through_zero if through_zero else s
        m = zero if through_zero else m
        # From the same sums: u lies in 0..1, so float32 keeps what is left after the cancellation.
        error = uu + s * (s * qq + two * (m * q - qu)) + m * (m * one - two * u)
        better = (error < state[BEST + lane]) & (s > 0)
        state[BEST + lane] = error if better else state[BEST + lane]
        state[SLOPE + lane] = s if better else state[SLOPE + lane]
        state[OFFSET + lane] = m if better else state[OFFSET + lane]


@kernel
def encode_affine_256(x, out, levels, fewest):
    """Q4_K, Q5_K (16, 32 levels): float32 [256·n] -> uint8 [n, 144 or 176].

    Per sub-block the best x = scale·q - minimum, minimum >= 0: weighted least squares for each of several sets of codes,
    made with levels - 1 and `fewest`..10 tenths of a step to the span, counted from the best offset so far.
    """
    u, w, state = columns(32), columns(32), columns(13)
    codes = np.empty(256, np.uint8)
    scale, minimum = np.empty(8, np.float32), np.empty(8, np.float32)
    for first in range(0, len(out), LANES // 8):
        gather(x, 256 * first, 32, u)
        normalise_affine(u, w, state)
        for tenths in range(fewest, 11):
            sum_affine(u, w, np.float32(levels - 1 + tenths / 10), np.float32(levels - 1), state)
            solve_affine(state)
        for b in range(first, min(first + LANES // 8, len(out))):
            for j in range(8):
                lane = 8 * (b - first) + j
                span = state[SPAN + lane]
                scale[j] = state[SLOPE + lane] * span
                minimum[j] = max(-state[LOW + lane] - span * state[OFFSET + lane], np.float32(0))
            code_affine_256(x[256 * b : 256 * b + 256], scale, minimum, levels - 1, out[b], codes)
            pack_codes_256(codes, out[b], levels)


@kernel
def code_affine_256(x, scale, minimum, top, out, codes):
    """Write d, dmin and the 12 bytes of eight 6-bit (scale, minimum) pairs; code the 256 weights by what a reader will see."""
    pairs = np.empty((2, 8), np.uint8)
    units = np.empty(2, np.float32)
    for k, values in enumerate((scale, minimum)):
        largest = values.max()
        inverse = np.float32(63) / largest if largest > 0 else np.float32(0)
        round_codes(values, np.float32(0), inverse, np.float32(0.5), 63, pairs[k])
        units[k] = put_half(largest / np.float32(63), out, 2 * k)
    for j in range(4):
        for k in range(2):
            out[4 + 4 * k + j] = pairs[k, j] | pairs[k, 4 + j] >> 4 << 6
        out[12 + j] = pairs[0, 4 + j] & 15 | (pairs[1, 4 + j] & 15) << 4
    for j in range(8):
        step = units[0] * pairs[0, j]
        inverse = np.float32(1) / step if step > 0 else np.float32(0)
        round_codes(x[32 * j : 32 * j + 32], -units[1] * pairs[1, j], inverse, np.float32(0.5), top, codes[32 * j : 32 * j + 32])


@kernel
def pack_codes_256(codes, out, levels):
    """256 codes -> from byte 16: with 32 levels the fifth bits by i % 32, then of every 64 codes 32 low, 32 high nibbles."""
    o = 16
    if levels == 32:
        o = 48
        for i in range(32):
            fifth = 0
            for j in range(8):
                fifth |= (codes[32 * j + i] >> 4) << j
            out[16 + i] = fifth
    for c in range(4):
        for i in range(32):
            out[o + 32 * c + i] = codes[64 * c + i] & 15 | (codes[64 * c + 32 + i] & 15) << 4


# Rows of the symmetric search's state: sums over the trial codes q; the sub-block's largest |x|, signed; the best fit.
XQ, XQQ, EXTREME, GAIN, SCALE = LANES * np.arange(5)


@kernel
def fit_symmetric(t, state):
    """Per column of t [16, LANES], SCALE of codes -32..31 with the least error weighted by x²; `t` is overwritten.

    Trial codes are round(-(32 + trial)·x / extreme); the least-squares scale is Σw·x·q / Σw·q², and the error falls with
    (Σw·x·q)² / Σw·q². A column of zeros gets scale 0.
    """
    state[:] = 0
    for i in range(16):
        for lane in range(LANES):
            v = t[LANES * i + lane]
            state[EXTREME + lane] = v if abs(v) > abs(state[EXTREME + lane]) else state[EXTREME + lane]
    for i in range(16):
        for lane in range(LANES):
            extreme = state[EXTREME + lane]
            t[LANES * i + lane] = t[LANES * i + lane] / extreme if extreme != 0 else np.float32(0)
    for trial in range(-9, 10):
        k = np.float32(-32 - 0.1 * trial)
        state[:EXTREME] = 0
        for i in range(16):
            for lane in range(LANES):
                v = t[LANES * i + lane]
                q = min(max(np.rint(k * v), np.float32(-32)), np.float32(31))
                wq = v * v * q
                state[XQ + lane] += wq * v
                state[XQQ + lane] += wq * q
        for lane in range(LANES):
            s = state[XQ + lane] / state[XQQ + lane]
            better = s * state[XQ + lane] > state[GAIN + lane]  # false for the NaN of a column of zeros
            state[GAIN + lane] = s * state[XQ + lane] if better else state[GAIN + lane]
            state[SCALE + lane] = s * state[EXTREME + lane] if better else state[SCALE + lane]


@kernel
def encode_q6_k(x, out):
    """float32 [256·n] -> uint8 [n, 210]: sixteen int8 scales, the largest of them -128, over d."""
    t, state = columns(16), columns(5)
    codes = np.empty(256, np.uint8)
    for first in range(0, len(out), LANES // 16):
        gather(x, 256 * first, 16, t)
        fit_symmetric(t, state)
        for b in range(first, min(first + LANES // 16, len(out))):
            lane = SCALE + 16 * (b - first)
            sixteen = state[lane : lane + 16]
            largest = sixteen[np.argmax(np.abs(sixteen))]
            d = put_half(largest / np.float32(-128), out[b], 208)
            inverse = np.float32(-128) / largest if largest != 0 else np.float32(0)
            for j in range(16):
                level = min(max(np.rint(sixteen[j] * inverse), np.float32(-128)), np.float32(127))
                out[b, 192 + j] = np.uint8(np.int8(level))
                step = d * level
                x16 = x[256 * b + 16 * j : 256 * b + 16 * j + 16]
                per_step = np.float32(1) / step if step != 0 else np.float32(0)
                round_codes(x16, np.float32(0), per_step, np.float32(32.5), 63, codes[16 * j : 16 * j + 16])
            for c in range(2):
                low, high = codes[128 * c : 128 * c + 128], out[b, 128 + 32 * c : 160 + 32 * c]
                for i in range(64):
                    out[b, 64 * c + i] = low[i] & 15 | (low[64 + i] & 15) << 4
                for i in range(32):
                    high[i] = low[i] >> 4 | low[32 + i] >> 4 << 2 | low[64 + i] >> 4 << 4 | low[96 + i] >> 4 << 6


ENCODERS = {  # type -> its encoder (x, blocks, *arguments) and these arguments
    "F32": (encode_f32, ()),
    "F16": (encode_f16, ()),
    "BF16": (encode_bf16, ()),
    "Q8_0": (encode_q8_0, ()),
    "Q4_0": (encode_symmetric_32, (16,)),
    "Q5_0": (encode_symmetric_32, (32,)),
    "Q4_1": (encode_affine_32, (16,)),
    "Q5_1": (encode_affine_32, (32,)),
    "Q4_K": (encode_affine_256, (16, -10)),
    "Q5_K": (encode_affine_256, (32, -5)),
    "Q6_K": (encode_q6_k, ()),
}
