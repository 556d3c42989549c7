"""A recorded step against the same verbs one by one: any number of threads, sessions that alternate, interrupts between rows."""

import threading
import time

import numpy as np
import pytest

from rgpu import Engine, EngineConfig
from rgpu.models import architectures
from rgpu.ops import Needs, cpu
from rgpu.ops.reference import ReferenceOps
from tests.tiny import stock_gguf

ARCHS = sorted(architectures())
THREADS = (1, 2, 3, 4)
LENGTHS = (1, 2, 3, 5, 33)  # of the forwards that follow each other


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Wide enough for blocks of 256: all of the quantised paths run."""
    folder = tmp_path_factory.mktemp("replay")
    return {arch: stock_gguf(folder / f"{arch}.gguf", arch, quant="Q4_K", k=True) for arch in ARCHS}


def tokens(n, seed=0):
    return [int(t) for t in np.random.default_rng(seed).integers(0, 500, n)]


def forwards(engine, session):
    """Logits of a fixed sequence of forwards, twice: the second time what was recorded comes back."""
    out = []
    for _ in range(2):
        session.reset()
        out += [session.forward(tokens(n, n)) for n in LENGTHS]
    return np.stack(out)


@pytest.mark.parametrize("arch", ARCHS)
def test_recorded_steps_give_the_bits_of_single_verbs(paths, arch):
    with Engine(EngineConfig(paths[arch], threads=2, n_batch=16)) as engine:
        recorded = forwards(engine, engine.session())
        seen = []
        engine.executor.trace = lambda layer, part, x: seen.append(layer)  # a trace has every verb run at once
        np.testing.assert_array_equal(forwards(engine, engine.session()), recorded)
    assert seen and recorded.std() > 0.5
    np.testing.assert_array_equal(recorded[: len(LENGTHS)], recorded[len(LENGTHS) :])


@pytest.mark.parametrize("arch", ARCHS)
def test_threads_do_not_change_a_bit(paths, arch, monkeypatch):
    monkeypatch.setattr(cpu.kernels, "most_threads", lambda: 4)
    logits = []
    for threads in THREADS:
        with Engine(EngineConfig(paths[arch], threads=threads)) as engine:
            assert engine.executor.ops.pool.threads == threads
            logits.append(forwards(engine, engine.session()))
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])


@pytest.mark.parametrize("arch", ARCHS)
def test_sessions_that_alternate_do_not_mix(paths, arch):
    """More sessions than recordings that are kept."""
    with Engine(EngineConfig(paths[arch], n_ctx=64)) as engine:
        one = engine.session()
        alone = [[one.forward([t]) for t in tokens(4, seed)] + [one.reset()] for seed in range(cpu.KEPT_TABLES + 2)]
        sessions = [engine.session() for _ in alone]
        for step in range(4):
            for seed, session in enumerate(sessions):
                np.testing.assert_array_equal(session.forward([tokens(4, seed)[step]]), alone[seed][step])
        assert len(engine.executor.ops.tables) == cpu.KEPT_TABLES


@pytest.mark.parametrize("arch", ARCHS)
def test_an_interrupt_between_rows_leaves_a_whole_session(paths, arch, monkeypatch):
    monkeypatch.setattr(cpu, "FIRST_SLICE", 7)
    monkeypatch.setattr(cpu, "UNHEARD", 0)
    with Engine(EngineConfig(paths[arch], n_batch=16)) as engine:
        wanted = engine.session().forward(tokens(40))
        pool, session = engine.executor.ops.pool, engine.session()
        run, slices = pool.run, []

        def interrupted(*arguments):
            slices.append(arguments)
            if len(slices) == at:
                raise KeyboardInterrupt
            run(*arguments)

        for at in (1, 2, 9, 20):
            session.reset()
            session.forward(tokens(40)[:10])
            slices.clear()
            monkeypatch.setattr(pool, "run", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.forward(tokens(40)[10:])
            monkeypatch.setattr(pool, "run", run)
            assert len(slices) >= at and len(session.tokens) == session.state.n_past in (0, 10)
            session.forward(session.sync(tokens(40)[:10]))
            np.testing.assert_array_equal(session.forward(tokens(40)[10:]).argmax(), wanted.argmax())


@pytest.mark.parametrize("threads", [0, 1, 2, 3])  # 0: the reference
def test_a_question_is_answered_by_another_thread(monkeypatch, threads):
    """A recorded step asks for what its table lacks, waits, and goes on with what the answer has brought, however late."""
    monkeypatch.setattr(cpu.kernels, "most_threads", lambda: 4)
    ops = cpu.CpuOps(threads) if threads else ReferenceOps()
    none = frozenset()
    ops.prepare(Needs(8, 32, 4, 64, 64, matrices=none, embeddings=none, experts=none, kv="F16", recurrent=False), None)
    rng, n_expert = np.random.default_rng(0), 32
    routed, ids = ops.empty((2, 4), np.int32), ops.empty((2, 4), np.int32)
    table, seen = ops.empty((n_expert,), np.int32), ops.empty((n_expert,), np.int32)
    large, copied = ops.empty((1 << 21,), np.float32), ops.empty((1 << 21,), np.float32)
    box, last = ops.empty((10,), np.int32), ops.empty((10,), np.int32)
    answer = ops.empty((1,), np.int32)

    def step():
        ops.copy(ids, routed)
        ops.post(box, ids, table=table)
        ops.wait(box, answer, table)
        ops.copy(seen, table)
        ops.copy(copied, large)
        ops.post(last, ids, after=copied)

    def serve(wanted, ends):
        if wanted:
            while box[0] == answer[0]:
                time.sleep(1e-4)
            assert sorted(box[2 : 2 + box[1]]) == sorted(wanted)
            time.sleep(0.01)
            table[wanted] = 5
            ops.publish(answer, int(box[0]))
        while last[0] == count:
            pass
        ends.append(float(copied[-1]))  # at once, while a copy that was not waited for would still go on

    for turn in range(8):
        routed[:] = [rng.permutation(n_expert)[:4] for _ in range(2)]
        table[:] = rng.choice([-1, 3], n_expert) if turn != 3 else 3
        large[-1], count, ends = turn + 1, int(last[0]), []
        wanted = [int(e) for e in routed.reshape(-1) if table[e] < 0]
        expected = table.copy()
        expected[wanted] = 5
        thread = threading.Thread(target=serve, args=(wanted, ends))
        thread.start()
        ops.replay("key", step)
        thread.join(60)
        np.testing.assert_array_equal(seen, expected)
        assert ends == [turn + 1] and last.tolist() == [turn + 1, 8, *routed.reshape(-1)]
