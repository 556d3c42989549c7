"""When queued work is done: after what it depends on, otherwise as late as possible or in a random order, never by itself.

Nothing happens until somebody waits. Then, by lot, either only what leads to the thing waited for is done, or anything that
can be. So work that was not ordered before a wait shows, sooner or later, as stale or overwritten data.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable

from rgpu.errors import DeviceError

REST = 50e-6  # seconds between two looks at a kernel that polls, for the host to go on


class Command:
    """A piece of work; `act(self)` does it and says whether it is done, or rests and wants to be called again."""

    __slots__ = ("act", "after", "followers", "done", "time", "state")

    def __init__(self, act: Callable[["Command"], bool], after: Iterable["Command"]):
        self.act, self.after = act, [c for c in after if not c.done]
        self.followers: list[Command] = []
        self.done, self.time = False, 0.0  # when it was done
        self.state = None  # of an act that rests; its text names it

    def ready(self) -> bool:
        return all(c.done for c in self.after)


class Schedule:
    """The work of one device. A failure ends all of it."""

    def __init__(self, seed: int, patience: float):
        self.random, self.patience = random.Random(seed), patience
        self.lock = threading.Lock()
        self.pending: list[Command] = []
        self.front: list[Command] = []  # those of `pending` that are ready, as far as noticed
        self.failure: str | None = None
        self.waiting = 0  # threads in `finish`
        self.progress = time.monotonic()

    def check(self) -> None:
        if self.failure:
            raise DeviceError(self.failure)

    def submit(self, act: Callable[[Command], bool], after: Iterable[Command]) -> Command:
        with self.lock:
            self.check()
            command = Command(act, after)
            for c in command.after:
                c.followers.append(command)
            self.pending.append(command)
            if not command.after:
                self.front.append(command)
            return command

    def finish(self, goals: Iterable[Command]) -> None:
        """Work until these are done."""
        goals = list(goals)
        with self.lock:
            wanted = None if self.random.random() < 0.5 else ancestors(goals)
            self.waiting += 1
            self.progress = time.monotonic()
        try:
            while not all(c.done for c in goals):
                if not self.step(wanted):
                    time.sleep(REST)
        finally:
            self.waiting -= 1
        self.check()

    def step(self, wanted: set[Command] | None = None) -> bool:
        """Do one thing that is ready, if possible a wanted one; False if all that is ready rests."""
        with self.lock:
            self.check()
            front = self._front()
            chosen = [c for c in front if wanted is None or c in wanted]
            rest = [c for c in front if c not in chosen]
            for some in (chosen, rest):
                self.random.shuffle(some)
                for command in some:
                    if self._act(command):
                        return True
            if front and time.monotonic() - self.progress > self.patience:
                resting = ", ".join(str(c.state) for c in front)
                self._fail(f"{resting}: what it waits for did not come within {self.patience:g} s")
            self.front = []
            return False

    def _front(self) -> list[Command]:
        self.front = [c for c in self.front if not c.done]
        if not self.front:  # look again at everything: a Ctrl-C may have come between a command's end and the end of `_act`
            self.pending = [c for c in self.pending if not c.done]
            self.front = [c for c in self.pending if c.ready()]
        return self.front

    def _act(self, command: Command) -> bool:
        try:
            if not command.act(command):
                return False
        except DeviceError as error:
            self._fail(str(error))
        command.time = self.progress = time.monotonic()
        command.done = True
        self.front += [c for c in command.followers if c.ready()]
        command.after = command.followers = ()
        return True

    def _fail(self, line: str) -> None:
        self.failure = line
        self.pending, self.front = [], []
        self.check()


def ancestors(goals: Iterable[Command]) -> set[Command]:
    """What must be done for these to be done, themselves included."""
    found, stack = set(), [c for c in goals if not c.done]
    while stack:
        command = stack.pop()
        if command not in found:
            found.add(command)
            stack += [c for c in command.after if not c.done]
    return found
