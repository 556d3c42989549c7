"""The experts' feed-forward: h = silu(gate · x)·(up · x), then out += weight·(down · h), for few tokens and for many.

A pair is token·k + rank: one expert for one token. `table` (int32) maps an expert to its slot, or -1: not done here; `gates`,
`ups` and `downs` (int64) hold each slot's address. Few tokens are done pair by pair; many expert by expert, each touched one
being read once. Either way a token's sum runs over its experts in ascending order, whatever the number of parts.
"""

import numpy as np

from ..quants.activations import quantize
from ..quants.activations import row_bytes as activation_bytes
from ..quants.blocks import row
from ..quants.vectors import load, store
from . import kernel, piece
from .matmul import input_bytes, row_bytes, row_product, share
from .scalar import floats, ints, longs, silu
from .tile import BATCH, INPUTS, ROWS, SUMS, SUMS_BYTES, aligned, product

BLOCK_BYTES = 48  # of an activation row of ROWS values
READ = 8  # what reading an expert's rows costs beside multiplying them, in tokens


@piece
def _matrix(addresses, slot):
    return longs(addresses, slot + 1)[slot]


@piece
def _swiglu(h, h_floats, pair, rows, first, gates, ups, block):
    """Rows first … first + ROWS - 1 of a pair's h from its `gates` and `ups`, float32 [ROWS]; `block` is scratch."""
    store(gates, 0, silu(load(gates, 0, ROWS)) * load(ups, 0, ROWS))
    if h_floats:
        n = min(ROWS, rows - first)
        out = floats(h + 4 * (pair * rows + first), n)
        for r in range(n):
            out[r] = gates[r]
        return
    quantize(gates, block)
    out = row(h + pair * activation_bytes(rows), activation_bytes(rows))
    store(out, first, load(block, 0, 32))
    store(out, rows + first // 8, load(block, 32, 4))
    store(out, rows + (rows + first) // 8, load(block, 36, 4))
    store(out, rows + (rows + first) // 4, load(block, 40, 8))


@kernel("qqqiiiiiiiiiiii")
def gate_up(gate_quant, up_quant, isa, h, h_floats, gates, ups, table, ids, x_gate, x_up, n_pairs, k, rows, cols, part, parts):
    """h[p] = silu(gate · x[p // k])·(up · x[p // k]) for each pair: float32 [n_pairs, rows] or activation rows.

    `x_gate` and `x_up` are x as each of the two types wants it. `parts` share the pairs and blocks of ROWS rows.
    """
    blocks, g_bytes, u_bytes = (rows + ROWS - 1) // ROWS, row_bytes(gate_quant, cols), row_bytes(up_quant, cols)
    begin, end = share(n_pairs * blocks, part, parts)
    g, u, block = np.zeros(ROWS, np.float32), np.zeros(ROWS, np.float32), np.empty(BLOCK_BYTES, np.uint8)
    for item in range(begin, end):
        pair, first = item // blocks, item % blocks * ROWS
        expert, token = ints(ids, n_pairs)[pair], pair // k
        slot = ints(table, expert + 1)[expert]
        if slot < 0:
            continue
        gate, up = _matrix(gates, slot) + first * g_bytes, _matrix(ups, slot) + first * u_bytes
        xg, xu = x_gate + token * input_bytes(gate_quant, cols), x_up + token * input_bytes(up_quant, cols)
        for r in range(min(ROWS, rows - first)):
            g[r] = row_product(gate_quant, isa, gate + r * g_bytes, xg, cols)
        for r in range(min(ROWS, rows - first)):
            u[r] = row_product(up_quant, isa, up + r * u_bytes, xu, cols)
        _swiglu(h, h_floats, pair, rows, first, g, u, block)


@piece
def _next_rank(ids, k, last):
    """The rank of the lowest expert after `last`, an expert·k + rank."""
    best = 0
    for rank in range(k):
        key, least = ids[rank] * k + rank, ids[best] * k + best
        if key > last and (key < least or least <= last):
            best = rank
    return best


@kernel("qqiiiiiiiiii")
def down(quant, isa, out, downs, table, ids, weights, h, n_tokens, k, rows, cols, part, parts):
    """out[t] += Σ weights[p]·(down · h[p]) over the token's pairs, in ascending order of experts; `parts` share the rows."""
    first, last = share(rows, part, parts)
    w_bytes, h_bytes = row_bytes(quant, cols), input_bytes(quant, cols)
    for token in range(n_tokens):
        chosen, o = ints(ids + 4 * token * k, k), floats(out + 4 * token * rows, rows)
        done = -1
        for _ in range(k):
            rank = _next_rank(chosen, k, done)
            expert, pair = chosen[rank], token * k + rank
            done = expert * k + rank
            slot = ints(table, expert + 1)[expert]
            if slot < 0:
                continue
            w, weight = _matrix(downs, slot), floats(weights, pair + 1)[pair]
            for r in range(first, last):
                o[r] += weight * row_product(quant, isa, w + r * w_bytes, h + pair * h_bytes, cols)


@kernel("iiii")
def group_by_expert(groups, ids, n_pairs, n_expert, part, parts):
    """Counting sort, by the first part alone. `groups` (int32) becomes starts [n_expert + 1], then order [n_pairs].

    The pairs of expert e, in token order, are order[starts[e] : starts[e + 1]].
    """
    if part > 0:
        return
    starts, order, chosen = ints(groups, n_expert + 1), ints(groups + 4 * (n_expert + 1), n_pairs), ints(ids, n_pairs)
    for e in range(n_expert + 1):
        starts[e] = 0
    for p in range(n_pairs):
        starts[chosen[p] + 1] += 1
    for e in range(n_expert):
        starts[e + 1] += starts[e]
    for p in range(n_pairs):
        e = chosen[p]
        order[starts[e]] = p
        starts[e] += 1
    for e in range(n_expert, 0, -1):
        starts[e] = starts[e - 1]
    starts[0] = 0


@piece
def _count(starts, slots, e):
    """The pairs of expert e that are done here."""
    return starts[e + 1] - starts[e] if slots[e] >= 0 else 0


@piece
def _place_inputs(quant, scratch, x, cols, order, first, n, shared_by):
    """Tell the tile where the inputs of pairs order[first : first + n] lie: `shared_by` pairs have one row of x."""
    inputs, x_bytes = longs(scratch + INPUTS, BATCH), input_bytes(quant, cols)
    for j in range(n):
        inputs[j] = x + order[first + j] // shared_by * x_bytes


@kernel("qqqiiiiiiiiiiii")
def gate_up_many(
    gate_quant, up_quant, isa, h, h_floats, gates, ups, table, groups, x_gate, x_up, n_expert, k, rows, cols, part, parts
):  # fmt: skip
    """`gate_up` for grouped pairs. `parts` share blocks of ROWS rows of the experts, by the tokens that each has."""
    memory, block = np.empty(SUMS + 2 * SUMS_BYTES + 63, np.uint8), np.empty(BLOCK_BYTES, np.uint8)
    scratch = aligned(memory)
    starts, slots = ints(groups, n_expert + 1), ints(table, n_expert)
    order = ints(groups + 4 * (n_expert + 1), starts[n_expert])
    blocks, g_bytes, u_bytes = (rows + ROWS - 1) // ROWS, row_bytes(gate_quant, cols), row_bytes(up_quant, cols)
    work, done = 0, 0  # of all parts; of experts before e
    for e in range(n_expert):
        count = _count(starts, slots, e)
        work += blocks * (READ + count) if count else 0
    begin, end = share(work, part, parts)
    for e in range(n_expert):
        if _count(starts, slots, e) == 0:
            continue
        cost = READ + starts[e + 1] - starts[e]
        # The blocks that begin within this part's share.
        first_block, last_block = -((done - begin) // cost), -((done - end) // cost)
        done += blocks * cost
        for b in range(max(first_block, 0), min(last_block, blocks)):
            first, n_rows = b * ROWS, min(ROWS, rows - b * ROWS)
            gate, up = _matrix(gates, slots[e]) + first * g_bytes, _matrix(ups, slots[e]) + first * u_bytes
            for p in range(starts[e], starts[e + 1], BATCH):
                n = min(BATCH, starts[e + 1] - p)
                _place_inputs(gate_quant, scratch, x_gate, cols, order, p, n, k)
                product(gate_quant, isa, scratch, scratch + SUMS, gate, n_rows, cols, n, up, ROWS * u_bytes)
                _place_inputs(up_quant, scratch, x_up, cols, order, p, n, k)
                sums, following = scratch + SUMS + SUMS_BYTES, gate + ROWS * g_bytes
                product(up_quant, isa, scratch, sums, up, n_rows, cols, n, following, ROWS * g_bytes)
                for j in range(n):
                    sums = scratch + SUMS + 4 * ROWS * j
                    _swiglu(h, h_floats, order[p + j], rows, first, floats(sums, ROWS), floats(sums + SUMS_BYTES, ROWS), block)


@kernel("qqiiiiiiiiii")
def down_many(quant, isa, out, downs, table, groups, weights, h, n_expert, k, rows, cols, part, parts):
    """`down` for grouped pairs; `parts` share the blocks of ROWS rows, and take the experts in ascending order."""
    memory = np.empty(SUMS + SUMS_BYTES + 63, np.uint8)
    scratch = aligned(memory)
    starts, slots = ints(groups, n_expert + 1), ints(table, n_expert)
    order, factors = ints(groups + 4 * (n_expert + 1), starts[n_expert]), floats(weights, starts[n_expert])
    w_bytes = row_bytes(quant, cols)
    begin, end = share((rows + ROWS - 1) // ROWS, part, parts)
    for first in range(begin * ROWS, min(end * ROWS, rows), ROWS):
        n_rows = min(ROWS, rows - first)
        for e in range(n_expert):
            if _count(starts, slots, e) == 0:
                continue
            following = e + 1
            while following < n_expert and _count(starts, slots, following) == 0:
                following += 1
            w = _matrix(downs, slots[e]) + first * w_bytes
            ahead = w if following == n_expert else _matrix(downs, slots[following]) + first * w_bytes
            for p in range(starts[e], starts[e + 1], BATCH):
                n = min(BATCH, starts[e + 1] - p)
                _place_inputs(quant, scratch, h, cols, order, p, n, 1)
                product(quant, isa, scratch, scratch + SUMS, w, n_rows, cols, n, ahead, n_rows * w_bytes)
                for j in range(n):
                    pair, sums = order[p + j], floats(scratch + SUMS + 4 * ROWS * j, ROWS)
                    o = floats(out + 4 * (pair // k * rows + first), n_rows)
                    for r in range(n_rows):
                        o[r] += factors[pair] * sums[r]
