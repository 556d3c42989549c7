"""Which expert is in which slot: residency as bookkeeping on arrays. Knows keys, slots and sizes; never bytes, never devices.

A key is layer · n_expert + expert; the slots of all size classes are numbered in one row, class after class. `table` is what
a step reads, and constant within it: bytes that come during a step land in slots without a resident, and `turn`, between two
steps, makes residents of those that are worth more than what they replace.
"""

import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import OutOfMemory
from .policy import Policy

WINDOW = 512  # slots of a class that the hand passes in a turn
LIMIT = 128  # residents of a class that are replaced in a turn, if bytes must be copied for it


class Swap(NamedTuple):
    """From now on `key` is resident in `slot`, and `evicted` nowhere (-1: nothing had to go)."""

    key: int
    slot: int
    evicted: int


class Pool:
    """The slots of one size class: a ring, and a hand that goes round it."""

    def __init__(self, slots: np.ndarray, owed: int):
        self.slots = slots  # int64 [n], ascending
        self.free = OrderedDict.fromkeys(slots.tolist())  # those without a resident, the next to land in first
        self.owed = owed  # residents that the class's layers lack to their floors
        self.lent: list[tuple[int, int]] = []  # (key or -1, slot)
        self.hand = 0

    def passed(self, n: int) -> np.ndarray:
        """Move the hand over the next n slots, at most once round: int64 [<= n]."""
        begin, end = self.hand, self.hand + min(n, len(self.slots))
        self.hand = end % max(len(self.slots), 1)
        return np.concatenate((self.slots[begin:end], self.slots[: max(end - len(self.slots), 0)]))


