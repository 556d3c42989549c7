"""The CUDA stand-in does queued work late and in no order but the one asked for; a capture forbids what CUDA forbids.

At the end planted faults: order that is right, and what the stand-in makes of it when a part is missing.
"""

import threading
import time

import numpy as np
import pytest

from rgpu.errors import DeviceError
from tests.cuda_sim import SimDevice
from tests.cuda_sim.toys import Bench, text

SEEDS = range(8)


@pytest.fixture
def sim():
    device = SimDevice()
    yield Bench(device, text("toys.cu"))
    device.close()


def test_nothing_is_done_before_it_is_waited_for(sim):
    locked = sim.device.host(400).array.view(np.float32)
    address, event = sim.device.allocate(400), sim.device.event()
    locked[:] = 1
    sim.stream.upload(address, locked)
    locked[:] = 2  # too early: it is read when its turn comes
    sim.stream.download(locked, address)
    sim.stream.record(event)
    sim.stream.fill(address, 0, 400)
    locked[:] = 3
    event.synchronize()
    assert np.array_equal(locked, np.full(100, 3)) and event.query()


def test_pageable_memory_is_copied_at_once(sim):
    array, address = np.arange(100, dtype=np.float32), sim.device.allocate(400)
    sim.stream.upload(address, array)
    array[:] = 7
    sim.stream.download(array, address)
    assert np.array_equal(array, np.arange(100))


def test_events(sim):
    first, second, plain = (sim.device.event(timed=t) for t in (True, True, False))
    assert first.query()  # not recorded: reached
    sim.stream.record(first)
    address = sim.put(np.zeros(100, np.float32))
    sim.launch("add", 1, 128, address, address, 1.0, 100)
    sim.stream.record(second)
    with pytest.raises(DeviceError, match="not been reached"):
        second.elapsed(first)
    while not second.query():
        pass
    assert 0 < second.elapsed(first) < 10
    with pytest.raises(DeviceError, match="timed=True"):
        second.elapsed(plain)


