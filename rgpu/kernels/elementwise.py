"""The small verbs: rows of floats in, rows of floats out, a row at a time by whichever part it falls to.

`x_stride` and the like are the distances between rows in floats, so that a view of every second half-row needs no copy. Where
the next product wants its input as int8, `q8` is the address of the activation rows (quants/activations.py), else 0. Loops go
by explicit lanes, because LLVM gives up its own vectors where `out` is also an input.
"""

import math

import numpy as np

from ..quants.activations import quantize, row_bytes
from ..quants.blocks import pack, row, unpack
from ..quants.vectors import load, store
from . import kernel, piece
from .scalar import LANES, exp, floats, ints, sigmoid, silu, squares

BLOCK = 1024  # floats that a part takes at a time where there are no rows


@piece
def _activations(q8, r, x):
    """Keep row `r` as int8 too, where it is wanted."""
    if q8:
        quantize(x, row(q8 + r * row_bytes(x.size), row_bytes(x.size)))


@piece
def _scale(x, eps):
    """1 / sqrt(mean(x²) + eps)."""
    return np.float32(1) / np.sqrt(squares(x) / np.float32(x.size) + np.float32(eps))


@piece
def _norm(out, x, weight, eps):
    scale, whole = _scale(x, eps), x.size - x.size % LANES
    for i in range(0, whole, LANES):
        store(out, i, load(x, i, LANES) * scale * load(weight, i, LANES))
    for i in range(whole, x.size):
        out[i] = x[i] * scale * weight[i]


@piece
def _add(out, x):
    whole = x.size - x.size % LANES
    for i in range(0, whole, LANES):
        store(out, i, load(out, i, LANES) + load(x, i, LANES))
    for i in range(whole, x.size):
        out[i] += x[i]


@kernel("qiiiiii")
def embed(quant, out, weight, table_row, tokens, n_tokens, n_embd, part, parts):
    """out[t] = row tokens[t] of the table; token ids are int32."""
    ids = ints(tokens, n_tokens)
    for t in range(part, n_tokens, parts):
        unpack(quant, row(weight + ids[t] * table_row, table_row), floats(out + 4 * t * n_embd, n_embd), n_embd)


@kernel("iiiiiiif")
def rms_norm(out, x, x_stride, weight, n_rows, n, q8, eps, part, parts):
    """out[r] = x[r] / sqrt(mean(x[r]²) + eps) · weight; may work in place."""
    for r in range(part, n_rows, parts):
        o = floats(out + 4 * r * n, n)
        _norm(o, floats(x + 4 * r * x_stride, n), floats(weight, n), eps)
        _activations(q8, r, o)


@kernel("iiiiii")
def swiglu(out, gate, up, n_rows, n, q8, part, parts):
    """out[r] = silu(gate[r])·up[r], elementwise; may work in place."""
    whole = n - n % LANES
    for r in range(part, n_rows, parts):
        o, g, u = floats(out + 4 * r * n, n), floats(gate + 4 * r * n, n), floats(up + 4 * r * n, n)
        for i in range(0, whole, LANES):
            store(o, i, silu(load(g, i, LANES)) * load(u, i, LANES))
        for i in range(whole, n):
            o[i] = silu(g[i]) * u[i]
        _activations(q8, r, o)


@piece
def _gate(out, x, g):
    whole = x.size - x.size % LANES
    for i in range(0, whole, LANES):
        store(out, i, load(x, i, LANES) * sigmoid(load(g, i, LANES)))
    for i in range(whole, x.size):
        out[i] = x[i] * sigmoid(g[i])


@kernel("iiiiiiii")
def gate(out, x, g, g_stride, n_rows, n_head, n, q8, part, parts):
    """out[r, h] = x[r, h]·sigmoid(g[r, h]), elementwise; x, out [n_rows, n_head, n]; may work in place."""
    for r in range(part, n_rows, parts):
        for i in range(r * n_head, (r + 1) * n_head):
            _gate(floats(out + 4 * i * n, n), floats(x + 4 * i * n, n), floats(g + 4 * i * g_stride, n))
        _activations(q8, r, floats(out + 4 * r * n_head * n, n_head * n))


