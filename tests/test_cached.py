"""Experts in slots give the bits of the mapped file: any arena, policy, number of threads, backend, form of file, length.

And they still do after reads that fail, Ctrl-C at any point, and memory that had to be given up.
"""

import contextlib
import errno
import faulthandler
import os
import re
import sys
import threading

import numpy as np
import pytest

from rgpu import Engine, EngineConfig, SamplingParams
from rgpu.errors import GGUFError, OutOfMemory
from rgpu.models import architectures
from rgpu.ops import cpu
from rgpu.residency import cached, streamer
from rgpu.residency.budget import slots_within
from tests.arenas import FLOOR, FORMS, N_EXPERT, K, assert_residents_are_whole, capped, tokens, written

pytestmark = pytest.mark.usefixtures("fresh_cache")

ARCHS = sorted(architectures())
LENGTHS = (1, 2, 8, 9, 33, 130)
# Slots per layer, backend, threads, policy, tokens of a chunk, form of file.
CASES = [
    (FLOOR, "cpu", 1, "rotary", 512, "per_expert"),
    (FLOOR, "cpu", 2, "lru", 16, "stacked"),
    (8, "cpu", 2, "rotary", 512, "split"),
    (10, "cpu", 1, "static", 16, "fused"),
    (12, "cpu", 2, "lfru", 512, "per_expert"),
    (N_EXPERT, "cpu", 2, "rotary", 16, "stacked"),
    (FLOOR, "reference", 1, "rotary", 16, "fused"),
    (9, "reference", 1, "lfru", 512, "stacked"),
]


@pytest.fixture(autouse=True)
def no_hang():
    """What waits for ever ends the whole run, with a traceback of every thread."""
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("rgpu-streamer")]


@pytest.fixture(scope="module", params=ARCHS)
def paths(request, tmp_path_factory):
    """The same model in each form of file."""
    folder = tmp_path_factory.mktemp(request.param)
    return {form: written(folder, request.param, form) for form in FORMS}


@pytest.fixture(scope="module")
def mapped(paths):
    """Engines of the mapped file, by backend and tokens of a chunk."""
    with contextlib.ExitStack() as stack:
        kept = {}

        def engine(device="cpu", n_batch=16):
            if (device, n_batch) not in kept:
                config = EngineConfig(paths["stacked"], device=device, n_batch=n_batch, n_ctx=256)
                kept[device, n_batch] = stack.enter_context(Engine(config))
            return kept[device, n_batch]

        yield engine


def answers(engine):
    """Logits of prompts, of steps of one token and of windows, in sessions that follow each other."""
    out = [engine.session().forward(tokens(n, n)) for n in LENGTHS]
    session = engine.session()
    session.forward(tokens(12))
    out += [session.forward([token]) for token in tokens(30, 1)]
    out += [session.forward(tokens(n, n)) for n in (3, 5, 1, 8)]
    return np.stack(out)


@pytest.mark.parametrize(("share", "device", "threads", "policy", "n_batch", "form"), CASES)
def test_cached_equals_mapped(paths, mapped, share, device, threads, policy, n_batch, form):
    wanted = answers(mapped(device, n_batch))
    assert wanted.std() > 0.5
    with capped(paths[form], share, device=device, threads=threads, policy=policy, n_batch=n_batch) as engine:
        experts = engine.cached
        assert experts._n_waves(1) == experts._n_waves(2) == 1 and min(map(experts._n_waves, LENGTHS[2:])) > 1
        np.testing.assert_array_equal(answers(engine), wanted)
        counts = engine.residency
        assert counts.slots_per_layer == share and counts.used > 30 * K * len(experts.boxes)
        if share < N_EXPERT:
            assert counts.missed > 100 and (counts.swaps > 10 or policy == "static")
        assert_residents_are_whole(engine)


