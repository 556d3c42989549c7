"""The verbs in plain NumPy, written to be read: the specification of every backend, and the oracle of its tests.

Weights are dequantised at every use and sums are float32 as NumPy forms them; nothing is fused, tiled or kept. Only the rounding
of a product's input to int8 blocks, where the weights are blocks too, is part of the specification.
"""

import time

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from ..quants.activations import rounded
from . import L2_EPS, check


def sigmoid(x):
    return 1 / (1 + np.exp(np.minimum(-x, np.float32(88))))  # e**88 is the largest that float32 holds


def dequantize(weight):
    """float32 [rows, columns] of a Weight."""
    blocks = weight.data[: weight.shape[0] * weight.row_bytes].reshape(-1, weight.quant.nbytes)
    return weight.quant.dequantize(blocks).reshape(weight.shape)


def product(weight, x):
    """x · Wᵀ; a quantised matrix sees its input rounded to int8 blocks of 32."""
    return (x if weight.quant.block == 1 else rounded(x)) @ dequantize(weight).T


def cached(cache, part, n):
    """The first n rows of a cache part as float32 [n, n_head_kv, d]."""
    rows = part[:n]
    return cache.quant.dequantize(rows.reshape(-1, cache.quant.nbytes)).reshape(n, rows.shape[1], -1)


@check
class ReferenceOps:
    name = "reference"
    reads_host_memory = True

    def __init__(self, threads=None):
        pass

    def prepare(self, needs, progress):
        return lambda: None

    def close(self):
        pass

    def empty(self, shape, dtype):
        return np.zeros(shape, dtype)

    def upload(self, array):
        return array

    def write(self, out, values):
        out[...] = values

    def to_host(self, x):
        return x.copy()

    def copy(self, out, x):
        out[...] = x

    def replay(self, key, step):
        step()

    def embed(self, out, weight, tokens):
        out[...] = dequantize(weight)[tokens]

    def matmul(self, out, weight, x):
        out[...] = product(weight, x)

    def rms_norm(self, out, x, weight, eps):
        out[...] = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight

    def swiglu(self, out, gate, up):
        out[...] = gate * sigmoid(gate) * up

    def gate(self, out, x, g):
        out[...] = x * sigmoid(g)

    def add(self, out, x):
        out += x

    def zero(self, out):
        out[...] = 0

    def rope(self, x, pos, freqs):
        half = len(freqs)
        angle = (np.float32(pos[0]) + np.arange(len(x), dtype=np.float32))[:, None, None] * freqs
        cos, sin = np.cos(angle), np.sin(angle)
        a, b = x[..., :half].copy(), x[..., half : 2 * half].copy()
        x[..., :half] = a * cos - b * sin
        x[..., half : 2 * half] = b * cos + a * sin

    def store_kv(self, cache, k, v, pos):
        for part, x in ((cache.k, k), (cache.v, v)):
            packed = quantize(x.reshape(len(x), -1), GGMLQuantizationType(cache.quant.id)).view(np.uint8)
            part[pos[0] : pos[0] + len(x)] = packed.reshape(len(x), *part.shape[1:])

    def attention(self, out, q, cache, pos, scale):
        n, n_head, _ = q.shape
        n_seen = pos[0] + n
        group = n_head // cache.k.shape[1]
        k = cached(cache, cache.k, n_seen).repeat(group, axis=1)
        v = cached(cache, cache.v, n_seen).repeat(group, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) * np.float32(scale)
        hidden = np.arange(n_seen) > pos[0] + np.arange(n)[:, None]
        scores[:, hidden] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[...] = np.einsum("hts,shd->thd", p / p.sum(axis=-1, keepdims=True), v)

    def short_conv(self, out, x, weight, tail):
        taps = weight.shape[1]
        history = np.concatenate([tail, x])
        y = sum(weight[:, j] * history[j : j + len(x)] for j in range(taps))
        out[...] = y * sigmoid(y)
        tail[...] = history[len(x) :]

    def delta_rule(self, out, qkv, alpha, beta, a, dt_bias, state):
        n, n_v_head, d_v = out.shape
        d_k = state.shape[1]
        n_key = (qkv.shape[1] - n_v_head * d_v) // 2
        v = qkv[:, 2 * n_key :].reshape(n, n_v_head, d_v)
        k_head = np.arange(n_v_head) % (n_key // d_k)
        q, k = (x.reshape(n, -1, d_k) for x in (qkv[:, :n_key], qkv[:, n_key : 2 * n_key]))
        q, k = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(L2_EPS)) for x in (q, k))
        q, k = q[:, k_head] / np.float32(np.sqrt(d_k)), k[:, k_head]
        decay = np.exp(a * np.logaddexp(np.float32(0), alpha + dt_bias))
        step = sigmoid(beta)
        for t in range(n):
            state *= decay[t, :, None, None]
            delta = step[t, :, None] * (v[t] - np.einsum("hkv,hk->hv", state, k[t]))
            state += k[t][:, :, None] * delta[:, None, :]
            out[t] = np.einsum("hkv,hk->hv", state, q[t])

    def route(self, ids, weights, logits, near=None):
        k, ranks = ids.shape[1], np.argsort(-logits, axis=1, kind="stable")
        ids[...] = ranks[:, :k]
        if near is not None:
            near[...] = ranks[:, k : k + near.shape[1]]
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        chosen = np.take_along_axis(p, ids.astype(np.int64), axis=1)
        weights[...] = chosen / chosen.sum(axis=1, keepdims=True)

    def post(self, box, ids, table=None, after=None):
        sent = ids.reshape(-1) if table is None else ids[table[ids] < 0]
        if table is None or sent.size:
            box[2 : 2 + sent.size] = sent
            box[1] = sent.size
            box[0] += 1

    def wait(self, box, answer, table):
        while answer[0] < box[0]:
            time.sleep(1e-5)

    def publish(self, answer, count):
        answer[0] = count

    def top_k(self, ids, values, logits):
        order = np.argsort(-np.where(np.isnan(logits), np.inf, logits), axis=1, kind="stable")[:, : ids.shape[1]]
        ids[...] = order
        values[...] = np.take_along_axis(logits, order, axis=1)

    def expert_ffn(self, out, x, bank, table, ids, weights):
        for expert in np.unique(ids):
            slot = table[expert]
            if slot < 0:
                continue
            gate, up, down = (part.weight(slot) for part in bank)
            t, rank = np.nonzero(ids == expert)
            g = product(gate, x[t])
            out[t] += weights[t, rank][:, None] * product(down, g * sigmoid(g) * product(up, x[t]))
