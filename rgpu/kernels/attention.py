"""Causal attention over a cache of any KV type, with grouped query heads and online softmax.

One work item is a KV head and up to BLOCK tokens. It walks the cache TILE positions at a time, unpacks their keys and values
into float32 once, and lets every query of the item (tokens × query heads of the group) use them: the cache is read and
converted once per item, not once per query. Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

import numpy as np
from numba import prange

from ..quants.blocks import row, unpack
from . import kernel, piece
from .scalar import exp, floats, ints

TILE = 64  # cache positions at a time: keys and values of 256 dimensions take 128 KB
BLOCK = 16  # tokens that share an unpacked tile


@piece
def _visit(query, keys, values, n, scale, scores, acc, state):
    """Let one query see `n` positions: updates acc and state = (running maximum, running sum)."""
    d_k, d_v = query.size, acc.size
    largest = state[0]
    for s in range(n):
        total = np.float32(0)
        for i in range(d_k):
            total += query[i] * keys[s, i]
        scores[s] = total * scale
        largest = max(largest, scores[s])
    shrink = exp(state[0] - largest)
    total = state[1] * shrink
    for i in range(d_v):
        acc[i] *= shrink
    for s in range(n):
        p = exp(scores[s] - largest)
        total += p
        for i in range(d_v):
            acc[i] += p * values[s, i]
    state[0], state[1] = largest, total


@piece
def _item(
    quant, out, q, keys, values, k_bytes, v_bytes, past, head, first, last, n_head, n_head_kv, d_k, d_v, scale
):  # fmt: skip
    """One KV head and the tokens first..last."""
    group = n_head // n_head_kv
    k_tile, v_tile = np.empty((TILE, d_k), np.float32), np.empty((TILE, d_v), np.float32)
    scores = np.empty(TILE, np.float32)
    n_query = (last - first) * group
    acc, states = np.zeros((n_query, d_v), np.float32), np.empty((n_query, 2), np.float32)
    for i in range(n_query):
        states[i, 0], states[i, 1] = -np.inf, 0
    for start in range(0, past + last, TILE):
        stop = min(start + TILE, past + last)
        for s in range(start, stop):
            at = s * n_head_kv + head
            unpack(quant, row(keys + at * k_bytes, k_bytes), k_tile[s - start], d_k)
            unpack(quant, row(values + at * v_bytes, v_bytes), v_tile[s - start], d_v)
        for t in range(first, last):
            n = min(stop, past + t + 1) - start
            if n > 0:
                for j in range(group):
                    i = (t - first) * group + j
                    query = floats(q + 4 * (t * n_head + head * group + j) * d_k, d_k)
                    _visit(query, k_tile, v_tile, n, scale, scores, acc[i], states[i])
    for i in range(n_query):
        o = floats(out + 4 * ((first + i // group) * n_head + head * group + i % group) * d_v, d_v)
        inverse = np.float32(1) / states[i, 1]
        for d in range(d_v):
            o[d] = acc[i, d] * inverse


@kernel("qiiiiiiiiiiiif", parallel=True)
def attention(
    quant, out, q, keys, values, k_bytes, v_bytes, pos, n_tokens, n_head, n_head_kv, d_k, d_v, scale
):  # fmt: skip
    """out [n_tokens, n_head, d_v] for q [n_tokens, n_head, d_k]; token t sees cache positions 0 .. pos + t.

    The caches are [n_ctx, n_head_kv, k_bytes] and [n_ctx, n_head_kv, v_bytes].
    """
    blocks = (n_tokens + BLOCK - 1) // BLOCK
    for item in prange(n_head_kv * blocks):
        head, first = item // blocks, item % blocks * BLOCK
        last = min(first + BLOCK, n_tokens)
        past = ints(pos, 1)[0]
        _item(
            quant, out, q, keys, values, k_bytes, v_bytes, past, head, first, last, n_head, n_head_kv, d_k, d_v,
            np.float32(scale),
        )  # fmt: skip