def test_a_prompt_fills_empty_slots_with_what_it_uses_most_and_replaces_nothing(paths):
    share = 8
    with capped(paths["per_expert"], share, device="reference") as engine:
        arena = engine.cached.arena
        engine.session().forward(tokens(40))
        residents = arena.table >= 0
        assert (residents.sum(axis=1) == share).all()
        for there, box in zip(residents, engine.cached.boxes, strict=True):
            uses = np.bincount(box[2 : 2 + 40 * K], minlength=N_EXPERT)
            assert uses[there].min() >= uses[~there].max() and uses.max() > uses[there].min()
        assert_residents_are_whole(engine)
        before = arena.table.copy()
        engine.session().forward(tokens(40, 1))
        np.testing.assert_array_equal(arena.table, before)
        assert engine.residency.used == 0, "decode steps alone are counted"


def test_what_is_brought_at_the_start_is_there(paths, mapped):
    keys = [layer * N_EXPERT + expert for layer in range(3) for expert in range(2, 2 + FLOOR)]
    with capped(paths["stacked"], FLOOR) as engine:
        said = []
        engine.cached.start(keys, lambda *arguments: said.append(arguments))
        assert sorted(engine.cached.arena.key_in[engine.cached.arena.key_in >= 0]) == keys
        assert said[-1] == (len(keys), len(keys), "reading experts")
        assert_residents_are_whole(engine)
        np.testing.assert_array_equal(answers(engine), answers(mapped(n_batch=512)))


def test_what_a_run_has_learned_is_there_at_the_next_start(paths, mapped):
    """The experts that it used most, in as many slots as there are now; any policy reads it."""
    wanted = answers(mapped(n_batch=512))
    with capped(paths["stacked"], 12, policy="lfru") as engine:
        answers(engine)
        scores = engine.cached.policy.state()
    with capped(paths["stacked"], 8, policy="rotary") as engine:
        there = engine.cached.arena.table >= 0
        assert there.sum() == 8 * len(there) and (there.sum(axis=1) >= FLOOR).all()
        assert scores[there.reshape(-1)].mean() > 2 * scores[~there.reshape(-1)].mean() > 0
        assert_residents_are_whole(engine)
        np.testing.assert_array_equal(answers(engine), wanted)


def test_conversations_in_two_sessions_are_those_of_the_mapped_file(paths, mapped):
    """Prefixes that are reused, edits that go back to a snapshot, another session in between."""
    first, second = ({"role": "user", "content": text} for text in ("the quick brown fox " * 8, "jumps over " * 9))
    chats = [[first], [first, second], [second], [first, second, second], [second, first]]
    params = SamplingParams(temperature=0, max_tokens=10)

    def talk(engine):
        sessions, said = (engine.session(), engine.session()), []
        for turn, messages in enumerate(chats):
            session = sessions[turn == 2]
            said.append([piece.token for piece in session.generate(messages, params)])
            said[-1] += [session.stats.reused_tokens, len(session.snapshots)]
        return said

    with capped(paths["split"], FLOOR, n_batch=16) as engine:
        said = talk(engine)
        assert said == talk(mapped()) and said[1][-2] > 0
        assert engine.residency.missed > 100


# ---- faults ----


@pytest.fixture
def reads(monkeypatch):
    """`reads.fail(at)`: the at-th read of an expert from now on fails, and so do all that follow; 0: none does."""
    preadv = os.preadv

    class Reads:
        left = 0

        def fail(self, at):
            self.left = at

    reads = Reads()

    def patched(*arguments):
        if reads.left:
            reads.left = max(reads.left - 1, 1)
            if reads.left == 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", patched)
    return reads


def break_off(session, n, error, match=None):
    """Steps of n tokens until one raises this; those before it."""
    steps = []
    with pytest.raises(error, match=match):
        for seed in range(20):  # a step may find all of its experts
            session.forward(tokens(n, seed))
            steps.append(tokens(n, seed))
    return steps


def assert_it_goes_on(engine, session, mapped, *steps):
    """The session has all of the steps, or went back to its beginning, and computes what follows as the mapped file's engine."""
    other = mapped.session()
    if session.tokens:
        assert session.tokens == sum(steps, [])
        for each in steps:
            other.forward(each)
    assert len(session.tokens) == session.state.n_past
    for each in (tokens(40, 9), [7], [8], tokens(5, 9)):
        np.testing.assert_array_equal(session.forward(each), other.forward(each))
    assert_residents_are_whole(engine)


