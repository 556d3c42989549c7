"""What policies are compared with: Belady's optimum, which none can beat, and the classical LRU of each layer.

Both follow the rule of the engine: what is resident is constant within a step.
"""

from collections.abc import Sequence

import numpy as np

from rgpu.residency.trace import RoutingTrace

from .replay import Replay

NEVER = np.iinfo(np.int64).max


def belady(trace: RoutingTrace, slots: int) -> Replay:
    """The most hits that `slots` slots for all layers can have, with knowledge of the future.

    A key that is kept from one use to the next takes a slot for that interval and gives one hit. Keeping the soonest next
    uses at every boundary keeps the most intervals that `slots` slots can hold (the greedy choice by earliest end).
    """
    n_tokens, n_layer, _ = trace.ids.shape
    keys = np.stack([trace.keys(token) for token in range(n_tokens)])
    following = np.full(n_layer * trace.n_expert, NEVER)
    next_use = np.empty(keys.shape, np.int64)
    for token in reversed(range(n_tokens)):
        next_use[token] = following[keys[token]]
        following[keys[token]] = token
    due = np.full(len(following), NEVER)  # when a key that is kept is used next
    hits, moved = np.empty(keys.shape, bool), np.empty(n_tokens)
    for token, used in enumerate(keys):
        hits[token] = due[used] == token
        due[used] = next_use[token]
        kept = np.flatnonzero(due < NEVER)
        if len(kept) > slots:
            due[kept[np.argpartition(due[kept], slots)[slots:]]] = NEVER
        moved[token] = (due[used[~hits[token]]] < NEVER).sum()
    return Replay(hits.reshape(trace.ids.shape), moved)


def layer_lru(trace: RoutingTrace, sizes: Sequence[int]) -> list[Replay]:
    """Every layer keeps its last used experts, for each number of slots per layer in `sizes`.

    One pass for all sizes: an expert is resident if fewer than `slots` others of its layer were used after it. Of those that
    a token uses, the first in rank counts as the earliest.
    """
    n_tokens, n_layer, k = trace.ids.shape
    layers = np.arange(n_layer)[:, None]
    last = np.full((n_layer, trace.n_expert), -1)
    later = np.empty(trace.ids.shape, np.int64)  # experts of the layer that were used after the last use of each
    for token, ids in enumerate(trace.ids.astype(np.int64)):
        mine = last[layers, ids]
        later[token] = np.where(mine < 0, trace.n_expert, (last[:, None, :] > mine[:, :, None]).sum(axis=-1))
        last[layers, ids] = token * k + np.arange(k)
    return [Replay(later < slots, (later >= slots).sum(axis=(1, 2))) for slots in sizes]
