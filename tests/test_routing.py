"""Traces of real runs: what is recorded is what the router chose, what is forced is what is computed."""

import os
from pathlib import Path

import numpy as np
import pytest

from rgpu import Engine, EngineConfig
from rgpu.errors import RgpuError
from rgpu.models import architectures
from rgpu.residency.trace import RoutingTrace
from tests.arenas import FLOOR, N_EXPERT, K, capped, few_slots, tokens, written
from tests.tiny import stock_gguf

pytestmark = pytest.mark.usefixtures("fresh_cache")

N_LAYER = 3  # of the smaller architecture
STEPS = [tokens(40, 1), [3], [5], tokens(4, 2), tokens(9, 3), [7]]  # of 56 tokens; chunks of 16
N_TOKENS = sum(map(len, STEPS))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return written(tmp_path_factory.mktemp("routing"), "qwen3moe", "per_expert")


def run(path, device="reference", **wishes):
    """Logits of STEPS, and the trace of them."""
    with Engine(EngineConfig(path, device=device, n_ctx=128, n_batch=16, **{"trace": path.parent / "t.npz"} | wishes)) as engine:
        session = engine.session()
        logits = np.stack([session.forward(step) for step in STEPS])
    return logits, RoutingTrace.load(path.parent / "t.npz")


def generated(folder, n_tokens, n_layer=N_LAYER, n_expert=N_EXPERT, k=K, seed=1):
    """A random trace, and its file."""
    trace, path = RoutingTrace.generate(n_tokens, n_layer, n_expert, k, seed=seed), folder / f"{seed}-{n_tokens}-{n_layer}.npz"
    trace.save(path)
    return trace, path


@pytest.mark.parametrize("arch", sorted(architectures()))
def test_what_is_recorded_is_what_the_router_chose(tmp_path, arch):
    """In the order of the tokens, whatever the chunks; float32 weights, so that backends choose alike."""
    path = stock_gguf(tmp_path / f"{arch}.gguf", arch)
    with Engine(EngineConfig(path, device="reference", n_ctx=128, n_batch=16, trace=tmp_path / "trace.npz")) as engine:
        ops, chosen = engine.executor.ops, []
        route = ops.route

        def watched(ids, weights, logits, near):
            ranks = np.argsort(-logits, axis=1, kind="stable")
            route(ids, weights, logits, near)
            chosen.append((ranks[:, :3], weights.copy(), ranks[:, 3:6]))

        ops.route = watched
        session = engine.session()
        for step in STEPS:
            session.forward(step)
        n_layer = engine.hparams.n_layer
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    assert (trace.n_expert, trace.source, trace.ids.shape) == (8, "recorded", (N_TOKENS, n_layer, 3))
    assert len(chosen) == (3 + 5) * n_layer, "a prompt of 40 tokens is three chunks"
    for layer in range(n_layer):
        for part, recorded in enumerate((trace.ids, trace.weights, trace.near)):
            wanted = np.concatenate([call[part] for call in chosen[layer::n_layer]])
            np.testing.assert_array_equal(recorded[:, layer], wanted.astype(recorded.dtype))
    assert len(np.unique(trace.ids, axis=0)) > N_TOKENS / 2
    with Engine(EngineConfig(path, n_ctx=128, n_batch=16, trace=tmp_path / "cpu.npz")) as engine:
        session = engine.session()
        for step in STEPS:
            session.forward(step)
    np.testing.assert_array_equal(RoutingTrace.load(tmp_path / "cpu.npz").ids, trace.ids)


@pytest.mark.parametrize("ram", [None, "1T"])
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_run_forced_with_its_own_trace_is_the_same_run(path, device, ram):
    wanted, trace = run(path, device)
    with few_slots(FLOOR):
        again = path.parent / "again.npz"
        trace.save(again)
        got, recorded = run(path, device, ram=ram, replay_trace=again)
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(recorded.ids, trace.ids)
    np.testing.assert_array_equal(recorded.weights, trace.weights)
    np.testing.assert_array_equal(recorded.near, trace.near)


