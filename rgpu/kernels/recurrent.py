"""The recurrent half of a hybrid model: short causal convolution, and the gated delta rule in two forms.

Delta rule, per V head, with state S [d_k, d_v], decay exp(g) and step beta (Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464):
S ← exp(g)·S;  d = beta·(v - Sᵀk);  S ← S + k dᵀ;  o = Sᵀq. A few tokens are done one by one, bound by reading S; longer
inputs in chunks of CHUNK tokens, where products with S serve a whole chunk and the dependence inside it is a triangular solve.
Heads are independent: they are split over the threads.
"""

import math

import numpy as np
from numba import prange

from . import kernel, piece
from .scalar import exp, floats, sigmoid, silu

CHUNK = 32
FEW = 8  # up to so many tokens the step form is quicker


@piece
def _inputs(x, tail, at, channels, taps):
    """The inputs of time `at`; those before this call (at < 0) are in `tail`, oldest first."""
    return floats(x + 4 * at * channels if at >= 0 else tail + 4 * (taps - 1 + at) * channels, channels)


@piece
def _convolve(out, x, weight, tail, n_tokens, channels, taps, first, last):
    """Channels first..last."""
    w, total = floats(weight, channels * taps), np.empty(last - first, np.float32)
    for t in range(n_tokens):
        total[:] = 0
        for j in range(taps):
            source = _inputs(x, tail, t - taps + 1 + j, channels, taps)
            for c in range(first, last):
                total[c - first] += w[c * taps + j] * source[c]
        o = floats(out + 4 * t * channels, channels)
        for c in range(first, last):
            o[c] = silu(total[c - first])
    for j in range(taps - 1):
        to = floats(tail + 4 * j * channels, channels)
        source = _inputs(x, tail, n_tokens - taps + 1 + j, channels, taps)
        for c in range(first, last):
            to[c] = source[c]


@kernel("iiiiiiii", parallel=True)
def short_conv(out, x, weight, tail, n_tokens, channels, taps, parts):
    """out[t, c] = silu(Σ_j weight[c, j] · x[t - taps + 1 + j, c]); inputs before the first come from `tail`, which moves on.

    x, out [n_tokens, channels]; weight [channels, taps]; tail [taps - 1, channels] holds the last inputs, oldest first.
    """
    for part in prange(parts):
        _convolve(
            out, x, weight, tail, n_tokens, channels, taps, channels * part // parts, channels * (part + 1) // parts
        )  # fmt: skip


@piece
def _normalise(to, x, scale, eps):
    """to = x / |x| · scale."""
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * x[i]
    factor = scale / max(np.sqrt(total), eps)
    for i in range(x.size):
        to[i] = x[i] * factor


@piece
def _softplus(x):
    return x if x > np.float32(20) else np.float32(math.log1p(math.exp(x)))


@piece
def _multiply_add(out, a, b, sign):
    """out [m, n] += sign · a [m, k] · b [k, n], four rows of `out` at a time."""
    m, k, n = out.shape[0], a.shape[1], out.shape[1]
    for i in range(0, m - m % 4, 4):
        for r in range(k):
            a0, a1, a2, a3 = sign * a[i, r], sign * a[i + 1, r], sign * a[i + 2, r], sign * a[i + 3, r]
            for j in range(n):
                v = b[r, j]
                out[i, j] += a0 * v
                out[i + 1, j] += a1 * v
                out[i + 2, j] += a2 * v
                out[i + 3, j] += a3 * v
    for i in range(m - m % 4, m):
        for r in range(k):
            a0 = sign * a[i, r]
            for j in range(n):
                out[i, j] += a0 * b[r, j]


@piece
def _step(S, q, k, v, decay, beta, o, delta):
    """One token: S, o are written; `delta` [d_v] is scratch."""
    d_k, d_v = S.shape
    delta[:] = 0
    for i in range(d_k):
        for j in range(d_v):
            S[i, j] *= decay
            delta[j] += k[i] * S[i, j]
    for j in range(d_v):
        delta[j] = beta * (v[j] - delta[j])
        o[j] = 0
    for i in range(d_k):
        for j in range(d_v):
            S[i, j] += k[i] * delta[j]
            o[j] += q[i] * S[i, j]


