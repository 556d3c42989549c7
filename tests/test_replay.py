"""A recorded step against the same verbs one by one: any number of threads, sessions that alternate, interrupts between rows."""

import numpy as np
import pytest

from rgpu import Engine, EngineConfig
from rgpu.models import architectures
from rgpu.ops import cpu
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