def test_an_interrupted_wait_can_be_repeated(sim, monkeypatch):
    """Ctrl-C comes between the end of a kernel and the note that it has ended: it is not run twice."""
    x = sim.put(np.zeros(100, np.float32))
    sim.stream.synchronize()
    sim.launch("add", 1, 128, x, x, 1.0, 100)
    run = sim.device.run_launch

    def interrupted(launch):
        monkeypatch.undo()
        run(launch)
        raise KeyboardInterrupt

    monkeypatch.setattr(sim.device, "run_launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sim.stream.synchronize()
    assert np.array_equal(sim.get(x, 100, np.float32), np.ones(100))


# ---- captures ----


def test_a_graph_repeats_what_was_captured(sim):
    device, stream, other = sim.device, sim.stream, sim.device.stream()
    x, y, z = (sim.put(np.full(100, v, np.float32)) for v in (1, 2, 0))
    add, fork, join = sim.module.kernel("add"), device.event(), device.event()
    locked = device.host(400).array.view(np.float32)
    with stream.capture() as graph:
        stream.upload(x, locked)
        stream.record(fork)
        other.wait(fork)
        other.launch(add, (1,), (128,), (y, y, 1.0, 100))
        stream.launch(add, (1,), (128,), (z, x, 0.5, 100))
        other.record(join)
        stream.wait(join)
        stream.launch(add, (1,), (128,), (y, y, 10.0, 100))
    assert device.counted["add"] == 0
    for step in range(1, 4):
        locked[:] = step
        stream.replay(graph)
        assert np.array_equal(sim.get(y, 100, np.float32), np.full(100, 2 + 11 * step))
        assert np.array_equal(sim.get(z, 100, np.float32), np.full(100, step + 0.5))
    assert device.counted["add"] == 9 and device.counted["graph"] == 3


FORBIDDEN = {
    "allocate": lambda s, event, address, locked: s.device.allocate(100),
    "free": lambda s, event, address, locked: s.device.free(address),
    "allocate on the host": lambda s, event, address, locked: s.device.host(100),
    "free on the host": lambda s, event, address, locked: s.device.free_host(locked),
    "load": lambda s, event, address, locked: s.device.load(text("toys.cu")),
    "synchronize": lambda s, event, address, locked: s.stream.synchronize(),
    "synchronize another": lambda s, event, address, locked: s.device.stream().synchronize(),
    "synchronize an event": lambda s, event, address, locked: event.synchronize(),
    "ask for an event": lambda s, event, address, locked: event.query(),
    "upload pageable memory": lambda s, event, address, locked: s.stream.upload(address, np.zeros(9)),
    "download to pageable memory": lambda s, event, address, locked: s.stream.download(np.zeros(9), address),
    "wait for what is not captured": lambda s, event, address, locked: s.stream.wait(event),
    "capture again": lambda s, event, address, locked: s.stream.capture().__enter__(),
}


@pytest.mark.parametrize("caught", [False, True])
@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden_in_a_capture(sim, what, caught):
    event, address, locked = sim.device.event(), sim.device.allocate(100), sim.device.host(100)
    sim.stream.record(event)
    with pytest.raises(DeviceError, match="capture"), sim.stream.capture():
        try:
            FORBIDDEN[what](sim, event, address, locked)
        except DeviceError:  # whoever ignores it has no graph either
            if not caught:
                raise
    with sim.stream.capture() as graph:  # the stream is usable
        sim.stream.fill(address, 7, 100)
    sim.stream.replay(graph)
    assert (sim.get(address, 100, np.uint8) == 7).all()


def test_a_capture_cannot_end_apart(sim):
    other, event, address = sim.device.stream(), sim.device.event(), sim.device.allocate(4)
    with pytest.raises(DeviceError, match="waited for the others"), sim.stream.capture():
        sim.stream.record(event)
        other.wait(event)
        other.fill(address, 0, 4)
    other.synchronize()  # it is outside again
    with pytest.raises(DeviceError, match="capture"):
        other.wait(event)


# ---- flags in mapped memory ----


@pytest.mark.parametrize("alone", [False, True])
def test_a_running_kernel_and_the_host_talk(sim, alone):
    """The host answers in another thread while this one waits for the device; or alone, looking at nothing but the flag."""
    memory = sim.device.host(64, mapped=True)
    box, answer = memory.array.view(np.int32)[:4], memory.array.view(np.int32)[8:12]
    box[:], answer[:] = 0, 0

    def reply(count):
        end = time.monotonic() + 10
        while box[0] < count and time.monotonic() < end:
            time.sleep(1e-4)
        answer[1] = 10 * box[1]
        answer[0] = count  # in this order: NumPy stores at once, and the device reads the flag first

    for count in range(1, 6):
        sim.launch("ping", 1, 1, memory.address, memory.address + 32, count)
        worker = threading.Thread(target=reply, args=(count,))
        worker.start()
        if alone:
            worker.join()
        sim.stream.synchronize()
        worker.join()
        assert box[1] == count**2 and box[2] == 10 * count**2


def test_another_stream_goes_on_while_a_kernel_rests():
    for seed in SEEDS:
        sim = Bench(SimDevice(seed=seed, patience=2), text("toys.cu"))
        flag, other = sim.device.host(64, mapped=True), sim.device.stream()
        words = flag.array.view(np.int32)
        words[:] = 0
        x = sim.put(np.ones(1, np.int32))
        sim.launch("ping", 1, 1, flag.address, flag.address + 32, 1)
        other.download(flag.array[32:36], x)  # what the kernel waits for
        sim.stream.synchronize()
        assert words[0] == 1
        sim.device.close()


# ---- planted ----


def adds_what_was_uploaded(seed, waits):
    sim = Bench(SimDevice(seed=seed), text("toys.cu"))
    device, copies, uploaded = sim.device, sim.device.stream(), sim.device.event()
    locked, result = (device.host(400).array.view(np.float32) for _ in range(2))
    locked[:] = np.arange(100)
    x, out = device.allocate(400), device.allocate(400)
    copies.upload(x, locked)
    copies.record(uploaded)
    if waits:
        sim.stream.wait(uploaded)
    sim.launch("add", 1, 128, out, x, 1.0, 100)
    sim.stream.download(result, out)
    sim.stream.synchronize()
    return np.array_equal(result, np.arange(100) + 1)


def test_planted_a_missing_event_wait():
    assert all(adds_what_was_uploaded(seed, waits=True) for seed in SEEDS)
    assert not all(adds_what_was_uploaded(seed, waits=False) for seed in SEEDS)


def test_planted_an_allocation_in_a_capture(sim):
    scratch = sim.device.allocate(400)
    with sim.stream.capture():
        sim.stream.fill(scratch, 0, 400)
    with pytest.raises(DeviceError, match="forbidden in a capture: to allocate"), sim.stream.capture():
        sim.stream.fill(sim.device.allocate(400), 0, 400)