@piece
def _chunk(S, q, k, v, g, beta, o, work, pairs):
    """C tokens at once: q, k [C, d_k], v, o [C, d_v], g the decays' running sum and beta [C]; work [C, d_v], pairs [C, C].

    With D_ij = exp(g_i - g_j): V' solves (I + strictly_lower(beta_i k_i·k_j D_ij)) V' = beta (v - exp(g) S₀ᵀk); then
    o_i = exp(g_i) S₀ᵀq_i + Σ_{j<=i} (q_i·k_j) D_ij V'_j and S = exp(g_C) S₀ + Σ_i exp(g_C - g_i) k_i V'_iᵀ.
    """
    n, d_k = k.shape
    work[:, :] = 0
    _multiply_add(work, k, S, np.float32(1))
    for i in range(n):
        decay = exp(g[i])
        for j in range(work.shape[1]):
            work[i, j] = beta[i] * (v[i, j] - decay * work[i, j])
    for i in range(n):
        for j in range(i):
            total = np.float32(0)
            for d in range(d_k):
                total += k[i, d] * k[j, d]
            a = beta[i] * total * exp(g[i] - g[j])
            for d in range(work.shape[1]):
                work[i, d] -= a * work[j, d]
    o[:, :] = 0
    _multiply_add(o, q, S, np.float32(1))
    for i in range(n):
        decay = exp(g[i])
        for d in range(o.shape[1]):
            o[i, d] *= decay
        for j in range(n):
            total = np.float32(0)
            if j <= i:
                for d in range(d_k):
                    total += q[i, d] * k[j, d]
                total *= exp(g[i] - g[j])
            pairs[i, j] = total
    _multiply_add(o, pairs[:n, :n], work, np.float32(1))
    final = exp(g[n - 1])
    for i in range(d_k):
        for j in range(S.shape[1]):
            S[i, j] *= final
    for i in range(n):
        left = exp(g[n - 1] - g[i])
        for r in range(d_k):
            a = left * k[i, r]
            for j in range(S.shape[1]):
                S[r, j] += a * work[i, j]


@piece
def _head(out, qkv, alpha, beta, rate, shift, state, n_tokens, n_k_head, n_v_head, d_k, d_v, eps, h):
    """All tokens of V head `h`."""
    channels = 2 * n_k_head * d_k + n_v_head * d_v
    size = CHUNK if n_tokens > FEW else 1
    S = floats(state + 4 * h * d_k * d_v, d_k * d_v).reshape((d_k, d_v))
    q, k = np.empty((size, d_k), np.float32), np.empty((size, d_k), np.float32)
    v, o = np.empty((size, d_v), np.float32), np.empty((size, d_v), np.float32)
    work, pairs = np.empty((size, d_v), np.float32), np.empty((size, size), np.float32)
    g, b = np.empty(size, np.float32), np.empty(size, np.float32)
    k_head = h % n_k_head
    for start in range(0, n_tokens, size):
        n = min(size, n_tokens - start)
        for i in range(n):
            token = qkv + 4 * (start + i) * channels
            _normalise(q[i], floats(token + 4 * k_head * d_k, d_k), np.float32(1 / math.sqrt(d_k)), eps)
            _normalise(k[i], floats(token + 4 * (n_k_head + k_head) * d_k, d_k), np.float32(1), eps)
            v[i, :] = floats(token + 4 * (2 * n_k_head * d_k + h * d_v), d_v)
            at = 4 * ((start + i) * n_v_head + h)
            g[i] = rate * _softplus(floats(alpha + at, 1)[0] + shift)
            b[i] = sigmoid(floats(beta + at, 1)[0])
        if size == 1:
            _step(S, q[0], k[0], v[0], exp(g[0]), b[0], o[0], work[0])
        else:
            for i in range(1, n):
                g[i] += g[i - 1]
            _chunk(S, q[:n], k[:n], v[:n], g[:n], b[:n], o[:n], work[:n], pairs)
        for i in range(n):
            floats(out + 4 * ((start + i) * n_v_head + h) * d_v, d_v)[:] = o[i]


@kernel("iiiiiiiiiiiif", parallel=True)
def delta_rule(out, qkv, alpha, beta, a, dt_bias, state, n_tokens, n_k_head, n_v_head, d_k, d_v, eps):
    """out [n_tokens, n_v_head, d_v] from qkv [n_tokens, 2·n_k_head·d_k + n_v_head·d_v] (q, k, v after the convolution).

    alpha, beta [n_tokens, n_v_head] are raw: g = a·softplus(alpha + dt_bias), beta = sigmoid(beta); a, dt_bias [n_v_head];
    state [n_v_head, d_k, d_v] is read and written. q and k are normalised per head, q also divided by sqrt(d_k); V head h
    uses K head h mod n_k_head.
    """
    for h in prange(n_v_head):
        rate, shift = floats(a, n_v_head)[h], floats(dt_bias, n_v_head)[h]
        _head(
            out, qkv, alpha, beta, rate, shift, state, n_tokens, n_k_head, n_v_head, d_k, d_v, np.float32(eps), h
        )  # fmt: skip
