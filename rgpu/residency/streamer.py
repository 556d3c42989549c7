"""The thread that brings missing experts into slots while the layer that needs them waits: `Streamer`.

A layer asks by a post in its box; the answer is the box's count, once the layer's table shows the slots. Which of the experts are
worth keeping is not decided here.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from ..ops import Array, Ops
from .arena import SlotArena
from .policy import Policy
from .store import Store

READERS = 4  # reads that are on their way at once: what a disk needs to be busy. Few records are read in parts for it.
POLL = 5e-5  # seconds between two looks at the layers' boxes
CLOSED = 2**31 - 1  # an answer that lets every wait pass

Coming = list[tuple[int, int, list[Future]]]  # key, its slot, the reads


class Streamer:
    """Answers the layers of one forward at a time: `begin`, the forward, `end`.

    In a forward of few tokens a layer asks once, for the experts that it lacks. In one of many it asks wave by wave: for those of
    all its ids in ascending order, as many at a time as half of the spare slots hold.
    """

    def __init__(
        self, ops: Ops, store: Store, arena: SlotArena, policy: Policy, boxes: Array, tables: Array, waves: Array
    ):
        """Int32 arrays: boxes [n_layer, 2 + ids], tables [n_layer, n_expert] for asking once, waves [most waves, n_expert]."""
        self.ops, self.store, self.arena, self.policy = ops, store, arena, policy
        self.boxes, self.tables, self.waves = boxes, tables, waves
        self.answers = ops.empty((len(boxes), 1), np.int32)
        self.threads = ThreadPoolExecutor(READERS + 1, "rgpu-streamer")
        self.over = threading.Event()
        self.running: Future | None = None
        self.after: Callable[[], None] | None = None
        self.reading: list[Future] = []
        self.misses = self.read_bytes = 0

    def begin(self, n_waves: int) -> None:
        # A forward that was broken off, even while it was being stopped, leaves nothing but what is resident.
        self.stop()
        self.arena.forget_all()
        self.tables[:] = self.arena.table
        self.answers[:, 0] = self.boxes[:, 0]
        self.over.clear()
        self.running = self.threads.submit(self._follow, n_waves)

    def end(self, after: Callable[[], None]) -> None:
        """The forward is over; `after` runs in the thread, where no Ctrl-C can cut it in two.

        Raises what went wrong with reading (GGUFError; then `after` does not run), or what `after` raises.
        """
        self.after = after
        self.stop().result()

    def stop(self) -> Future | None:
        """Return when nothing is under way any more, with what was."""
        self.over.set()
        running = self.running
        if running:
            wait([running])
            wait(self.reading)
            self.running = self.after = None
        return running

    def close(self) -> None:
        self.stop()
        self.threads.shutdown()

    # ---- the thread ----

    def _follow(self, n_waves: int) -> None:
        try:
            while not self.over.is_set():
                asking = np.flatnonzero(self.boxes[:, 0] > self.answers[:, 0])
                if not len(asking):
                    time.sleep(POLL)
                elif n_waves == 1:
                    self._answer(int(asking[0]))
                else:
                    self._answer_in_waves(int(asking[0]), n_waves)
            if self.after:
                self.after()
        except BaseException:
            # The forward goes on without the experts that lack, so that it comes to its end; then `end` raises.
            self.waves[:] = -1
            self.answers[:] = CLOSED
            raise

    def _answer(self, layer: int) -> None:
        """Bring all experts that are asked for."""
        box = self.boxes[layer]
        experts = np.unique(box[2 : 2 + box[1]])
        self.arena.make_room(layer, len(experts), self.policy)
        self._arrived(self._start(layer, experts), self.tables[layer])
        self.ops.publish(self.answers[layer], int(box[0]))

    def _answer_in_waves(self, layer: int, n_waves: int) -> None:
        """Bring wave after wave, each while the one before is computed."""
        box = self.boxes[layer]
        first = int(box[0])
        resident = self.arena.table[layer].copy()
        groups, kept = self._plan(layer, resident, *np.unique(box[2 : 2 + box[1]], return_counts=True))
        self.waves[:n_waves] = -1
        coming = self._start(layer, groups[0][1])
        for wave, (experts, _) in enumerate(groups):
            table = self.waves[wave]
            table[experts] = resident[experts]
            self._arrived(coming, table)
            for key, _, _ in coming:
                if key in kept:
                    self.arena.settle(key)
            last = wave + 1 == len(groups)
            # What follows the last group is empty.
            self.ops.publish(self.answers[layer], first + (n_waves - 1 if last else wave))
            if last:
                return
            # The wave before this one is computed, or this one would not have been asked for: its slots are free.
            coming = self._start(layer, groups[wave + 1][1])
            while box[0] <= first + wave:
                if self.over.wait(POLL):
                    return

    def _plan(self, layer: int, resident: np.ndarray, experts: np.ndarray, counts: np.ndarray) -> tuple[list, set[int]]:
        """Groups of (experts, those of them to bring), ascending; the keys to bring that are worth an empty slot.

        Of a prompt's experts, its most used ones fill the layer's share of the slots while that is not full.
        """
        missing = resident[experts] < 0
        n_missing, at_once = int(missing.sum()), self.arena.spare // 2
        n_groups = max(-(-n_missing // at_once), 1)
        # By the number of missing ones before each; what is resident behind the last of them goes with the last group.
        group_of = np.minimum((np.cumsum(missing) - missing) // at_once, n_groups - 1)
        groups = [(experts[group_of == g], experts[(group_of == g) & missing]) for g in range(n_groups)]
        wanted = experts[missing][np.argsort(-counts[missing], kind="stable")][: self.arena.room(layer)]
        return groups, set((wanted + layer * self.store.n_expert).tolist())

    def _start(self, layer: int, experts: Sequence[int]) -> Coming:
        """Begin to read some of a layer's experts into slots where nothing is resident; all that was begun before is there."""
        coming, self.reading, parts = [], [], -(-READERS // max(len(experts), 1))
        for expert in experts:
            key = layer * self.store.n_expert + int(expert)
            slot = self.arena.land(key)
            reads = [self.threads.submit(self.store.read, key, slot, part, parts) for part in range(parts)]
            self.reading += reads
            coming.append((key, slot, reads))
        return coming

    def _arrived(self, coming: Coming, table: np.ndarray) -> None:
        """Wait for the reads, and enter the slots in the layer's table."""
        for key, slot, reads in coming:
            self.read_bytes += sum(read.result() for read in reads)
            table[key % self.store.n_expert] = slot
        self.misses += len(coming)