@pytest.mark.parametrize("ram", [None, "1T"])
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_forced_experts_are_those_that_compute(path, tmp_path, device, ram):
    """A trace of 20 tokens for a run of 56, of more layers than the model has."""
    free, own = run(path, device)
    trace, file = generated(tmp_path, 20, n_layer=N_LAYER + 2)
    with few_slots(FLOOR):
        forced, recorded = run(path, device, ram=ram, replay_trace=file)
    rows = np.arange(N_TOKENS) % 20
    np.testing.assert_array_equal(recorded.ids, trace.ids[rows, :N_LAYER])
    np.testing.assert_array_equal(recorded.weights[:, 0], own.weights[:, 0])  # of the first layer, which nothing has changed yet
    assert (np.abs(forced - free).max(axis=1) > 0.1).all()
    other, _ = run(path, device, replay_trace=generated(tmp_path, 20, seed=2)[1])
    assert (np.abs(forced - other).max(axis=1) > 0.1).all()


def test_what_computes_sees_the_forced_ids(path, tmp_path):
    trace, file = generated(tmp_path, N_TOKENS)
    seen = [[] for _ in range(N_LAYER)]
    with Engine(EngineConfig(path, device="reference", n_ctx=128, n_batch=16, replay_trace=file)) as engine:
        ops, calls = engine.executor.ops, 0
        expert_ffn = ops.expert_ffn

        def watched(out, x, bank, table, ids, weights):
            nonlocal calls
            seen[calls % N_LAYER].append(ids.copy())
            calls += 1
            expert_ffn(out, x, bank, table, ids, weights)

        ops.expert_ffn = watched
        session = engine.session()
        for step in STEPS:
            session.forward(step)
    np.testing.assert_array_equal(np.stack([np.concatenate(each) for each in seen], axis=1), trace.ids)


def test_forced_experts_teach_nothing(path, tmp_path):
    """A profile is of the model's own choice."""
    for file, kept in ((generated(tmp_path, 40)[1], 0), (None, 1)):
        with capped(path, FLOOR, device="reference", replay_trace=file) as engine:
            session = engine.session()
            for token in tokens(40):
                session.forward([token])
        assert len([*Path(os.environ["RGPU_CACHE_DIR"]).rglob("profiles/*")]) == kept


def test_a_step_that_breaks_off_counts_for_nothing(path, tmp_path, monkeypatch):
    """Neither recorded nor advanced: the step that is tried again gets the same experts."""
    trace, file = generated(tmp_path, 4)
    with capped(path, FLOOR, device="reference", trace=tmp_path / "t.npz", replay_trace=file) as engine:
        session = engine.session()
        session.forward([1])
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(engine.executor.ops, "expert_ffn", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            session.forward([2])
        session.forward([2])
    np.testing.assert_array_equal(RoutingTrace.load(tmp_path / "t.npz").ids, trace.ids[:2])


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(n_layer=2), f"2 layers with 3 of 24 experts, but the model has {N_LAYER} with 3 of 24"),
        (dict(n_expert=23), "with 3 of 23 experts"),
        (dict(k=4), "with 4 of 24 experts"),
    ],
)
def test_a_trace_of_another_model_is_refused(path, tmp_path, sizes, words):
    _, file = generated(tmp_path, 3, **sizes)
    with pytest.raises(RgpuError, match=f"^the routing trace is of .*{words}"):
        run(path, replay_trace=file)


def test_what_is_no_trace_is_refused(path, tmp_path):
    (tmp_path / "text.npz").write_text("no trace")
    with pytest.raises(RgpuError, match=rf"^{tmp_path}/text.npz is no routing trace"):
        run(path, replay_trace=tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError):
        run(path, replay_trace=tmp_path / "missing.npz")


def test_a_trace_that_cannot_be_saved_is_refused_before_the_run(path, tmp_path):
    missing = tmp_path / "missing" / "t.npz"
    with pytest.raises(RgpuError, match=f"^the trace is to be {missing}, but there is no folder {missing.parent}$"):
        EngineConfig(path, trace=missing)


def test_without_a_token_there_is_no_trace(path, tmp_path):
    engine = Engine(EngineConfig(path, device="reference", trace=tmp_path / "t.npz"))
    with pytest.raises(RgpuError, match="^no token has been routed yet"):
        engine.executor.experts.recorded()
    engine.close()
    assert not (tmp_path / "t.npz").exists()
    with pytest.raises(ZeroDivisionError), Engine(EngineConfig(path, device="reference", trace=tmp_path / "t.npz")):
        raise ZeroDivisionError  # is not hidden by another about the trace
