"""Which experts every token was routed to: recorded from a run, or generated with the locality of real routing.

A trace is a compressed .npz. Replaying one through policies is bench/residency.py; recording and forcing belong to the runtime.
"""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from ..errors import RgpuError

FORMAT = 1
ARRAYS = ("ids", "weights", "near")  # of which the first is always there
# What np.load makes of files that are something else, end early or are damaged.
NOT_READABLE = (zipfile.BadZipFile, zlib.error, AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError)
# Shares of variance of an expert's score: its layer's habit, the topic, the moment, chance; tokens that a topic lasts.
SETS = {
    "A": (0.28, 0.34, 0.23, 0.15, 200),  # one coherent prompt
    "B": (0.22, 0.26, 0.27, 0.25, 200),  # normal use
    "C": (0.10, 0.30, 0.30, 0.30, 100),  # flat: adversarial
}
FIRST_HABIT = 0.05  # the share of habit in layer 0, which is much flatter than the others
MOMENT = 1.0  # tokens that a moment lasts


@dataclass
class RoutingTrace:
    """Experts of `n_tokens` consecutive tokens in every MoE layer, by rank, and the weights of the gate where they are known."""

    ids: np.ndarray  # int16 [n_tokens, n_layer, n_expert_used]
    weights: np.ndarray | None  # float16, the same shape
    n_expert: int
    source: str  # where it comes from, for people
    near: np.ndarray | None = None  # int16 [n_tokens, n_layer, m]: the experts next in rank, which were not used

    def save(self, path: Path) -> None:
        """Write a compressed .npz, at exactly this path."""
        arrays = {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}
        with open(path, "wb") as f:
            np.savez_compressed(f, rgpu_trace=FORMAT, n_expert=self.n_expert, source=self.source, **arrays)

    @classmethod
    def load(cls, path: Path) -> "RoutingTrace":
        """Read what `save` wrote. RgpuError for anything else, OSError for a file that cannot be read."""
        content = BytesIO(path.read_bytes())
        try:
            with np.load(content) as file:
                arrays = {name: file[name] for name in file.files}
            version = int(arrays["rgpu_trace"])
            if version != FORMAT:
                raise RgpuError(f"{path} is a routing trace of format {version}, and {FORMAT} is needed: record it again")
            n_expert, source = int(arrays["n_expert"]), str(arrays["source"])
            trace = cls(arrays["ids"], arrays.get("weights"), n_expert, source, arrays.get("near"))
        except NOT_READABLE:
            raise RgpuError(f"{path} is no routing trace, or is truncated: record it again") from None
        if fault := trace._fault():
            raise RgpuError(f"{path} is a routing trace that contradicts itself ({fault}): record it again")
        return trace

    def _fault(self) -> str | None:
        """What contradicts itself, if anything does."""
        ids, weights = self.ids, self.weights
        if ids.ndim != 3 or ids.dtype != np.int16 or not ids.size:
            return f"ids are {ids.dtype} {list(ids.shape)}, not int16 [tokens, layers, experts used]"
        if weights is not None and (weights.shape != ids.shape or weights.dtype != np.float16 or not np.isfinite(weights).all()):
            return f"weights are {weights.dtype} {list(weights.shape)} for ids {list(ids.shape)}, or not finite"
        ranks = ids
        if self.near is not None:
            if self.near.ndim != 3 or self.near.shape[:2] != ids.shape[:2] or self.near.dtype != np.int16:
                return f"near misses are {self.near.dtype} {list(self.near.shape)} for ids {list(ids.shape)}"
            ranks = np.concatenate((ids, self.near), axis=-1)
        if ranks.min() < 0 or ranks.max() >= self.n_expert:
            return f"experts {ranks.min()} to {ranks.max()} of {self.n_expert}"
        if (np.diff(np.sort(ranks), axis=-1) == 0).any():
            return "an expert has two ranks for one token"
        return None

    def keys(self, token: int) -> np.ndarray:
        """int64 [n_layer · n_expert_used]: layer · n_expert + expert of all that a token uses; unique."""
        return self._keys(self.ids[token])

    def near_keys(self, token: int) -> np.ndarray | None:
        """int64 [n_layer · m], the same of its near misses; None where they are not known."""
        return None if self.near is None else self._keys(self.near[token])

    def _keys(self, experts: np.ndarray) -> np.ndarray:
        return (np.arange(len(experts))[:, None] * self.n_expert + experts).ravel()

    @classmethod
    def generate(
        cls,
        n_tokens: int,
        n_layer: int = 40,
        n_expert: int = 256,
        k: int = 8,
        set: str = "B",
        seed: int = 0,
        topics: Sequence[int] = (),
    ) -> "RoutingTrace":
        """A random trace with the locality of one of SETS; at each of the tokens `topics`, another topic begins.

        An expert's score is the sum of four normal variables: one fixed, two first-order autoregressive, one fresh at every
        token (the process of expert residency that public traces were fitted with). Near misses are as many as the experts
        used, where there are so many.
        """
        *shares, lasts = SETS[set]
        habit, topic, moment, chance = (np.full((n_layer, 1), share**0.5, np.float32) for share in shares)
        habit[0] = FIRST_HABIT**0.5
        random = np.random.default_rng(seed)

        def normal() -> np.ndarray:
            return random.standard_normal((n_layer, n_expert), np.float32)

        def follow(before: np.ndarray, tokens: float) -> np.ndarray:
            keep = np.float32(np.exp(-1 / tokens))
            return keep * before + np.sqrt(1 - keep * keep) * normal()

        b, s, f = habit * normal(), normal(), normal()
        ids, weights = np.empty((n_tokens, n_layer, k), np.int16), np.empty((n_tokens, n_layer, k), np.float16)
        near = np.empty((n_tokens, n_layer, min(k, n_expert - k)), np.int16)
        for token in range(n_tokens):
            s = normal() if token in topics else follow(s, lasts)
            f = follow(f, MOMENT)
            score = b + topic * s + moment * f + chance * normal()
            ranks = np.argsort(-score, axis=1)
            ids[token], near[token] = ranks[:, :k], ranks[:, k : 2 * k]
            gate = np.exp(np.take_along_axis(score, ranks[:, :k], 1))
            weights[token] = gate / gate.sum(axis=1, keepdims=True)
        changes = f", topics change at {', '.join(map(str, topics))}" if len(topics) else ""
        return cls(ids, weights, n_expert, f"generated, set {set}, seed {seed}{changes}", near)
