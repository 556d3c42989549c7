"""What a session remembers per layer: a KV cache, or the state of a recurrent layer; advance, rewind, snapshot.

A KV cache can be cut at any position. A recurrent layer cannot go back: `rewind` says so, and a snapshot is restored.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from .ops import Array, Ops


@dataclass
class KVCache:
    """Keys and values of one attention layer: uint8 [n_ctx, n_head_kv, bytes of one head] in blocks of type `quant`."""

    quant: tuple
    k: Array
    v: Array


class State:
    """One session's memory: `layers[i]` is a KVCache, or a namespace of float32 arrays; `n_past` tokens are in it."""

    def __init__(self, model, ops: Ops, kv: tuple, n_ctx: int):
        hp = model.hp
        self.ops, self.n_ctx, self.n_past = ops, n_ctx, 0
        self.key = object()  # stands for these arrays in what is recorded
        self.layers, self.recurrent = [], []

        def cache(head_dim):
            return ops.empty((n_ctx, hp.n_head_kv, head_dim // kv.block * kv.nbytes), np.uint8)

        for layer in model.layers:
            if layer.kind == "attention":
                self.layers.append(KVCache(kv, cache(hp.n_embd_head_k), cache(hp.n_embd_head_v)))
                continue
            arrays = {name: ops.empty(shape, np.float32) for name, shape in model.recurrent_shapes(hp).items()}
            self.layers.append(SimpleNamespace(**arrays))
            self.recurrent += arrays.values()

    @staticmethod
    def nbytes(model, kv: tuple, n_ctx: int) -> tuple[int, int]:
        """Bytes of a session's KV caches when they are full, and of its recurrent layers' memory."""
        hp = model.hp
        attention = sum(layer.kind == "attention" for layer in model.layers)
        row = sum(d // kv.block * kv.nbytes for d in (hp.n_embd_head_k, hp.n_embd_head_v))
        floats = sum(math.prod(shape) for shape in model.recurrent_shapes(hp).values())
        return attention * n_ctx * hp.n_head_kv * row, 4 * floats * (len(model.layers) - attention)

    def advance(self, n: int) -> None:
        self.n_past += n

    def rewind(self, n_past: int) -> bool:
        """Forget all but the first `n_past` tokens; False (and nothing done) if a recurrent layer would have to go back."""
        assert n_past <= self.n_past
        if self.recurrent and 0 < n_past < self.n_past:
            return False
        if n_past == 0:
            for array in self.recurrent:
                self.ops.zero(array)
        self.n_past = n_past
        return True

    def snapshot(self) -> "Snapshot":
        """A copy of what cannot be rewound, at the present position. Cheap without recurrent layers."""
        copies = []
        for array in self.recurrent:
            copies.append(self.ops.empty(array.shape, np.float32))
            self.ops.copy(copies[-1], array)
        return Snapshot(self.n_past, copies)

    def restore(self, snapshot: "Snapshot") -> None:
        """Go back to where `snapshot` was taken; the KV rows up to there must not have been overwritten since."""
        for array, saved in zip(self.recurrent, snapshot.arrays, strict=True):
            self.ops.copy(array, saved)
        self.n_past = snapshot.n_past


@dataclass
class Snapshot:
    """The recurrent layers after `n_past` tokens."""

    n_past: int
    arrays: list[Array]
