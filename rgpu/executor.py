"""Runs a model's description on an Ops: the activations, chunks of a prompt, one step.

Owns the workspace, one for all sessions of an engine: one forward runs at a time. Knows nothing of text, files or residency.
"""

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from .models.base import Model
from .ops import Array, Ops
from .state import State

STEP = 8  # tokens of a decode step, at most: one, or a window that is verified
LOGIT_ROWS = 16  # rows of logits at a time when all are wanted: 16 MB at 248,320 tokens


class Workspace:
    """Every activation, allocated once for `n_tokens`; `view(n)` hands out the first n rows of all, at fixed addresses."""

    def __init__(self, ops: Ops, model: Model, n_tokens: int):
        hp = model.hp
        self.n_tokens = n_tokens
        self.floats = {name: ops.empty((n_tokens, width), np.float32) for name, width in model.workspace(hp).items()}
        self.ids = ops.empty((n_tokens, hp.n_expert_used), np.int32)
        self.near = ops.empty((n_tokens, min(hp.n_expert_used, hp.n_expert - hp.n_expert_used)), np.int32)
        self.weights = ops.empty((n_tokens, hp.n_expert_used), np.float32)
        self.tokens = ops.empty((n_tokens,), np.int32)
        self.pos = ops.empty((1,), np.int32)
        self.logits = ops.empty((LOGIT_ROWS, hp.n_vocab), np.float32)
        self.views: dict[int, SimpleNamespace] = {}
        self.nbytes = sum(x.nbytes for x in (*self.floats.values(), self.ids, self.weights, self.logits))

    def view(self, n: int) -> SimpleNamespace:
        if n not in self.views:
            self.views[n] = SimpleNamespace(**{name: array[:n] for name, array in self.floats.items()})
        return self.views[n]


class Run:
    """All that a model's description may touch during one forward of n tokens."""

    def __init__(self, ops: Ops, workspace: Workspace, state: State, experts, rope_freqs: Array, n: int):
        self.ops, self.state, self.experts, self.rope_freqs = ops, state, experts, rope_freqs
        self.ws = workspace.view(n)
        self.tokens, self.pos = workspace.tokens[:n], workspace.pos
        self.ids, self.weights = workspace.ids[:n], workspace.weights[:n]
        self.near = workspace.near[:n] if experts.learns else None  # experts that came close to being used


class Executor:
    """One model on one backend. `trace(layer, "mix" | "ffn" | "out", array [n, n_embd])` sees a branch's output, or x."""

    lock = threading.RLock()  # one for the process: the pool of threads below serves one caller at a time

    def __init__(self, model: Model, ops: Ops, experts, n_batch: int):
        hp = model.hp
        self.model, self.ops, self.experts = model, ops, experts
        self.workspace = Workspace(ops, model, n_batch)
        exponents = np.arange(0, hp.n_rot, 2) / hp.n_rot
        self.rope_freqs = ops.upload((hp.rope_freq_base**-exponents).astype(np.float32))
        self.trace: Callable[[int, str, np.ndarray], None] | None = None
        self.running = False
        self.best: dict[int, tuple[Array, Array]] = {}  # k -> where the largest logits are brought together

    def forward(self, state: State, tokens: Sequence[int], all: bool = False, best: int = 0):
        """Append `tokens` to the session; float32 logits [n_vocab] after the last one, or [n_tokens, n_vocab].

        `best`: only so many, the largest after the last token, as (ids int32, logits float32), each [best].
        """
        assert state.n_past + len(tokens) <= state.n_ctx, "kernels write by address"
        with self.lock:
            assert not self.running, "a trace must not start another forward in the same workspace"
            self.running = True
            try:
                return self._forward(state, tokens, all, best)
            finally:
                self.running = False

    def _forward(self, state: State, tokens: Sequence[int], all: bool, best: int):
        rows, read = [], (lambda logits: self._likeliest(logits, best)) if best else self.ops.to_host
        for start in range(0, len(tokens), self.workspace.n_tokens):
            chunk = tokens[start : start + self.workspace.n_tokens]
            last = start + len(chunk) == len(tokens)
            rows += self._chunk(state, chunk, len(chunk) if all else int(last), read)
        if best:
            return rows[0]
        return np.concatenate(rows) if all else rows[0][-1]

    def _chunk(self, state: State, chunk: Sequence[int], n_logits: int, read: Callable[[Array], Any]) -> list:
        """Run up to n_batch tokens; logits of the last `n_logits`, in pieces of LOGIT_ROWS, as `read` brings them to the host."""
        n, ops, work = len(chunk), self.ops, self.workspace
        ops.write(work.tokens[:n], np.asarray(chunk, np.int32))
        ops.write(work.pos, np.array([state.n_past], np.int32))
        run = Run(ops, work, state, self.experts, self.rope_freqs, n)
        ends = [*range(n - n_logits, n, LOGIT_ROWS), n]
        pieces = list(pairwise(ends))
        rows = []
        with self.experts.forward(n):
            if self.trace:
                self._layers(run)
            else:
                # Steps come back; chunks of a prompt do so rarely. The logits of one token belong to what is recorded.
                key = (state.key, n, n_logits == 1) if n <= STEP else None
                ops.replay(key, lambda: self._layers(run, pieces if n_logits == 1 else ()))
            for first, end in pieces:
                if n_logits > 1 or self.trace:
                    self._logits(run, first, end)
                rows.append(read(work.logits[: end - first]))
        state.advance(n)
        return rows

    def _layers(self, run: Run, pieces: Sequence[tuple[int, int]] = ()) -> None:
        """Embedding, layers, and the logits of these ranges of rows."""
        ops, model, ws = self.ops, self.model, run.ws
        ops.embed(ws.x, model.token_embd, run.tokens)
        for layer in model.layers:
            model.mix(run, layer)
            self._observe(layer, "mix", ws.out)
            ops.add(ws.x, ws.out)
            model.ffn(run, layer)
            self._observe(layer, "ffn", ws.out)
            ops.add(ws.x, ws.out)
            self._observe(layer, "out", ws.x)
        for first, end in pieces:
            self._logits(run, first, end)

    def _likeliest(self, logits: Array, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k largest logits of the only row: (ids, logits)."""
        if k not in self.best:
            self.best[k] = self.ops.empty((1, k), np.int32), self.ops.empty((1, k), np.float32)
        ids, values = self.best[k]
        self.ops.top_k(ids, values, logits)
        return self.ops.to_host(ids)[0], self.ops.to_host(values)[0]

    def _logits(self, run: Run, first: int, end: int) -> None:
        """workspace.logits = those of rows first..end of x."""
        ops, model, ws = self.ops, self.model, run.ws
        h = ws.h[: end - first]
        ops.rms_norm(h, ws.x[first:end], model.output_norm, model.hp.norm_rms_eps)
        ops.matmul(self.workspace.logits[: end - first], model.output, h)

    def _observe(self, layer, part: str, x: Array) -> None:
        if self.trace:
            self.trace(layer.index, part, self.ops.to_host(x))
