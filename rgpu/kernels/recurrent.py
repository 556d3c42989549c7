"""The recurrent half of a hybrid model: short causal convolution, and the gated delta rule in two forms.

Delta rule, per V head, with state S [d_k, d_v], decay exp(g) and step beta (Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464):
S ← exp(g)·S;  d = beta·(v - Sᵀk);  S ← S + k dᵀ;  o = Sᵀq. A few tokens are done one by one, bound by reading S; longer
inputs in chunks of up to CHUNK tokens, where products with S serve a whole chunk and the dependence inside it is a triangular
solve. Heads are independent: they are the units that parts share.
"""

import math

import numpy as np

from ..quants.vectors import fma, full, load, store, zeros
from . import kernel, piece
from .microkernel import LANES, ROWS, SQUARE, add_product, transpose
from .scalar import LINE, exp, floats, matrix, release, sigmoid, silu, squares, take

CHUNK = 32  # a multiple of LANES
FEW = 4  # up to so many tokens the step form is quicker
BLOCK = 256  # channels of the convolution that a part takes at a time


@piece
def _copy(to, x):
    for i in range(x.size):
        to[i] = x[i]


@piece
def _inputs(x, tail, t, channels, taps, first, size):
    """`size` inputs of time `t` from channel `first` on; those before this call (t < 0) are in `tail`, oldest first."""
    return floats((x + 4 * t * channels if t >= 0 else tail + 4 * (taps - 1 + t) * channels) + 4 * first, size)


@piece
def _by_tap(w, weight, taps, size):
    """w[j, c] = weight[c, j] for `size` channels; w [taps, BLOCK] and weight flat."""
    if taps == 4:  # as in all known models: a distance that LLVM knows is five times as quick
        for c in range(size):
            w[c], w[BLOCK + c], w[2 * BLOCK + c], w[3 * BLOCK + c] = (
                weight[4 * c], weight[4 * c + 1], weight[4 * c + 2], weight[4 * c + 3]
            )  # fmt: skip
        return
    for j in range(taps):
        for c in range(size):
            w[j * BLOCK + c] = weight[c * taps + j]


@piece
def _convolve(out, x, w, tail, n_tokens, channels, taps, first, size):
    """`size` channels from `first` on, with their weights w [taps, BLOCK], flat."""
    whole = size - size % LANES
    for t in range(n_tokens):
        o = floats(out + 4 * (t * channels + first), size)
        for c in range(0, whole, LANES):
            total = zeros(LANES)
            for j in range(taps):
                source = _inputs(x, tail, t - taps + 1 + j, channels, taps, first, size)
                total = fma(load(w, j * BLOCK + c, LANES), load(source, c, LANES), total)
            store(o, c, silu(total))
        for c in range(whole, size):
            sum_ = np.float32(0)
            for j in range(taps):
                sum_ += w[j * BLOCK + c] * _inputs(x, tail, t - taps + 1 + j, channels, taps, first, size)[c]
            o[c] = silu(sum_)
    for j in range(taps - 1):
        last = _inputs(x, tail, n_tokens - taps + 1 + j, channels, taps, first, size)
        _copy(floats(tail + 4 * (j * channels + first), size), last)


@kernel("iiiiiii")
def short_conv(out, x, weight, tail, n_tokens, channels, taps, part, parts):
    """out[t, c] = silu(Σ_j weight[c, j] · x[t - taps + 1 + j, c]); inputs before the first come from `tail`, which moves on.

    x, out [n_tokens, channels]; weight [channels, taps]; tail [taps - 1, channels] holds the last inputs, oldest first.
    """
    w = np.empty(taps * BLOCK, np.float32)
    for first in range(part * BLOCK, channels, parts * BLOCK):
        size = min(channels - first, BLOCK)
        _by_tap(w, floats(weight + 4 * taps * first, taps * size), taps, size)
        _convolve(out, x, w, tail, n_tokens, channels, taps, first, size)


@piece
def _normalise(to, x, scale, eps):
    """to = x / |x| · scale."""
    factor, whole = scale / max(np.sqrt(squares(x)), eps), x.size - x.size % LANES
    for i in range(0, whole, LANES):
        store(to, i, load(x, i, LANES) * factor)
    for i in range(whole, x.size):
        to[i] = x[i] * factor