class SlotArena:
    """Slots in size classes, and the experts in them; a layer's experts are all of one class.

    In every class at least `spare` slots are without a resident. A layer that has `floor` residents never falls below, and
    there is always room for the others to reach it.
    """

    def __init__(self, n_layer: int, n_expert: int, class_of: Sequence[int], slots: Sequence[int], floor: int, spare: int):
        """`class_of` [n_layer]: each layer's size class; `slots` [n_class]: how many each class has, spare ones included.

        OutOfMemory if a class has fewer than its layers' floors and the spare ones.
        """
        assert len(class_of) == n_layer and set(class_of) <= set(range(len(slots)))
        self.n_expert, self.class_of, self.floor, self.spare = n_expert, list(class_of), min(floor, n_expert), spare
        self.window, self.limit = WINDOW, LIMIT
        self.table = np.full((n_layer, n_expert), -1, np.int32)  # slot of a resident, or -1
        self.slot_of = self.table.reshape(-1)  # the same by key
        self.key_in = np.full(sum(slots), -1, np.int32)  # key of the resident in a slot, or -1
        self.held = np.zeros(n_layer, np.int64)  # residents of each layer
        self.class_of_key = np.repeat(self.class_of, n_expert)
        self.busy = np.zeros(n_layer * n_expert + 1, bool)  # by key, in a turn: may not be evicted
        self.busy[-1] = True  # there is nothing in an empty slot
        self.landing: dict[int, int] = {}  # key -> slot of bytes that came, or are coming, in this step
        self.lander: dict[int, int] = {}  # slot -> key, the same
        self.pools = []
        for cls, (end, n) in enumerate(zip(np.cumsum(slots), slots, strict=True)):
            self.pools.append(Pool(np.arange(end - n, end), self.floor * self.class_of.count(cls)))
            self._afford(cls, n)

    def land(self, key: int) -> int:
        """A slot of the key's class for bytes that are coming: never a resident's, and its own if the key landed before.

        Once all empty slots are taken, it is that of the oldest landing of this step, which is forgotten: at most `spare`
        of a class are safe together.
        """
        assert self.slot_of[key] < 0
        if key not in self.landing:
            free = self._pool(key).free
            slot = next(iter(free))
            free.move_to_end(slot)
            self.landing.pop(self.lander.get(slot), None)
            self.landing[key], self.lander[slot] = slot, key
        return self.landing[key]

    def make_room(self, layer: int, n: int, policy: Policy) -> None:
        """Have n slots ready for `land` in the layer's class (n <= spare): forget those landings that are worth least.

        Without it the last layers' landings, worth it or not, take the slots of the first ones'.
        """
        cls = self.class_of[layer]
        keys = np.fromiter(self.landing, np.int64, len(self.landing))
        keys = keys[self.class_of_key[keys] == cls]
        lacking = n - (len(self.pools[cls].free) - len(keys))
        if lacking > 0:
            for key in keys[np.argsort(policy.score(keys), kind="stable")][:lacking].tolist():
                self.forget(key)

    def landed(self, key: int) -> int:
        """The slot where the key's bytes landed in this step, or -1."""
        return self.landing.get(key, -1)

    def forget(self, key: int) -> None:
        """The bytes that landed could not be read, or are not worth keeping: their slot is the next to land in."""
        slot = self.landing.pop(key)
        del self.lander[slot]
        self._pool(key).free.move_to_end(slot, last=False)

    def settle(self, key: int) -> bool:
        """Make a resident of what has landed, where it is, if nothing must leave for it; whether it was."""
        found = self._has_room(key // self.n_expert)
        if found:
            self._publish(key, self.landing[key])
        return found

    def room(self, layer: int) -> int:
        """How many more residents would be the layer's share of the slots of its class."""
        cls = self.class_of[layer]
        return max((len(self.pools[cls].slots) - self.spare) // self.class_of.count(cls) - int(self.held[layer]), 0)

    def forget_all(self) -> None:
        """Forget every landing: after a forward from which nothing is to be kept."""
        self.landing.clear()
        self.lander.clear()

    def turn(self, used: np.ndarray, policy: Policy, candidates: np.ndarray | None = None) -> list[Swap]:
        """Between two steps: make residents of the candidates that are worth it, best first, and forget all landings.

        `used`: keys of the step (int [n]), which `policy` has been told of; they stay. Candidates are all that landed, and stay
        where they are; or, where nothing lands, given keys that the step missed (int [n], unique), whose bytes the caller then
        copies: of each class at most `limit`, and at most the policy's share of them. While a class has empty slots, these are
        taken; then a candidate must be worth more than the least of those residents which the hand passes.
        """
        assert not any(pool.lent for pool in self.pools)
        assert candidates is None or not self.landing
        if candidates is None:
            candidates = np.fromiter(self.landing, np.int64, len(self.landing))
        assert (self.slot_of[candidates] < 0).all()
        self.busy[used] = True
        swaps = []
        for cls, pool in enumerate(self.pools):
            keys = candidates[self.class_of_key[candidates] == cls]
            limit = len(keys) if self.landing else min(self.limit, math.ceil(policy.share * len(keys)))
            keys = keys[np.argsort(-policy.score(keys), kind="stable")]
            if len(pool.free) > self.spare:
                swaps += [Swap(key, slot, -1) for key, slot in self.fill(keys.tolist())]
                keys = keys[self.slot_of[keys] < 0]
            swaps += self._replace(pool, policy, keys[:limit])
        self.busy[used] = False
        self.forget_all()
        return swaps

    def fill(self, keys: Iterable[int]) -> list[tuple[int, int]]:
        """At start: make residents of these keys, best first, as far as there are slots and other layers' floors allow.

        Returns (key, slot) of each; the caller brings the bytes before the next step.
        """
        filled = []
        for key in keys:
            if self.slot_of[key] < 0 and self._has_room(key // self.n_expert):
                filled.append((key, self.land(key)))
                self._publish(*filled[-1])
        return filled

    def lend(self, n: int, cls: int = 0) -> list[int]:
        """n slots of a class that are the caller's until `restore`: empty ones, then those behind the hand.

        Their residents leave the table and are remembered. Spare slots are never lent; floors do not count meanwhile.
        """
        pool = self.pools[cls]
        assert n <= len(pool.slots) - self.spare - len(pool.lent)
        lent = [(-1, slot) for slot in self._take(pool, min(n, len(pool.free) - self.spare))]
        residents = self.key_in[pool.passed(len(pool.slots))]
        for key in residents[residents >= 0][: n - len(lent)].tolist():
            slot = self._withdraw(key)
            del pool.free[slot]
            lent.append((key, slot))
        pool.lent += lent
        return [slot for _, slot in lent]

    def restore(self) -> list[tuple[int, int]]:
        """Take all lent slots back, with the residents that they had: (key, slot), whose bytes the caller brings back."""
        restored = []
        for pool in self.pools:
            pool.free.update(dict.fromkeys(slot for _, slot in pool.lent))
            restored += [(key, slot) for key, slot in pool.lent if key >= 0]
            pool.lent.clear()
        for key, slot in restored:
            self._publish(key, slot)
        return restored

    def shrink(self, n: int, cls: int, policy: Policy) -> list[int]:
        """Give up n slots of a class for good: empty ones, then those of the residents worth least.

        OutOfMemory, and nothing is given up, if the layers' floors and the spare slots need them.
        """
        pool = self.pools[cls]
        assert not pool.lent
        self._afford(cls, len(pool.slots) - n)
        residents = self.key_in[pool.slots]
        residents = residents[residents >= 0]
        for key in residents[np.argsort(policy.score(residents), kind="stable")].tolist():
            if len(pool.free) - self.spare - pool.owed >= n:
                break
            if self.held[key // self.n_expert] > self.floor:
                self._withdraw(key)
        gone = self._take(pool, n)
        pool.slots = np.setdiff1d(pool.slots, gone)
        pool.hand = 0
        return gone

    def _afford(self, cls: int, n: int) -> None:
        """OutOfMemory if n slots are too few for a class."""
        layers = self.class_of.count(cls)
        if n < layers * self.floor + self.spare:
            raise OutOfMemory(
                f"{n} expert slots for {layers} layers: {self.floor} per layer and {self.spare} spare ones are needed; "
                "give more memory or a shorter context"
            )

    def _pool(self, key: int) -> Pool:
        return self.pools[self.class_of[key // self.n_expert]]

    def _has_room(self, layer: int) -> bool:
        """Whether the layer may have one more resident without another's leaving."""
        pool = self.pools[self.class_of[layer]]
        return bool(len(pool.free) - self.spare > (pool.owed if self.held[layer] >= self.floor else 0))

    def _replace(self, pool: Pool, policy: Policy, keys: np.ndarray) -> list[Swap]:
        """Newcomers, the best first, take the places of the least of those that the hand passes, if these are worth less."""
        passed = self.key_in[pool.passed(self.window)].astype(np.int64)
        passed = passed[~self.busy[passed]]
        scores, worth = policy.score(keys), policy.score(passed)
        n = min(len(keys), len(passed))
        if n == 0:
            return []
        least = np.argpartition(worth, n - 1)[:n]
        least = least[np.argsort(worth[least], kind="stable")]
        n = int((scores[:n] > worth[least]).sum())
        pairs = keys[:n], passed[least[:n]]
        change = self._per_layer(pairs[0]) - self._per_layer(pairs[1])
        if ((change < 0) & (self.held + change < self.floor)).any():
            pairs = self._pairs_at_floors(zip(keys.tolist(), scores.tolist(), strict=True), passed, worth)
            change = self._per_layer(pairs[0]) - self._per_layer(pairs[1])
        self.held += change
        keys, evicted = pairs
        emptied = slots = self.slot_of[evicted]
        if self.landing:
            slots = np.array([self.landing[key] for key in keys.tolist()], np.int32)
            pool.free.update(dict.fromkeys(emptied.tolist()))
            for slot in slots.tolist():
                del pool.free[slot]
        self.slot_of[evicted] = self.key_in[emptied] = -1
        self.slot_of[keys], self.key_in[slots] = slots, keys
        return list(map(Swap, keys.tolist(), slots.tolist(), evicted.tolist()))

    def _pairs_at_floors(self, newcomers: Iterable[tuple[int, float]], passed: np.ndarray, worth: np.ndarray) -> np.ndarray:
        """int64 [2, n]: newcomers (key, score) and whom they replace, where a layer's last `floor` only leave for its own."""
        order = np.argsort(worth, kind="stable")
        victims = zip(passed[order].tolist(), worth[order].tolist(), strict=True)
        queues: dict[int, deque] = defaultdict(deque)  # by layer: whom a newcomer of that layer may replace, the least first
        held, pairs = self.held.tolist(), []
        for key, score in newcomers:
            layer = key // self.n_expert
            queue = queues[layer]
            while not queue and (victim := next(victims, None)):
                home = victim[0] // self.n_expert
                queues[layer if held[home] > self.floor else home].append(victim)
            if queue and queue[0][1] < score:
                evicted, _ = queue.popleft()
                held[evicted // self.n_expert] -= 1
                held[layer] += 1
                pairs.append((key, evicted))
        return np.array(pairs, np.int64).reshape(-1, 2).T

    def _per_layer(self, keys: np.ndarray) -> np.ndarray:
        """int64 [n_layer]: how many of the keys belong to each layer."""
        return np.bincount(keys // self.n_expert, minlength=len(self.held))

    def _publish(self, key: int, slot: int) -> None:
        layer = key // self.n_expert
        pool = self.pools[self.class_of[layer]]
        pool.owed -= self.held[layer] < self.floor
        self.held[layer] += 1
        self.slot_of[key], self.key_in[slot] = slot, key
        del pool.free[slot]
        self.landing.pop(key, None)
        self.lander.pop(slot, None)

    def _withdraw(self, key: int) -> int:
        """End a residency; the slot that it had is the last to land in."""
        layer, slot = key // self.n_expert, int(self.slot_of[key])
        pool = self.pools[self.class_of[layer]]
        self.held[layer] -= 1
        pool.owed += self.held[layer] < self.floor
        self.slot_of[key] = self.key_in[slot] = -1
        pool.free[slot] = None
        return slot

    def _take(self, pool: Pool, n: int) -> list[int]:
        """Take n slots without a resident out of the ring, and forget what landed there."""
        slots = list(pool.free)[:n]
        for slot in slots:
            self.landing.pop(self.lander.pop(slot, None), None)
            del pool.free[slot]
        return slots
