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

    learns = True

    def __init__(self, ops: Ops, experts, sizes: tuple[int, int, int], n_tokens: int, forced: RoutingTrace | None = None):
        """`sizes`: n_layer, n_expert, n_expert_used of the model; `n_tokens`: of a forward, at most.

        RgpuError if a forced trace has fewer layers, other experts or another number of them per token.
        """
        n_layer, n_expert, k = sizes
        self.ops, self.experts, self.n_expert, self.forced = ops, experts, n_expert, forced
        self.ids = ops.empty((n_layer, n_tokens, k), np.int32)
        self.near = ops.empty((n_layer, n_tokens, min(k, n_expert - k)), np.int32)
        self.weights = ops.empty((n_layer, n_tokens, k), np.float32)
        self.tokens = 0
        self.parts: list[tuple[np.ndarray, ...]] = []
        if forced is not None:
            _, layers, used = forced.ids.shape
            if layers < n_layer or (forced.n_expert, used) != (n_expert, k):
                found, needed = f"{layers} layers with {used} of {forced.n_expert}", f"{n_layer} with {k} of {n_expert}"
                raise RgpuError(f"the routing trace is of {found} experts, but the model has {needed}")

    def ffn(self, run, layer) -> None:
        kept = [array[layer.index, : len(run.ids)] for array in (self.ids, self.near, self.weights)]
        copies = zip(kept, (run.ids, run.near, run.weights), strict=True)
        for mine, routed in copies:
            if self.forced is not None and mine.dtype == np.int32:
                self.ops.copy(routed, mine)
            else:
                self.ops.copy(mine, routed)
        self.experts.ffn(run, layer)

    @contextmanager
    def forward(self, n_tokens: int) -> Iterator[None]:
        if self.forced is not None:
            rows = np.arange(self.tokens, self.tokens + n_tokens) % len(self.forced.ids)
            # A trace that knows no near misses has none: what is used says the same twice.
            near = self.forced.ids[..., : self.near.shape[2]] if self.forced.near is None else self.forced.near
            for mine, wanted in ((self.ids, self.forced.ids), (self.near, near)):
                values = wanted[rows, : len(mine)].swapaxes(0, 1).astype(np.int32)
                for layer in range(len(mine)):
                    self.ops.write(mine[layer, :n_tokens], values[layer])
        with self.experts.forward(n_tokens):
            yield
        self.tokens += n_tokens
        kept = ((self.ids, np.int16), (self.weights, np.float16), (self.near, np.int16))
        self.parts.append(tuple(self.ops.to_host(x[:, :n_tokens]).swapaxes(0, 1).astype(dtype) for x, dtype in kept))

    def recorded(self) -> RoutingTrace:
        """What has been routed so far. RgpuError if there was no token yet."""
        if not self.parts:
            raise RgpuError("no token has been routed yet: there is no trace to save")
        ids, weights, near = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        return RoutingTrace(ids, weights, self.n_expert, "recorded", near)

    def close(self) -> None:
        self.experts.close()

