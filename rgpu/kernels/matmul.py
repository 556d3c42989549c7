"""out[t] = W · x[t] for a quantised matrix W [rows, cols] and tokens t, in the gather form that experts need.

Rows are split over the threads. Up to three tokens read a row's blocks directly (`dot`: one pass over W, bound by memory).
More tokens unpack TILE rows into float32 once and multiply 4 rows by 4 tokens at a time: sixteen sums that LLVM keeps in
vector registers, eight loads for sixteen multiply-adds. TILE rows of 2,048 take 256 KB, which stays in the L2 cache.
"""

import numpy as np
from numba import prange

from ..quants.blocks import dot, row, unpack
from . import kernel, piece
from .scalar import floats, ints, longs

TILE = 32  # rows unpacked at a time; a multiple of 4
FEW = 3  # up to so many tokens, unpacking costs more than it saves


@piece
def _tile_4x4(out, stride, first, y0, y1, y2, y3, w0, w1, w2, w3, x0, x1, x2, x3, n):
    """16 dot products of length n; the sums of token i go to out + 4·(stride·y_i + first) .. + 3."""
    zero = np.float32(0)
    a00, a01, a02, a03, a10, a11, a12, a13 = zero, zero, zero, zero, zero, zero, zero, zero
    a20, a21, a22, a23, a30, a31, a32, a33 = zero, zero, zero, zero, zero, zero, zero, zero
    for i in range(n):
        u0, u1, u2, u3 = w0[i], w1[i], w2[i], w3[i]
        v = x0[i]
        a00 += u0 * v
        a01 += u1 * v
        a02 += u2 * v
        a03 += u3 * v
        v = x1[i]
        a10 += u0 * v
        a11 += u1 * v
        a12 += u2 * v
        a13 += u3 * v
        v = x2[i]
        a20 += u0 * v
        a21 += u1 * v
        a22 += u2 * v
        a23 += u3 * v
        v = x3[i]
        a30 += u0 * v
        a31 += u1 * v
        a32 += u2 * v
        a33 += u3 * v
    o = floats(out + 4 * (stride * y0 + first), 4)
    o[0], o[1], o[2], o[3] = a00, a01, a02, a03
    o = floats(out + 4 * (stride * y1 + first), 4)
    o[0], o[1], o[2], o[3] = a10, a11, a12, a13
    o = floats(out + 4 * (stride * y2 + first), 4)
    o[0], o[1], o[2], o[3] = a20, a21, a22, a23
    o = floats(out + 4 * (stride * y3 + first), 4)
    o[0], o[1], o[2], o[3] = a30, a31, a32, a33


@piece
def _one_by_one(out, stride, r, y, w, x, n):
    total = np.float32(0)
    for i in range(n):
        total += w[i] * x[i]
    floats(out + 4 * (stride * y + r), 1)[0] = total


@piece
def _tile(out, stride, first, n_rows, tile, x, cols, inputs, outputs, n):
    """Multiply the unpacked rows `tile` [n_rows, cols] with `n` tokens: x row inputs[j] -> out row outputs[j]."""
    for j in range(0, n - n % 4, 4):
        x0, x1 = floats(x + 4 * cols * inputs[j], cols), floats(x + 4 * cols * inputs[j + 1], cols)
        x2, x3 = floats(x + 4 * cols * inputs[j + 2], cols), floats(x + 4 * cols * inputs[j + 3], cols)
        for r in range(0, n_rows - n_rows % 4, 4):
            _tile_4x4(
                out, stride, first + r, outputs[j], outputs[j + 1], outputs[j + 2], outputs[j + 3],
                tile[r], tile[r + 1], tile[r + 2], tile[r + 3], x0, x1, x2, x3, cols,
            )  # fmt: skip
        for r in range(n_rows - n_rows % 4, n_rows):
            _one_by_one(out, stride, first + r, outputs[j], tile[r], x0, cols)
            _one_by_one(out, stride, first + r, outputs[j + 1], tile[r], x1, cols)
            _one_by_one(out, stride, first + r, outputs[j + 2], tile[r], x2, cols)
            _one_by_one(out, stride, first + r, outputs[j + 3], tile[r], x3, cols)
    for j in range(n - n % 4, n):
        xj = floats(x + 4 * cols * inputs[j], cols)
        for r in range(n_rows):
            _one_by_one(out, stride, first + r, outputs[j], tile[r], xj, cols)


@piece
def multiply(quant, out, stride, weight, row_bytes, first, last, cols, x, inputs, outputs, n, tile):
    """Rows first..last of W by `n` tokens: out[outputs[j], r] = W[r] · x[inputs[j]]; `tile` is float32 [TILE, cols] scratch."""
    if n <= FEW:
        for r in range(first, last):
            w = row(weight + r * row_bytes, row_bytes)
            for j in range(n):
                xj = floats(x + 4 * cols * inputs[j], cols)
                floats(out + 4 * (stride * outputs[j] + r), 1)[0] = dot(quant, w, xj, cols)
        return
    for r in range(first, last, TILE):
        n_rows = min(TILE, last - r)
        for i in range(n_rows):
            unpack(quant, row(weight + (r + i) * row_bytes, row_bytes), tile[i], cols)
        _tile(out, stride, r, n_rows, tile, x, cols, inputs, outputs, n)


@piece
def _share(rows, part, parts):
    """First row of a thread's share: at a multiple of 4, so that no row's sum depends on the number of threads."""
    return rows if part == parts else rows * part // parts // 4 * 4


@piece
def _routed(quant, out, weights, row_bytes, table, starts, order, x, n_expert, shared_by, rows, cols, part, parts):
    """One thread's rows of every touched expert."""
    bounds, slots = ints(starts, n_expert + 1), ints(table, n_expert)
    pairs = ints(order, bounds[n_expert])
    most = 1
    for e in range(n_expert):
        most = max(most, bounds[e + 1] - bounds[e])
    tile = np.empty((TILE if most > FEW else 1, cols), np.float32)
    inputs, outputs = np.empty(most, np.int64), np.empty(most, np.int64)
    first, last = _share(rows, part, parts), _share(rows, part + 1, parts)
    for e in range(n_expert):
        n = bounds[e + 1] - bounds[e]
        if n == 0 or slots[e] < 0:
            continue
        for j in range(n):
            outputs[j] = pairs[bounds[e] + j]
            inputs[j] = outputs[j] // shared_by
        weight = longs(weights, slots[e] + 1)[slots[e]]
        multiply(quant, out, rows, weight, row_bytes, first, last, cols, x, inputs, outputs, n, tile)


@kernel("qiiiiiiiiiiii", parallel=True)
def matmul(quant, out, weights, row_bytes, table, starts, order, x, n_expert, shared_by, rows, cols, parts):
    """out[p] = W_{expert of p} · x[p // shared_by] for all routed pairs p, expert by expert, in `parts` shares of rows.

    `order` (int32) lists the pairs sorted by expert, those of expert e from starts[e] to starts[e + 1] (int32); `table` (int32)
    maps an expert to its slot, or -1: skipped; `weights` (int64) holds each slot's address. A pair is token·k + rank, so
    `shared_by` is k where pairs share their token's input, 1 where each has its own. A plain product is the case of one
    expert and k = 1.
    """
    for part in prange(parts):
        _routed(
            quant, out, weights, row_bytes, table, starts, order, x, n_expert, shared_by, rows, cols, part, parts
        )  # fmt: skip