@piece
def _softplus(x):
    return x if x > np.float32(20) else np.float32(math.log1p(math.exp(x)))


@piece
def _step(S, q, k, v, decay, beta, o, delta):
    """One token: S, o are written; `delta` [d_v] is scratch.

    Sᵀk and Sᵀq of the old state come from one pass over it; o = exp(g)·Sᵀq + (k·q)·d then needs no second look at S. ROWS
    rows at a time, by a loop of constant length: without it LLVM stores both sums after each row, at half the speed.
    """
    d_k, d_v = S.shape
    both = np.float32(0)
    for i in range(d_k):
        both += k[i] * q[i]
    delta[:], o[:] = 0, 0
    for first in range(0, d_k, ROWS):
        for j in range(0, d_v, SQUARE):
            seen, asked = load(delta, j, SQUARE), load(o, j, SQUARE)
            for i in range(first, first + ROWS):
                row = load(S[i], j, SQUARE)
                seen, asked = fma(full(k[i], SQUARE), row, seen), fma(full(q[i], SQUARE), row, asked)
            store(delta, j, seen)
            store(o, j, asked)
    for j in range(d_v):
        delta[j] = beta * (v[j] - decay * delta[j])
        o[j] = decay * o[j] + both * delta[j]
    for i in range(d_k):
        for j in range(0, d_v, SQUARE):
            store(S[i], j, fma(full(k[i], SQUARE), load(delta, j, SQUARE), load(S[i], j, SQUARE) * decay))


@piece
def _scaled(to, x, factors):
    """to[i] = factors[i]·x[i], row by row."""
    for i in range(x.shape[0]):
        for j in range(0, x.shape[1], SQUARE):
            store(to[i], j, load(x[i], j, SQUARE) * factors[i])


