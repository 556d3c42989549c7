"""Records what a run routes, or makes it route what a trace says: `TracedExperts`, around any other arrangement of experts.

Models with random weights route like noise; under a trace they are measured with the locality of real text.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..errors import RgpuError
from ..ops import Ops
from .trace import RoutingTrace


class TracedExperts:
    """`recorded()` is the trace of all tokens so far, prompts included; `forced` makes the t-th token use those of its t-th.

    A forced trace begins again when it ends. The weights stay those of the model's own choice, rank by rank.
    """

    def __init__(self, ops: Ops, experts, sizes: tuple[int, int, int], n_tokens: int, forced: RoutingTrace | None = None):
        """`sizes`: n_layer, n_expert, n_expert_used of the model; `n_tokens`: of a forward, at most.

        RgpuError if a forced trace has fewer layers, other experts or another number of them per token.
        """
        n_layer, n_expert, k = sizes
        self.ops, self.experts, self.n_expert, self.forced = ops, experts, n_expert, forced
        self.ids = ops.empty((n_layer, n_tokens, k), np.int32)
        self.weights = ops.empty((n_layer, n_tokens, k), np.float32)
        self.tokens = 0
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        if forced is not None:
            _, layers, used = forced.ids.shape
            if layers < n_layer or (forced.n_expert, used) != (n_expert, k):
                found, needed = f"{layers} layers with {used} of {forced.n_expert}", f"{n_layer} with {k} of {n_expert}"
                raise RgpuError(f"the routing trace is of {found} experts, but the model has {needed}")

    def ffn(self, run, layer) -> None:
        ids, weights = self.ids[layer.index, : len(run.ids)], self.weights[layer.index, : len(run.ids)]
        if self.forced is not None:
            self.ops.copy(run.ids, ids)
        else:
            self.ops.copy(ids, run.ids)
        self.ops.copy(weights, run.weights)
        self.experts.ffn(run, layer)

    @contextmanager
    def forward(self, n_tokens: int) -> Iterator[None]:
        if self.forced is not None:
            rows = np.arange(self.tokens, self.tokens + n_tokens) % len(self.forced.ids)
            wanted = self.forced.ids[rows, : len(self.ids)].swapaxes(0, 1)
            self.ops.copy(self.ids[:, :n_tokens], self.ops.upload(wanted.astype(np.int32)))
        with self.experts.forward(n_tokens):
            yield
        self.tokens += n_tokens
        ids, weights = self.ops.to_host(self.ids[:, :n_tokens]), self.ops.to_host(self.weights[:, :n_tokens])
        self.parts.append((ids.swapaxes(0, 1).astype(np.int16), weights.swapaxes(0, 1).astype(np.float16)))

    def recorded(self) -> RoutingTrace:
        """What has been routed so far. RgpuError if there was no token yet."""
        if not self.parts:
            raise RgpuError("no token has been routed yet: there is no trace to save")
        ids, weights = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        return RoutingTrace(ids, weights, self.n_expert, "recorded")

    def close(self) -> None:
        self.experts.close()

