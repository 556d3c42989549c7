"""Causal attention over a cache of any KV type, with grouped query heads and online softmax.

One work item is a KV head, up to BLOCK tokens and one of `splits` ranges of the cache. It walks its range TILE positions at a
time, unpacks their keys and values into float32 once, and multiplies them with every query of the item (tokens × query heads
of the group) as two small matrix products: the cache is read and converted once per item, not once per query. Few tokens
have few items, so their cache is split into ranges whose results `attention_combine` adds up: as many for one thread as for
sixteen. Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; split over the cache: Dao et al. 2023, flash-decoding.
"""

import numpy as np

from ..quants.blocks import row, unpack
from ..quants.vectors import load, store, total
from . import kernel, piece
from .microkernel import LANES, ROWS, SQUARE, add_product, transpose
from .scalar import LINE, exp, floats, ints, matrix, maximum, release, take

TILE = 64  # cache positions at a time: keys and values of 256 dimensions take 128 KB
BLOCK = 16  # tokens that share an unpacked tile
FEW = 16  # items that a call for few tokens is split into, if the cache is long enough
assert TILE % LANES == 0 and TILE % SQUARE == 0


def splits(n_tokens: int, n_head_kv: int) -> int:
    """Into how many ranges the cache should be split: a matter of sizes alone, so that no result depends on the threads."""
    return max(1, FEW // items(n_tokens, n_head_kv, 1))


def items(n_tokens: int, n_head_kv: int, splits: int) -> int:
    """Units of work of a call: a good number of parts."""
    return n_head_kv * -(-n_tokens // BLOCK) * splits


def scratch(n_tokens: int, n_head: int, d_v: int, splits: int) -> int:
    """Floats that `attention` writes for `attention_combine`."""
    return n_tokens * n_head * splits * (d_v + 2)


@piece
def _unpack_tile(quant, tile, address, step, row_bytes, n, d):
    """tile[s] = the row at address + s·step for s < n, and zeros after: a weight of 0 doesn't hide a NaN of unused memory."""
    for s in range(n):
        unpack(quant, row(address + s * step, row_bytes), tile[s], d)
    for s in range(n, tile.shape[0]):
        tile[s, :] = 0


@piece
def _weigh(scores, acc, state, n):
    """Turn a query's TILE scores, of which it may see the first `n`, into weights; updates acc and state = (maximum, sum)."""
    if n <= 0:
        scores[:] = 0
        return
    for s in range(n, TILE):
        scores[s] = -np.inf
    seen = load(scores, 0, TILE)
    largest = maximum(seen)
    if largest > state[0]:  # seldom, so that the processor guesses and does not wait for the maximum
        shrink = exp(state[0] - largest)
        state[0], state[1] = largest, state[1] * shrink
        for d in range(0, acc.size, LANES):
            store(acc, d, load(acc, d, LANES) * shrink)
    weights = exp(seen - state[0])
    store(scores, 0, weights)
    state[1] += total(weights)


@piece
def _visit(quant, work, keys, values, k_bytes, v_bytes, step, d_k, d_v, first, last, past, group, n_query):
    """Let the queries see the positions first..last of one KV head.

    The next tile's cache lines are asked for while this one's products are computed: hardware fetches ahead within a page
    only, and a tile spans many (measured: 1.5 times as quick).
    """
    query, k_rows, k_tile, v_tile, scores, acc, states = work
    k_step, v_step = step * k_bytes, step * v_bytes
    for start in range(first, last, TILE):
        n, k_start, v_start = min(last - start, TILE), keys + start * k_step, values + start * v_step
        for s in range(0, TILE, SQUARE):
            _unpack_tile(quant, k_rows, k_start + s * k_step, k_step, k_bytes, min(max(n - s, 0), SQUARE), d_k)
            transpose(k_tile[:, s : s + SQUARE], k_rows)
        _unpack_tile(quant, v_tile, v_start, v_step, v_bytes, n, d_v)
        scores[:, :] = 0
        add_product(scores, query, k_tile, k_start + TILE * k_step, k_step, k_bytes)
        for i in range(n_query):
            _weigh(scores[i], acc[i], states[i], past + i // group + 1 - start)
        add_product(acc, scores, v_tile, v_start + TILE * v_step, v_step, v_bytes)


@piece
def _begin(query, acc, states, q, first, head, n_head, group, n_query, d_k, scale):
    """Fetch the queries, scaled; rows that only fill up a register tile are 0."""
    query[n_query:, :d_k], acc[:, :] = 0, 0
    states[:, 0], states[:, 1] = -np.inf, 0
    for i in range(n_query):
        source = floats(q + 4 * ((first + i // group) * n_head + head * group + i % group) * d_k, d_k)
        for d in range(d_k):
            query[i, d] = source[d] * scale


@piece
def _finish(out, acc, states, first, head, n_head, group, n_query, d_v, splits, split):
    """Write the result, or what `attention_combine` needs of a split one."""
    for i in range(n_query):
        at = (first + i // group) * n_head + head * group + i % group
        if splits == 1:
            o, inverse = floats(out + 4 * at * d_v, d_v), np.float32(1) / states[i, 1]
        else:
            o, inverse = floats(out + 4 * (at * splits + split) * (d_v + 2), d_v + 2), np.float32(1)
            o[d_v], o[d_v + 1] = states[i, 0], states[i, 1]
        for d in range(d_v):
            o[d] = acc[i, d] * inverse


@kernel("qiiiiiiiiiiiiif")
def attention(
    quant, out, q, keys, values, k_bytes, v_bytes, pos, n_tokens, n_head, n_head_kv, d_k, d_v, splits, scale, part, parts
):  # fmt: skip
    """out [n_tokens, n_head, d_v] for q [n_tokens, n_head, d_k]; token t sees cache positions 0 .. pos + t.

    The caches are [n_ctx, n_head_kv, k_bytes] and [n_ctx, n_head_kv, v_bytes]. With several splits, `out` is the scratch
    [n_tokens, n_head, splits, d_v + 2]: of each range the weighted sum, the largest score and the sum of the weights.
    """
    group, past, blocks = n_head // n_head_kv, ints(pos, 1)[0], (n_tokens + BLOCK - 1) // BLOCK
    most = (min(n_tokens, BLOCK) * group + ROWS - 1) // ROWS * ROWS
    wide_k, wide_v = (d_k + SQUARE - 1) // SQUARE * SQUARE, (d_v + LANES - 1) // LANES * LANES
    size = wide_k * (most + SQUARE + TILE) + wide_v * (TILE + most) + most * (TILE + 2)
    memory = np.empty(size + 7 * LINE, np.float32)
    query, rest = take(memory.ctypes.data, most, wide_k)
    k_rows, rest = take(rest, SQUARE, wide_k)
    k_tile, rest = take(rest, wide_k, TILE)
    v_tile, rest = take(rest, TILE, wide_v)
    scores, rest = take(rest, most, TILE)
    acc, rest = take(rest, most, wide_v)
    states, rest = take(rest, most, 2)
    query[:, d_k:], k_rows[:, d_k:], v_tile[:, d_v:] = 0, 0, 0  # heads may be narrower than the tiles
    work = query, k_rows, k_tile, v_tile, scores, acc, states
    for item in range(part, n_head_kv * blocks * splits, parts):
        # The last tokens see most and come first.
        block, head, split = blocks - 1 - item // (n_head_kv * splits), item // splits % n_head_kv, item % splits
        first, last = block * BLOCK, min(block * BLOCK + BLOCK, n_tokens)
        tiles, n_query = (past + last + TILE - 1) // TILE, (last - first) * group
        _begin(query, acc, states, q, first, head, n_head, group, n_query, d_k, np.float32(scale))
        _visit(
            quant, work, keys + head * k_bytes, values + head * v_bytes, k_bytes, v_bytes, n_head_kv, d_k, d_v,
            tiles * split // splits * TILE, min(tiles * (split + 1) // splits * TILE, past + last), past + first, group, n_query,
        )  # fmt: skip
        _finish(out, acc, states, first, head, n_head, group, n_query, d_v, splits, split)
    release(memory)


@kernel("iiiii")
def attention_combine(out, partial, n_rows, d_v, splits, part, parts):
    """out [n_rows, d_v] from what `attention` left for each range [n_rows, splits, d_v + 2]."""
    for r in range(part, n_rows, parts):
        o, ranges = floats(out + 4 * r * d_v, d_v), matrix(partial + 4 * r * splits * (d_v + 2), splits, d_v + 2)
        largest, weights = np.float32(-np.inf), np.float32(0)
        for s in range(splits):
            largest = max(largest, ranges[s, d_v])
        o[:] = 0
        for s in range(splits):
            weight = exp(ranges[s, d_v] - largest)
            weights += ranges[s, d_v + 1] * weight
            for d in range(d_v):
                o[d] += ranges[s, d] * weight
        inverse = np.float32(1) / weights
        for d in range(d_v):
            o[d] *= inverse
