"""What is worth keeping: a score for every key (layer · n_expert + expert), learned from the keys that decode steps use.

A policy is `touch` and `score`, O(keys given) each; the larger score stays. Which slot a key gets and when is the arena's affair.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np


class Policy(ABC):
    """Scores of `n_layer` · `n_expert` keys.

    `share`: how many residents may be replaced after a step, as a part of the keys that it missed.
    """

    name: ClassVar[str]
    share = 1.0

    def __init__(self, n_layer: int, n_expert: int):
        self.n_keys = n_layer * n_expert

    @abstractmethod
    def touch(self, step: int, keys: np.ndarray, near: np.ndarray | None = None) -> None:
        """Learn that decode step `step` used `keys` (int [n], unique); steps ascend, and prefill touches nothing.

        `near` (int [m], unique): the router's near misses, which it ranked next behind those that were used.
        """

    @abstractmethod
    def score(self, keys: np.ndarray) -> np.ndarray:
        """float64 [n]: what each of `keys` (int [n]) is worth after the last step that was touched."""

    def state(self) -> np.ndarray:
        """float32 [n_keys]: what a profile keeps, which is every key's score."""
        return self.score(np.arange(self.n_keys)).astype(np.float32)

    @abstractmethod
    def restore(self, state: np.ndarray) -> None:
        """Begin, before the first step, with what a profile kept (float32 [n_keys]), whichever policy learned it."""


class Rotary(Policy):
    """Decayed uses, and near misses as parts of uses: these tell of an expert before it is needed.

    The used keys' part of all that is remembered says how familiar a step is. The less so, compared with the steps before,
    the faster everything fades: a new topic drives out the old one in tens of steps, not hundreds. For a while then
    whatever was missed may replace a resident; at other times half of it, the better one.
    """

    name = "rotary"
    # These and the figures in `touch` were found with bench.residency, on all its sets; hit rates are flat around them.
    KEEP = 0.965  # of a use, one step later
    NEAR = 0.7  # uses that a near miss counts for

    def __init__(self, n_layer: int, n_expert: int):
        super().__init__(n_layer, n_expert)
        # Instead of making all sums fade, a step makes the unit grow in which they are counted.
        self.sums, self.unit = np.zeros(self.n_keys), 1.0
        self.total = 0.0  # of all keys, in units
        self.usual = 0.0  # familiarity, averaged over some 100 steps
        self.new_until = 0  # the step from which on the topic is not new any more

    def touch(self, step: int, keys: np.ndarray, near: np.ndarray | None = None) -> None:
        familiar = self.score(keys).sum() / max(self.total, 1.0)
        self.usual += (familiar - self.usual) / 100
        surprise = min(max(self.usual / max(familiar, 1e-9), 1.0), 2.0)
        left = self.KEEP**surprise**4
        self.unit /= left
        self.total *= left
        for some, worth in ((keys, 1.0), (near, self.NEAR)):
            if some is not None:
                self.sums[some] += worth * self.unit
                self.total += worth * len(some)
        if surprise > 1.25:
            self.new_until = step + 40
        self.share = 1.0 if step < self.new_until else 0.5
        if self.unit > 1e100:
            self.sums /= self.unit
            self.unit = 1.0

    def score(self, keys: np.ndarray) -> np.ndarray:
        return self.sums[keys] / self.unit

    def restore(self, state: np.ndarray) -> None:
        self.sums[:] = state
        self.total = float(state.sum())


class LRU(Policy):
    """The step of the last use."""

    name = "lru"

    def __init__(self, n_layer: int, n_expert: int):
        super().__init__(n_layer, n_expert)
        self.last = np.zeros(self.n_keys)

    def touch(self, step: int, keys: np.ndarray, near: np.ndarray | None = None) -> None:
        self.last[keys] = step

    def score(self, keys: np.ndarray) -> np.ndarray:
        return self.last[keys]

    def restore(self, state: np.ndarray) -> None:
        self.last[:] = state - np.max(state)  # in the profile's order, all before step 0


class LFRU(Policy):
    """Uses so far over steps since the last one."""

    name = "lfru"

    def __init__(self, n_layer: int, n_expert: int):
        super().__init__(n_layer, n_expert)
        self.uses = np.zeros(self.n_keys)
        self.last = np.zeros(self.n_keys)
        self.step = 0

    def touch(self, step: int, keys: np.ndarray, near: np.ndarray | None = None) -> None:
        self.uses[keys] += 1
        self.last[keys] = self.step = step

    def score(self, keys: np.ndarray) -> np.ndarray:
        return self.uses[keys] / (self.step - self.last[keys] + 1)

    def restore(self, state: np.ndarray) -> None:
        self.uses[:] = state


class Static(Policy):
    """The scores of a profile for good: residency settles on the best and stays, so every run gives the same bytes."""

    name = "static"

    def __init__(self, n_layer: int, n_expert: int):
        super().__init__(n_layer, n_expert)
        self.scores = np.zeros(self.n_keys)

    def touch(self, step: int, keys: np.ndarray, near: np.ndarray | None = None) -> None:
        """Nothing is learned."""

    def score(self, keys: np.ndarray) -> np.ndarray:
        return self.scores[keys]

    def restore(self, state: np.ndarray) -> None:
        self.scores[:] = state


POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Rotary, LRU, LFRU, Static)}  # the first is the default