@pytest.mark.parametrize(("device", "n", "at"), [("cpu", 1, 2), ("cpu", 40, 9), ("reference", 5, 2), ("reference", 40, 30)])
def test_a_read_error_ends_one_forward(paths, mapped, reads, device, n, at):
    with capped(paths["per_expert"], FLOOR, device=device, n_batch=16) as engine:
        session = engine.session()
        session.forward(tokens(10))
        reads.fail(at)
        error = rf"^{paths['per_expert']}: cannot be read at byte \d+: Input/output error$"
        steps = break_off(session, n, GGUFError, error)
        assert engine.cached.streamer.running is None
        with pytest.raises(GGUFError, match=error):
            session.forward(tokens(30, 2))
        reads.fail(0)
        assert_it_goes_on(engine, session, mapped(device), tokens(10), *steps)


def interrupted_verb(name):
    """The at-th call of a verb raises KeyboardInterrupt; for backends that run verbs at once."""

    def patch(monkeypatch, engine, at):
        ops, calls = engine.executor.ops, []
        verb = getattr(ops, name)

        def raising(*arguments, **named):
            calls.append(name)
            if len(calls) == at:
                raise KeyboardInterrupt
            verb(*arguments, **named)

        monkeypatch.setattr(ops, name, raising)

    return patch


def interrupted_rows(monkeypatch, engine, at):
    """KeyboardInterrupt between two slices of a recorded step."""
    pool, slices = engine.executor.ops.pool, []
    run = pool.run

    def raising(*arguments):
        slices.append(arguments)
        if len(slices) == at:
            raise KeyboardInterrupt
        run(*arguments)

    monkeypatch.setattr(pool, "run", raising)


@pytest.mark.parametrize(
    ("device", "n", "at", "interrupt"),
    [
        ("cpu", 1, 3, interrupted_rows),
        ("cpu", 40, 5, interrupted_rows),
        ("reference", 1, 2, interrupted_verb("wait")),
        ("reference", 40, 5, interrupted_verb("wait")),
        ("reference", 40, 4, interrupted_verb("post")),
        ("reference", 1, 3, interrupted_verb("expert_ffn")),
    ],
)
def test_an_interrupt_leaves_a_whole_engine(paths, mapped, monkeypatch, device, n, at, interrupt):
    monkeypatch.setattr(cpu, "FIRST_SLICE", 7)
    monkeypatch.setattr(cpu, "UNHEARD", 0)
    with capped(paths["stacked"], FLOOR, device=device, n_batch=16) as engine:
        session = engine.session()
        session.forward(tokens(10))
        with monkeypatch.context() as patched:
            interrupt(patched, engine, at)
            steps = break_off(session, n, KeyboardInterrupt)
        assert engine.cached.streamer.running is None
        assert_it_goes_on(engine, session, mapped(device), tokens(10), *steps)


