"""Routing traces through arenas and policies: what was hit, what was moved, how long the bookkeeping took.

Every step sees what the boundary before it made resident; only keys that were missed may become resident.
"""

import time
from dataclasses import dataclass

import numpy as np

from rgpu.residency.arena import SlotArena
from rgpu.residency.policy import Policy
from rgpu.residency.trace import RoutingTrace


@dataclass
class Replay:
    """What happened, token by token."""

    hits: np.ndarray  # bool [n_tokens, n_layer, n_expert_used]
    moved: np.ndarray  # [n_tokens]: experts whose bytes were brought into a slot
    held: np.ndarray | None = None  # [n_tokens, n_layer]: slots that each layer has
    seconds: np.ndarray | None = None  # [n_tokens]: touch and turn


def profile(trace: RoutingTrace, tokens: slice) -> np.ndarray:
    """float32 [n_keys]: how often each key is used in some of the tokens."""
    uses = np.zeros(trace.ids.shape[1] * trace.n_expert, np.float32)
    for token in range(len(trace.ids))[tokens]:
        uses[trace.keys(token)] += 1
    return uses


def replay(trace: RoutingTrace, policy: Policy, slots: int, everywhere: bool = False) -> Replay:
    """Run a trace through one size class of `slots` slots for all layers, none of them spare.

    A policy that has a profile begins with an arena filled by it, any other with an empty one. `everywhere`: the hand passes
    all slots at every boundary, and nothing limits replacements.
    """
    n_tokens, n_layer, k = trace.ids.shape
    arena = SlotArena(n_layer, trace.n_expert, [0] * n_layer, [slots], floor=min(k + 2, slots // n_layer), spare=0)
    if everywhere:
        arena.window = arena.limit = slots
    if (known := policy.state()).any():
        arena.fill(np.argsort(-known, kind="stable").tolist())
    result = Replay(np.empty(trace.ids.shape, bool), *(np.empty(shape) for shape in (n_tokens, (n_tokens, n_layer), n_tokens)))
    for token in range(n_tokens):
        keys = trace.keys(token)
        hits = arena.slot_of[keys] >= 0
        missed, near = keys[~hits], trace.near_keys(token)
        begin = time.perf_counter()
        policy.touch(token + 1, keys, near)
        swaps = arena.turn(keys, policy, missed)
        result.seconds[token] = time.perf_counter() - begin
        result.hits[token] = hits.reshape(n_layer, k)
        result.moved[token] = len(swaps)
        result.held[token] = arena.held
    return result