@kernel("iiiiii")
def gate_rows(out, x, g, g_stride, n_rows, n, part, parts):
    """out[r] = x[r]·sigmoid(g[r]) with one gate value per row; may work in place."""
    whole = n - n % LANES
    for r in range(part, n_rows, parts):
        o, xr = floats(out + 4 * r * n, n), floats(x + 4 * r * n, n)
        scale = sigmoid(floats(g + 4 * r * g_stride, 1)[0])
        for i in range(0, whole, LANES):
            store(o, i, load(xr, i, LANES) * scale)
        for i in range(whole, n):
            o[i] = xr[i] * scale


@kernel("iii")
def add(out, x, n, part, parts):
    """out += x."""
    for start in range(part * BLOCK, n, parts * BLOCK):
        size = min(n - start, BLOCK)
        _add(floats(out + 4 * start, size), floats(x + 4 * start, size))


@kernel("iii")
def copy(out, x, n, part, parts):
    """out = x, n words of 4 bytes; done by one part."""
    if part == 0:
        to, source = ints(out, n), ints(x, n)
        for i in range(n):
            to[i] = source[i]


@kernel("ii")
def zero(out, n, part, parts):
    for start in range(part * BLOCK, n, parts * BLOCK):
        floats(out + 4 * start, min(n - start, BLOCK))[:] = 0


@kernel("iiiiiii")
def rope(x, pos, freqs, n_tokens, n_head, head_dim, n_rot, part, parts):
    """Rotate pairs (i, i + n_rot/2) of each head by (pos + t)·freqs[i], in place; dimensions from n_rot on stay."""
    half = n_rot // 2
    f, first = floats(freqs, half), ints(pos, 1)[0]
    cos, sin = np.empty(half, np.float32), np.empty(half, np.float32)
    for t in range(part, n_tokens, parts):
        for i in range(half):
            angle = np.float32(first + t) * f[i]
            cos[i], sin[i] = math.cos(angle), math.sin(angle)
        for h in range(n_head):
            head = floats(x + 4 * (t * n_head + h) * head_dim, head_dim)
            for i in range(half):
                a, b = head[i], head[i + half]
                head[i], head[i + half] = a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]


@kernel("qiiiiiii")
def store_kv(quant, cache, cache_row, x, pos, n_tokens, n_head, head_dim, part, parts):
    """Quantise x [n_tokens, n_head, head_dim] into rows pos·n_head … of the cache [n_ctx, n_head, cache_row bytes]."""
    first = ints(pos, 1)[0] * n_head
    for r in range(part, n_tokens * n_head, parts):
        xr = floats(x + 4 * r * head_dim, head_dim)
        pack(quant, xr, row(cache + (first + r) * cache_row, cache_row), head_dim)


@kernel("iiiiiiii")
def route(ids, weights, logits, near, n_tokens, n_expert, k, n_near, part, parts):
    """The k largest softmax probabilities of each row (ties: the lower id), divided by their sum; `near`: the n_near next ids.

    A logit and its expert become one integer that orders like the logit, then by falling id: each of the k passes is a plain
    maximum, which LLVM vectorises.
    """
    keys = np.empty(n_expert, np.int64)
    for t in range(part, n_tokens, parts):
        bits, logit = ints(logits + 4 * t * n_expert, n_expert), floats(logits + 4 * t * n_expert, n_expert)
        chosen, w = ints(ids + 4 * t * k, k), floats(weights + 4 * t * k, k)
        for e in range(n_expert):
            # Floats order as sign and magnitude; so -0 and 0 are equal, and NaN is the largest and comes out.
            order = np.int64(bits[e]) if bits[e] >= 0 else -np.int64(bits[e] & 0x7FFFFFFF)
            keys[e] = (order << 32) + (n_expert - 1 - e)
        sum_ = np.float32(0)
        for rank in range(k):
            best = keys[0]
            for e in range(1, n_expert):
                best = max(best, keys[e])
            chosen[rank] = n_expert - 1 - (best & 0xFFFFFFFF)
            keys[chosen[rank]] = np.iinfo(np.int64).min
            # Softmax divides all by one sum, which the renormalisation cancels: exp of the chosen logits is enough.
            w[rank] = exp(logit[chosen[rank]] - logit[chosen[0]])
            sum_ += w[rank]
        for rank in range(k):
            w[rank] /= sum_
        missed = ints(near + 4 * t * n_near, n_near)
        for rank in range(n_near):
            best = keys[0]
            for e in range(1, n_expert):
                best = max(best, keys[e])
            missed[rank] = n_expert - 1 - (best & 0xFFFFFFFF)
            keys[missed[rank]] = np.iinfo(np.int64).min