def test_a_second_interrupt_while_reads_are_under_way(paths, mapped, monkeypatch):
    """Impatience: the forward is given up while the thread still reads, and would enter what comes where the next one looks."""
    preadv, reading, go_on, following = os.preadv, threading.Event(), threading.Event(), []

    def slow(*arguments):
        reading.set()
        assert go_on.wait(60)
        return preadv(*arguments)

    def interrupted(*arguments):
        assert reading.wait(60)
        raise KeyboardInterrupt

    with capped(paths["stacked"], FLOOR, device="reference") as engine:
        session, steps = engine.session(), [[token] for token in tokens(10)]
        for step in steps:
            session.forward(step)
        follow = engine.cached.streamer._follow

        def watched(n_waves):
            following.append("begins")
            try:
                follow(n_waves)
            finally:
                following.append("ends")

        monkeypatch.setattr(engine.cached.streamer, "_follow", watched)
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", slow)
            patched.setattr(engine.executor.ops, "wait", interrupted)
            patched.setattr(streamer, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.forward([3])
        assert engine.cached.streamer.running is not None
        threading.Timer(0.05, go_on.set).start()
        assert_it_goes_on(engine, session, mapped("reference", 512), *steps)
        assert following == ["begins", "ends"] * 5, "one at a time"


def test_ctrl_c_cannot_reach_the_bookkeeping(paths, monkeypatch):
    """Python delivers signals to the main thread alone: half a turn would leave a slot with two owners."""
    with capped(paths["stacked"], FLOOR, device="reference") as engine:
        arena, threads = engine.cached.arena, set()
        for name in ("turn", "land", "settle"):
            method = getattr(arena, name)
            monkeypatch.setattr(arena, name, lambda *a, method=method: threads.add(threading.current_thread()) or method(*a))
        session = engine.session()
        session.forward(tokens(40))
        session.forward([1])
        assert threads and threading.main_thread() not in threads


# ---- memory ----

MB = 10**6
FORTY = ([0] * 40, [MB], 256, 8)  # layers of one class; experts, and those of a token
THREE = ([0, 1, 0], [2 * MB, 5 * MB], 8, 2)


@pytest.mark.parametrize(
    ("available", "model", "slots", "spare"),
    [
        (1000, FORTY, [24 * 40 + 16], 16),
        (416, FORTY, [10 * 40 + 16], 16),  # the least
        (10**6, FORTY, [256 * 40 + 16], 16),  # everything
        (184, THREE, [2 * 8 + 16, 8 + 16], 16),  # 8 · (2 · 2 + 5) + 16 · (2 + 5)
        (183, THREE, [2 * 7 + 16, 7 + 16], 16),
        (10**6, THREE, [2 * 8 + 16, 8 + 16], 16),
        (20, ([0], [MB], 4, 3), [4 + 16], 16),  # fewer experts than k + 2
        (1000, ([0], [MB], 64, 10), [64 + 20], 20),  # spare are what two tokens use
    ],
)
def test_how_many_slots_fit(available, model, slots, spare):
    assert slots_within(available * MB, *model) == (slots, spare)


@pytest.mark.parametrize(("model", "least"), [(FORTY, 416), (THREE, 148)])
def test_memory_that_is_too_small_says_how_much_is_enough(model, least):
    for available in (-500, 0, 1, least // 2, least - 1):
        with pytest.raises(OutOfMemory) as error:
            slots_within(available * MB, *model)
        more = float(re.search(r"allow ([0-9.]+) GB more", str(error.value))[1])
        assert least <= available + more * 1000 < least + 10
        slots_within(available * MB + round(more * 1e9), *model)



def test_slots_are_given_up_when_something_else_takes_memory(paths, mapped, monkeypatch):
    wanted = answers(mapped(n_batch=512))
    with capped(paths["per_expert"], 12) as engine:
        experts = engine.cached
        taken = iter([6 * max(experts.store.nbytes)] * 2)
        monkeypatch.setattr(cached, "resident", lambda: experts.cap + next(taken, 0))
        np.testing.assert_array_equal(answers(engine), wanted)
        assert next(taken, None) is None and FLOOR <= engine.residency.slots_per_layer < 12
        assert_residents_are_whole(engine)
        kept = np.concatenate([pool.slots for pool in experts.arena.pools])
        gone = [place for slot, place in enumerate(experts.store.places) if slot not in kept]
        assert len(gone) >= 12
        assert not any(experts.store.memory[cls][part].any() for cls, part in gone), "the system has taken the bytes"


def test_no_slots_left_to_give_up_is_one_clear_error(paths, mapped, monkeypatch):
    with capped(paths["per_expert"], FLOOR) as engine:
        session = engine.session()
        session.forward(tokens(10))
        with monkeypatch.context() as patched:
            patched.setattr(cached, "resident", lambda: engine.cached.cap + 10**9)
            for n in (1, 20):
                with pytest.raises(OutOfMemory, match=r"^1001.00 GB are in memory, 1000.00 are allowed, .*--ram.*--ctx\)$"):
                    session.forward(tokens(n))
        assert_it_goes_on(engine, session, mapped(n_batch=512), tokens(10))