@piece
def _pairs(kk, qk, q, k, kt, g, beta):
    """kk_ij = -beta_i·(k_i·k_j)·exp(g_i - g_j) for j < i, qk_ij = (q_i·k_j)·exp(g_i - g_j) for j <= i, else 0 up to ROWS."""
    m = len(k)
    transpose(kt[:, :m], k)
    kk[:, :], qk[:, :] = 0, 0
    for c in range(0, m, LANES):
        add_product(kk[c:, c : c + LANES], k[c:], kt[:, c : c + LANES])
        add_product(qk[c:, c : c + LANES], q[c:], kt[:, c : c + LANES])
    for i in range(m):
        for j in range(0, i + 1, SQUARE):
            decay = exp(full(g[i], SQUARE) - load(g, j, SQUARE))
            store(qk[i], j, load(qk[i], j, SQUARE) * decay)
            store(kk[i], j, load(kk[i], j, SQUARE) * decay * -beta[i])
        for j in range(i + 1, i // ROWS * ROWS + ROWS):
            qk[i, j] = 0


@piece
def _chunk(S, q, k, v, g, beta, o, work, factors):
    """m tokens at once: q, k [m, d_k], v, o [m, d_v], g the running sum of the decays and beta [m].

    With D_ij = exp(g_i - g_j): V' solves (I + strictly_lower(beta_i k_i·k_j D_ij)) V' = beta (v - exp(g) S₀ᵀk); then
    o_i = exp(g_i) S₀ᵀq_i + Σ_{j<=i} (q_i·k_j) D_ij V'_j and S = exp(g_C) S₀ + Σ_i exp(g_C - g_i) k_i V'_iᵀ. V' replaces v.
    """
    m, d_v = v.shape
    kk, qk, scaled, kt = work
    kk, qk, scaled = kk[:m], qk[:m], scaled[:m]
    _pairs(kk, qk, q, k, kt, g, beta)
    _scaled(v, v, beta)
    for i in range(m):
        factors[i] = -beta[i] * exp(g[i])
    _scaled(scaled, k, factors)
    add_product(v, scaled, S)
    for i in range(m):
        factors[i] = exp(g[i])
    _scaled(scaled, q, factors)
    o[:, :] = 0
    add_product(o, scaled, S)
    for b in range(0, m, ROWS):
        add_product(v[b : b + ROWS], kk[b : b + ROWS, :b], v[:b])
        for i in range(b + 1, b + ROWS):
            for d in range(0, d_v, LANES):
                total = load(v[i], d, LANES)
                for j in range(b, i):
                    total = fma(full(kk[i, j], LANES), load(v[j], d, LANES), total)
                store(v[i], d, total)
        add_product(o[b : b + ROWS], qk[b : b + ROWS, : b + ROWS], v[: b + ROWS])
    for i in range(m):
        factors[i] = exp(g[m - 1] - g[i])
    _scaled(scaled, k, factors)
    final = exp(g[m - 1])
    for i in range(S.shape[0]):
        for d in range(0, d_v, LANES):
            store(S[i], d, load(S[i], d, LANES) * final)
    add_product(S, scaled.T, v)


@piece
def _head(out, qkv, alpha, beta, a, dt_bias, S, n_tokens, n_k_head, n_v_head, eps, h, size, tensors, work):
    """All tokens of V head `h`, `size` at a time."""
    q, k, v, o, rows = tensors
    g, b = rows[0], rows[1]
    d_k, d_v = S.shape
    channels, k_head = 2 * n_k_head * d_k + n_v_head * d_v, h % n_k_head
    rate, shift = floats(a, n_v_head)[h], floats(dt_bias, n_v_head)[h]
    for start in range(0, n_tokens, size):
        n = min(size, n_tokens - start)
        for i in range(n):
            token = qkv + 4 * (start + i) * channels
            _normalise(q[i], floats(token + 4 * k_head * d_k, d_k), np.float32(1 / math.sqrt(d_k)), eps)
            _normalise(k[i], floats(token + 4 * (n_k_head + k_head) * d_k, d_k), np.float32(1), eps)
            _copy(v[i], floats(token + 4 * (2 * n_k_head * d_k + h * d_v), d_v))
            at = 4 * ((start + i) * n_v_head + h)
            g[i] = rate * _softplus(floats(alpha + at, 1)[0] + shift)
            b[i] = sigmoid(floats(beta + at, 1)[0])
        if size == 1:
            _step(S, q[0], k[0], v[0], exp(g[0]), b[0], o[0], rows[3][:d_v])
        else:
            m = (n + SQUARE - 1) // SQUARE * SQUARE
            q[n:m, :], k[n:m, :], v[n:m, :], b[n:m], g[n:m] = 0, 0, 0, 0, 0
            for i in range(1, m):
                g[i] += g[i - 1]
            _chunk(S, q[:m], k[:m], v[:m], g[:m], b[:m], o[:m], work, rows[2])
        for i in range(n):
            _copy(floats(out + 4 * ((start + i) * n_v_head + h) * d_v, d_v), o[i])


@kernel("iiiiiiiiiiiif")
def delta_rule(out, qkv, alpha, beta, a, dt_bias, state, n_tokens, n_k_head, n_v_head, d_k, d_v, eps, part, parts):
    """out [n_tokens, n_v_head, d_v] from qkv [n_tokens, 2·n_k_head·d_k + n_v_head·d_v] (q, k, v after the convolution).

    alpha, beta [n_tokens, n_v_head] are raw: g = a·softplus(alpha + dt_bias), beta = sigmoid(beta); a, dt_bias [n_v_head];
    state [n_v_head, d_k, d_v] is read and written. q and k are normalised per head, q also divided by sqrt(d_k); V head h
    uses K head h mod n_k_head. d_k and d_v are multiples of SQUARE.
    """
    size = CHUNK if n_tokens > FEW and d_v % LANES == 0 else 1
    row = max(size, d_v)
    memory = np.empty(size * (4 * d_k + 2 * d_v + 2 * size) + 4 * row + 10 * LINE, np.float32)
    q, rest = take(memory.ctypes.data, size, d_k)
    k, rest = take(rest, size, d_k)
    v, rest = take(rest, size, d_v)
    o, rest = take(rest, size, d_v)
    rows, rest = take(rest, 4, row)
    kk, rest = take(rest, size, size)
    qk, rest = take(rest, size, size)
    scaled, rest = take(rest, size, d_k)
    kt, rest = take(rest, d_k, size)
    for h in range(part, n_v_head, parts):
        S = matrix(state + 4 * h * d_k * d_v, d_k, d_v)
        _head(
            out, qkv, alpha, beta, a, dt_bias, S, n_tokens, n_k_head, n_v_head, np.float32(eps), h, size,
            (q, k, v, o, rows), (kk, qk, scaled, kt),
        )  # fmt: skip
    release(memory)
