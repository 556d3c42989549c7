"""The stand-in's streams, events and captures: they say what depends on what; `schedule.py` decides when it is done."""

import contextlib
import threading
from collections.abc import Callable, Sequence

import numpy as np

from rgpu.errors import DeviceError

from .schedule import Command, ancestors


class Capture:
    """What streams record while they are captured; afterwards, the graph. Its commands are never done: each run makes others."""

    def __init__(self):
        self.nodes: list[Command] = []
        self.tails: dict[SimStream, frozenset[Command]] = {}  # what the streams that take part had queued before
        self.end: frozenset[Command] = frozenset()
        self.last_run: frozenset[Command] = frozenset()
        self.over = self.broken = False

    def join(self, stream: "SimStream", after: frozenset[Command]) -> None:
        self.tails[stream] = stream.tail
        stream.tail, stream.recording = after, self

    def close(self, origin: "SimStream") -> None:
        self.end, self.over = origin.tail, True
        for stream, tail in self.tails.items():
            stream.tail, stream.recording = tail, None
        self.tails = {}


class SimEvent:
    def __init__(self, device, timed: bool):
        self.device, self.timed = device, timed
        self.mark: Command | None = None  # the work that reaches it
        self.recording: Capture | None = None

    def query(self) -> bool:
        self._outside("asked for")
        if self.mark is not None and not self.mark.done:
            self.device.schedule.step()  # so that a loop of queries ends
        return self.mark is None or self.mark.done

    def synchronize(self) -> None:
        self._outside("waited for")
        if self.mark is not None:
            self.device.schedule.finish([self.mark])

    def elapsed(self, since: "SimEvent") -> float:
        self._outside("asked for")
        if not (self.timed and since.timed):
            raise DeviceError("the time between events that were made without timed=True")
        if None in (self.mark, since.mark) or not (self.mark.done and since.mark.done):
            raise DeviceError("the time between events that have not been reached")
        return self.mark.time - since.mark.time

    def _outside(self, what: str) -> None:
        self.device.check(waiting=True)
        if self.recording is not None:
            raise DeviceError(f"an event that was recorded in a capture is {what}")


class SimStream:
    def __init__(self, device):
        self.device = device
        self.tail: frozenset[Command] = frozenset()  # what comes next starts after these
        self.recording: Capture | None = None

    def _queue(self, act: Callable[[Command], bool]) -> Command:
        self.device.check()
        if self.recording is None:
            command = self.device.schedule.submit(act, self.tail)
        else:
            command = Command(act, self.tail)
            self.recording.nodes.append(command)
        self.tail = frozenset([command])
        return command

    # ---- copies ----

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.device.device_range(address, array.nbytes, "upload to")
        if not self._page_locked(array):
            array = array.copy()
        self._queue(lambda command: self.device.move("upload", address, array.ctypes.data, array.nbytes))

    def download(self, array: np.ndarray, address: int) -> None:
        assert array.flags.c_contiguous and array.flags.writeable
        self.device.device_range(address, array.nbytes, "download from")
        late = self._page_locked(array)
        self._queue(lambda command: self.device.move("download", array.ctypes.data, address, array.nbytes))
        if not late:
            self.device.schedule.finish(self.tail)

    def copy(self, address: int, source: int, nbytes: int) -> None:
        self.device.device_range(address, nbytes, "copy to")
        self.device.device_range(source, nbytes, "copy from")
        if abs(address - source) < nbytes:
            raise DeviceError(f"copy of {nbytes:,} bytes between ranges that overlap")
        self._queue(lambda command: self.device.move("copy", address, source, nbytes))

    def fill(self, address: int, byte: int, nbytes: int) -> None:
        assert 0 <= byte <= 255
        self.device.device_range(address, nbytes, "fill of")
        self._queue(lambda command: self.device.set_bytes(address, byte, nbytes))

    def _page_locked(self, array: np.ndarray) -> bool:
        owner = self.device.storage.owner(array.ctypes.data, array.nbytes)
        if owner is None and self.recording is not None:
            self.device.refuse(self.recording, "a copy from or to memory that is not page-locked")
        return owner is not None

    # ---- kernels, order ----

    def launch(self, kernel, grid: Sequence[int], block: Sequence[int], arguments: Sequence, shared: int = 0) -> None:
        self._queue(self.device.prepared(kernel, tuple(grid), tuple(block), tuple(arguments), shared))

    def record(self, event: SimEvent) -> None:
        event.mark, event.recording = self._queue(lambda command: True), self.recording

    def wait(self, event: SimEvent) -> None:
        self.device.check()
        if event.mark is None:
            return
        if event.recording is not self.recording:
            if event.recording is None:
                self.device.refuse(self.recording, "to wait for an event that was recorded outside")
            if event.recording.over or self.recording is not None:
                raise DeviceError("a stream waits for an event of a capture that has ended, or of another one")
            event.recording.join(self, frozenset())
        self.tail |= {event.mark}

    def synchronize(self) -> None:
        self.device.check(waiting=True)
        if self.recording is not None:
            raise DeviceError("a stream is waited for while it is captured")
        self.device.schedule.finish(self.tail)

    # ---- graphs ----

    @contextlib.contextmanager
    def capture(self):
        thread = threading.get_ident()
        self.device.outside("to capture")
        if self.recording is not None:
            raise DeviceError("the stream takes part in another thread's capture")
        capture = self.device.capturing[thread] = Capture()
        capture.join(self, frozenset())
        try:
            yield capture
        finally:
            del self.device.capturing[thread]
            capture.close(self)
        if capture.broken:
            raise DeviceError("the capture did something that is forbidden in one")
        if len(ancestors(capture.end)) < len(capture.nodes):
            raise DeviceError("a capture ends before its first stream has waited for the others")

    def replay(self, graph: Capture) -> None:
        if self.recording is not None:
            self.device.refuse(self.recording, "to replay a graph")
        assert graph.over, "the capture has not ended"
        made: dict[Command, Command] = {}
        for node in graph.nodes:
            after = {made[c] for c in node.after} if node.after else self.tail | graph.last_run
            made[node] = self.device.schedule.submit(node.act, after)
        self.tail = graph.last_run = frozenset(made[c] for c in graph.end) or self.tail
        self.device.counted["graph"] += 1
