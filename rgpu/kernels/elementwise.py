"""The small verbs: rows of floats in, rows of floats out. Serial: the longest touches a few MB, a barrier costs as much.

`x_stride` and the like are the distances between rows in floats, so that a view of every second half-row needs no copy.
"""

import math

import numpy as np

from ..quants.blocks import pack, row, unpack
from . import kernel
from .scalar import exp, floats, ints, sigmoid, silu


@kernel("qiiiiii")
def embed(quant, out, weight, row_bytes, tokens, n_tokens, n_embd):
    """out[t] = row tokens[t] of the table; token ids are int32."""
    ids = ints(tokens, n_tokens)
    for t in range(n_tokens):
        unpack(quant, row(weight + ids[t] * row_bytes, row_bytes), floats(out + 4 * t * n_embd, n_embd), n_embd)


@kernel("iiiiiif")
def rms_norm(out, x, x_stride, weight, n_rows, n, eps):
    """out[r] = x[r] / sqrt(mean(x[r]²) + eps) · weight; may work in place."""
    w = floats(weight, n)
    for r in range(n_rows):
        xr, outr = floats(x + 4 * r * x_stride, n), floats(out + 4 * r * n, n)
        total = np.float32(0)
        for i in range(n):
            total += xr[i] * xr[i]
        scale = np.float32(1) / np.sqrt(total / np.float32(n) + np.float32(eps))
        for i in range(n):
            outr[i] = xr[i] * scale * w[i]


@kernel("iiii")
def swiglu(out, gate, up, n):
    """out = silu(gate)·up, elementwise; may work in place."""
    o, g, u = floats(out, n), floats(gate, n), floats(up, n)
    for i in range(n):
        o[i] = silu(g[i]) * u[i]


@kernel("iiiiii")
def gate(out, x, g, g_stride, n_rows, n):
    """out[r] = x[r]·sigmoid(g[r]), elementwise; may work in place."""
    for r in range(n_rows):
        o, xr, gr = floats(out + 4 * r * n, n), floats(x + 4 * r * n, n), floats(g + 4 * r * g_stride, n)
        for i in range(n):
            o[i] = xr[i] * sigmoid(gr[i])


@kernel("iiiiii")
def gate_rows(out, x, g, g_stride, n_rows, n):
    """out[r] = x[r]·sigmoid(g[r]) with one gate value per row."""
    for r in range(n_rows):
        o, xr = floats(out + 4 * r * n, n), floats(x + 4 * r * n, n)
        scale = sigmoid(floats(g + 4 * r * g_stride, 1)[0])
        for i in range(n):
            o[i] = xr[i] * scale


@kernel("iii")
def add(out, x, n):
    """out += x."""
    o, a = floats(out, n), floats(x, n)
    for i in range(n):
        o[i] += a[i]


@kernel("ii")
def zero(out, n):
    o = floats(out, n)
    for i in range(n):
        o[i] = 0


@kernel("iiiiiii")
def rope(x, pos, freqs, n_tokens, n_head, head_dim, n_rot):
    """Rotate pairs (i, i + n_rot/2) of each head by (pos + t)·freqs[i], in place; dimensions from n_rot on stay."""
    half = n_rot // 2
    f, first = floats(freqs, half), ints(pos, 1)[0]
    cos, sin = np.empty(half, np.float32), np.empty(half, np.float32)
    for t in range(n_tokens):
        for i in range(half):
            angle = np.float32(first + t) * f[i]
            cos[i], sin[i] = math.cos(angle), math.sin(angle)
        for h in range(n_head):
            head = floats(x + 4 * (t * n_head + h) * head_dim, head_dim)
            for i in range(half):
                a, b = head[i], head[i + half]
                head[i], head[i + half] = a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]


@kernel("qiiiiiii")
def store_kv(quant, cache, row_bytes, x, pos, n_tokens, n_head, head_dim):
    """Quantise x [n_tokens, n_head, head_dim] into rows pos·n_head … of the cache [n_ctx, n_head, row_bytes]."""
    first = ints(pos, 1)[0] * n_head
    for r in range(n_tokens * n_head):
        xr = floats(x + 4 * r * head_dim, head_dim)
        pack(quant, xr, row(cache + (first + r) * row_bytes, row_bytes), head_dim)


@kernel("iiiiii")
def route(ids, weights, logits, n_tokens, n_expert, k):
    """The k largest softmax probabilities of each row (ties: the lower id), divided by their sum; the logits are spent."""
    for t in range(n_tokens):
        p = floats(logits + 4 * t * n_expert, n_expert)
        chosen, w = ints(ids + 4 * t * k, k), floats(weights + 4 * t * k, k)
        largest = np.float32(-np.inf)
        for e in range(n_expert):
            largest = max(largest, p[e])
        total = np.float32(0)
        for rank in range(k):
            # Softmax divides all by one sum, which the renormalisation cancels: exp of the chosen logits is enough.
            best = 0
            for e in range(1, n_expert):
                if p[e] > p[best]:
                    best = e
            chosen[rank] = best
            w[rank] = exp(p[best] - largest)
            total += w[rank]
            p[best] = -np.inf
        for rank in range(k):
            w[rank] /= total


@kernel("iiiii")
def group_by_expert(starts, order, ids, n_pairs, n_expert):
    """Counting sort: the pairs of expert e, in token order, are order[starts[e] : starts[e + 1]] (all int32)."""
    bounds, pairs, chosen = ints(starts, n_expert + 1), ints(order, n_pairs), ints(ids, n_pairs)
    for e in range(n_expert + 1):
        bounds[e] = 0
    for p in range(n_pairs):
        bounds[chosen[p] + 1] += 1
    for e in range(n_expert):
        bounds[e + 1] += bounds[e]
    for p in range(n_pairs):
        e = chosen[p]
        pairs[bounds[e]] = p
        bounds[e] += 1
    for e in range(n_expert, 0, -1):
        bounds[e] = bounds[e - 1]
    bounds[0] = 0


@kernel("iiiiiiiii")
def combine(out, y, weights, ids, table, order, n_pairs, k, n_embd):
    """out[p // k] += weights[p]·y[p] over the pairs whose expert has a slot, in `order`: each token sums by expert id."""
    pairs, w, chosen = ints(order, n_pairs), floats(weights, n_pairs), ints(ids, n_pairs)
    for j in range(n_pairs):
        p = pairs[j]
        if ints(table, chosen[p] + 1)[chosen[p]] >= 0:
            o, yp = floats(out + 4 * (p // k) * n_embd, n_embd), floats(y + 4 * p * n_embd, n_embd)
            for i in range(n_embd):
                o[i] += w[p] * yp[i]
