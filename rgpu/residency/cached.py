"""Experts in slots of memory, for a file that is larger than the memory it may take: `CachedExperts`.

Some experts are resident in an arena; the others are brought from the file when a layer needs them, and kept if they pay. The
process stays under a cap whatever the routing does: more misses take more time, never more memory.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from ..errors import OutOfMemory
from ..ops import Ops
from .arena import SlotArena
from .memory import resident
from .policy import Policy
from .store import Store
from .streamer import Streamer

DECODE = 8  # tokens of a forward, at most, whose routing says what is used often: a decode step, or a window that is verified


@dataclass
class Residency:
    """What decode steps asked of an arena so far: experts used, those of them that were missed, residents replaced."""

    slots_per_layer: float = 0.0  # without those that are spare
    used: int = 0
    missed: int = 0
    swaps: int = 0
    read_bytes: int = 0  # from the file, for prompts too

    @property
    def hit_rate(self) -> float:
        return 1 - self.missed / self.used if self.used else 0.0


class CachedExperts:
    """One lane over an arena's slots, filled from the file.

    A sum takes its experts in ascending order, wherever they come from and in how many waves: the result is that of the mapped
    file, bit for bit.
    """

    learns = True

    def __init__(self, ops: Ops, store: Store, arena: SlotArena, policy: Policy, n_tokens: int, k: int, cap: int):
        """`n_tokens`: of a forward, at most; `k`: experts of a token; `cap`: bytes that the process may have in memory."""
        n_layer, n_expert = arena.table.shape
        self.ops, self.store, self.arena, self.policy, self.k, self.cap = ops, store, arena, policy, k, cap
        self.boxes = ops.empty((n_layer, 2 + n_tokens * k), np.int32)
        shape = n_layer, 2 + min(n_tokens, DECODE) * k
        self.routed, self.near = ops.empty(shape, np.int32), ops.empty(shape, np.int32)
        self.tables = ops.empty((n_layer, n_expert), np.int32)  # the arena's, and what lands in this step
        self.waves = ops.empty((max(map(self._n_waves, range(1, n_tokens + 1))), n_expert), np.int32)
        self.streamer = Streamer(ops, store, arena, policy, self.boxes, self.tables, self.waves)
        self.step, self.counts = 0, Residency()

    def _n_waves(self, n_tokens: int) -> int:
        """Waves of a layer: one if all that it may lack can land together, else each of half of that, so that two overlap."""
        most = min(n_tokens * self.k, self.arena.table.shape[1])
        return 1 if most <= self.arena.spare else -(-most // (self.arena.spare // 2))

    def ffn(self, run, layer) -> None:
        """Add the routed experts' output for this step to `run.ws.out`."""
        i, ops, ids = layer.index, self.ops, run.ids
        box, answer, bank, n_waves = self.boxes[i], self.streamer.answers[i], self.store.banks[i], self._n_waves(len(ids))
        if len(ids) <= DECODE:
            ops.post(self.routed[i], ids)
            ops.post(self.near[i], run.near)
        if n_waves == 1:
            table = self.tables[i]
            ops.post(box, ids, table=table)
            ops.wait(box, answer, table)
            ops.expert_ffn(run.ws.out, run.ws.h, bank, table, ids, run.weights)
            return
        for table in self.waves[:n_waves]:
            ops.post(box, ids, after=run.ws.out)  # asks for the next wave, and says that the one before is computed
            ops.wait(box, answer, table)
            ops.expert_ffn(run.ws.out, run.ws.h, bank, table, ids, run.weights)

    @contextmanager
    def forward(self, n_tokens: int) -> Iterator[None]:
        """What a forward of `n_tokens` runs within.

        Raises GGUFError if experts could not be read: the forward's result is worth nothing, the next one may succeed.
        """
        missed = self.streamer.misses
        self.streamer.begin(self._n_waves(n_tokens))
        try:
            yield
        except BaseException:
            self.streamer.stop()
            raise
        self.streamer.end(lambda: self._after(n_tokens, self.streamer.misses - missed))

    def _after(self, n_tokens: int, missed: int) -> None:
        """Between two forwards. A prompt leaves residents alone: those it added were in slots that were empty."""
        if n_tokens <= DECODE:
            self._turn(n_tokens, missed)
        self._keep_to_the_cap()

    def _turn(self, n_tokens: int, missed: int) -> None:
        """Learn from a decode step what is worth keeping."""
        used, near = (self._keys(boxes) for boxes in (self.routed, self.near))
        self.step += 1
        self.policy.touch(self.step, used, near if n_tokens == 1 else np.setdiff1d(near, used))
        swaps = self.arena.turn(used, self.policy)
        self.counts.used += len(used)
        self.counts.missed += missed
        self.counts.swaps += sum(swap.evicted >= 0 for swap in swaps)

    def _keys(self, boxes: np.ndarray) -> np.ndarray:
        """The keys that the layers have posted; every layer as many ids."""
        n_expert = self.arena.table.shape[1]
        return np.unique(boxes[:, 2 : 2 + boxes[0, 1]] + n_expert * np.arange(len(boxes), dtype=np.int32)[:, None])

    def _keep_to_the_cap(self) -> None:
        """Give up slots if the process has taken more memory than was foreseen. OutOfMemory if there are none to give up."""
        excess = resident() - self.cap
        if excess <= 0:
            return
        if not self.store.shrink(self.arena, self.policy, excess):
            raise OutOfMemory(
                f"{(self.cap + excess) / 1e9:.2f} GB are in memory, {self.cap / 1e9:.2f} are allowed, and no slots of experts "
                "are left to give up: allow more memory (--ram), or open the model with a shorter context (--ctx)"
            )

    @property
    def residency(self) -> Residency:
        """The counts as they are now."""
        slots = sum(len(pool.slots) - self.arena.spare for pool in self.arena.pools)
        return replace(self.counts, slots_per_layer=slots / len(self.boxes), read_bytes=self.streamer.read_bytes)

    def start(self, keys: Iterable[int], progress: Callable[[int, int, str], None] | None = None) -> None:
        """Take the memory of all slots, and bring these experts, best first; `progress(done, total, what)`.

        Raises OutOfMemory, GGUFError.
        """
        slots = range(len(self.arena.key_in))
        self._each(self.store.take, [(slot,) for slot in slots], "taking memory for experts", progress)
        self._keep_to_the_cap()
        self._each(self.store.read, self.arena.fill(keys), "reading experts", progress)

    def _each(self, work: Callable, items: list[tuple], what: str, progress: Callable[[int, int, str], None] | None) -> None:
        for done, _ in enumerate(self.streamer.threads.map(lambda item: work(*item), items), 1):
            if progress and (done % 64 == 0 or done == len(items)):
                progress(done, len(items), what)

    def close(self) -> None:
        self.streamer.close()
