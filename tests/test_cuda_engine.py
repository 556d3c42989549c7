"""Engines on the CUDA stand-in: whole models answer as on the CPU, whatever happens in which order; faults are one line each.

The kernels are those of a GPU, compiled for the host; what runs late and in which order is the stand-in's choice.
"""

import contextlib
import gc
import random
from unittest import mock

import numpy as np
import pytest

from rgpu import Engine, EngineConfig, SamplingParams, backend
from rgpu.engine import builtin_model
from rgpu.errors import DeviceError, OutOfMemory
from rgpu.models import architectures
from rgpu.ops.cuda import CudaOps
from tests import arenas
from tests.cuda_sim import SimDevice
from tests.test_engine import GREEDY, answer, breaking, prompt
from tests.tiny import stock_gguf

# What a finalizer of device memory raises is printed and forgotten, were it not for this.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

ARCHS = sorted(architectures())
# Sums in another order over a few layers of width 64; the logits have a deviation of about 1.4.
CLOSE = dict(rtol=0, atol=1e-3)


class Lent(CudaOps):
    """CudaOps on a device that engines share: it stays open."""

    def close(self):
        pass


def opened(ops, path, **wishes) -> Engine:
    """An engine on these ops."""
    with mock.patch.object(backend, "choose", lambda *_: (ops, "the test's device")):
        return Engine(EngineConfig(path, device="cuda", **dict(n_ctx=256) | wishes))


def on_cpu(path, **wishes) -> Engine:
    return Engine(EngineConfig(path, device="cpu", threads=1, **dict(n_ctx=256) | wishes))


@pytest.fixture(scope="module", params=[((8, 9), 0), ((6, 1), 1)], ids=["sm_89", "sm_61"])
def device(request):
    capability, seed = request.param
    device = SimDevice(capability=capability, seed=seed)
    yield device
    device.close()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {arch: stock_gguf(folder / f"{arch}.gguf", arch) for arch in ARCHS}


@pytest.fixture(scope="module", params=ARCHS)
def engine(request, device, paths):
    with opened(Lent(device), paths[request.param], kv="f32") as engine:
        yield engine


# ---- the same numbers as on the CPU ----


def followed(engine, tokens, n):
    """Logits after a prompt, and after each of n tokens behind it."""
    session = engine.session()
    return np.stack([session.forward(tokens)] + [session.forward([token]) for token in prompt(n, seed=len(tokens))])


@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("arch", ARCHS)
def test_cuda_equals_cpu(device, paths, arch, kv):
    # A coarser cache makes rounding of single values visible, as in test_engine.py. Prompts and decode steps round differently.
    atol = {"f32": 1e-3, "f16": 2e-2, "q8_0": 0.2}[kv]
    with opened(Lent(device), paths[arch], kv=kv) as cuda, on_cpu(paths[arch], kv=kv) as cpu:
        for n in (1, 8, 9, 33, 130):
            got, wanted = (followed(engine, prompt(n, seed=n), 4) for engine in (cuda, cpu))
            assert wanted.std() > 0.5
            np.testing.assert_allclose(got, wanted, rtol=0, atol=atol, err_msg=f"a prompt of {n}")
        got, wanted = (engine.session().forward(prompt(40), all=True) for engine in (cuda, cpu))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("arch", ARCHS)
def test_quantised_files_of_any_form(device, tmp_path, arch):
    """A file's form changes no bit. Another order of sums changes an int8 here and there, as between CPU and reference."""

    def logits(engine):
        with engine:
            return np.stack([followed(engine, prompt(n), 4) for n in (1, 20)])

    paths = [arenas.written(tmp_path, arch, form) for form in arenas.FORMS]
    wanted = logits(Engine(EngineConfig(paths[0], device="reference", n_ctx=256)))
    got = [logits(opened(Lent(device), path)) for path in paths]
    for other in got[1:]:
        np.testing.assert_array_equal(other, got[0])
    cuda, cpu = (np.sqrt(np.mean((x - wanted) ** 2)) for x in (got[0], logits(on_cpu(paths[0]))))
    assert cuda < max(1.5 * cpu, 0.005 * wanted.std())


def test_the_builtin_model_gives_the_cpus_answer(device):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    texts = []
    for engine in (on_cpu(builtin_model()), opened(Lent(device), builtin_model())):
        with engine:
            pieces = engine.session().generate(messages, SamplingParams(temperature=0, max_tokens=24), enable_thinking=False)
            texts.append("".join(piece.text for piece in pieces))
    assert texts[0] == texts[1] and "Paris" in texts[0]


def test_sampling_as_on_the_cpu(device, paths):
    """Whether the device sorts out the likeliest tokens or the host sees all logits, the same are drawn."""
    with opened(Lent(device), paths["qwen3moe"], kv="f32") as cuda, on_cpu(paths["qwen3moe"], kv="f32") as cpu:
        for wish in (dict(top_k=40), dict(top_k=0), dict(top_k=1000), dict(temperature=0), dict(top_k=20, repeat_penalty=1.3)):
            params = SamplingParams(**dict(temperature=1.2, seed=3, max_tokens=8) | wish)
            assert answer(cuda.session(), prompt(10), params) == answer(cpu.session(), prompt(10), params), wish


# ---- sessions ----


def test_prefill_equals_single_steps(engine):
    tokens = prompt(12)
    session = engine.session()
    steps = np.stack([session.forward([token]) for token in tokens])
    np.testing.assert_allclose(engine.session().forward(tokens, all=True), steps, **CLOSE)


@pytest.mark.parametrize("n_batch", [1, 8, 16, 40])
def test_prompts_longer_than_a_batch(device, paths, n_batch):
    tokens = prompt(90)
    for arch in ARCHS:
        with opened(Lent(device), paths[arch], kv="f32", n_batch=n_batch) as small, on_cpu(paths[arch], kv="f32") as cpu:
            wanted = cpu.session().forward(tokens, all=True)
            np.testing.assert_allclose(small.session().forward(tokens), wanted[-1], **CLOSE)
            if n_batch == 16:
                np.testing.assert_allclose(small.session().forward(tokens, all=True), wanted, **CLOSE)


def test_sessions_do_not_disturb_each_other(engine):
    texts = prompt(20, 1), prompt(30, 2)
    wanted = [engine.session().forward(tokens) for tokens in texts]
    sessions = engine.session(), engine.session()
    for session, tokens in zip(sessions, texts, strict=True):
        session.forward(tokens[:7])
    for at in range(7, 14):  # step by step, each from its own graph
        for session, tokens in zip(sessions, texts, strict=True):
            session.forward(tokens[at : at + 1])
    for session, tokens, logits in zip(sessions, texts, wanted, strict=True):
        np.testing.assert_allclose(session.forward(tokens[14:]), logits, **CLOSE)


def test_a_conversation_reuses_what_it_can(engine):
    """Turns, and an edited turn: back to a snapshot where layers can't be rewound."""
    session = engine.session()
    system = {"role": "system", "content": "Answer in one word, and be kind about it."}
    messages = [system, {"role": "user", "content": "one " * 20}]
    for turn in range(2):
        tokens = answer(session, messages)
        assert answer(engine.session(), messages) == tokens
        messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": f"And {turn}?"}]
    assert session.stats.reused_tokens > 20
    edited = [system, {"role": "user", "content": "two " * 20}]
    assert answer(session, edited) == answer(engine.session(), edited)
    assert 10 < session.stats.reused_tokens < 40


@pytest.mark.parametrize("arch", ARCHS)
def test_any_order_of_events_gives_a_fresh_sessions_logits(device, paths, arch):
    """A random walk: answers, broken off answers, interrupts in any layer, resets, edits of any length."""
    walk = random.Random(3)
    with opened(Lent(device), paths[arch], kv="f32", n_batch=16, n_ctx=160) as engine:
        end = min(engine.tokenizer.eog)
        messages = [[*prompt(walk.randint(1, 20), i, 300), end] for i in range(4)]
        session = engine.session()
        for step in range(10):
            base = session.tokens[: walk.randint(0, len(session.tokens))]
            if walk.random() < 0.6:
                base = sum((walk.choice(messages) for _ in range(walk.randint(1, 3))), [])
            tokens = (base + prompt(walk.randint(1, 12), step, 300))[:150]
            stream = session.generate(tokens, SamplingParams(temperature=0, max_tokens=walk.randint(0, 6)))
            event = walk.choice(["answer", "interrupt", "close", "reset"])
            if event == "interrupt":
                with breaking(engine, walk.randint(1, 20)), contextlib.suppress(KeyboardInterrupt):
                    list(stream)
            elif event == "close":
                next(stream, None)
                stream.close()
            else:
                list(stream)
            if event == "reset":
                session.reset()
            assert len(session.tokens) == session.state.n_past
            tokens = (base + [7, 8])[:150]
            got = session.forward(session.sync(tokens))
            np.testing.assert_allclose(got, engine.session().forward(tokens), err_msg=f"{event} at {step}", **CLOSE)


@pytest.mark.parametrize("arch", ARCHS)
def test_an_interrupted_step_leaves_a_whole_session(device, paths, arch, monkeypatch):
    """Ctrl-C in a prompt's layers, in a step that is run, recorded or replayed, and while the device is waited for."""
    with opened(ops := Lent(device), paths[arch], kv="f32", n_batch=16) as engine:
        n_layer, tokens = engine.hparams.n_layer, prompt(40)
        wanted = engine.session().forward(tokens)

        def still_whole(session):
            assert len(session.tokens) == session.state.n_past
            np.testing.assert_allclose(session.forward(session.sync(tokens)), wanted, **CLOSE)

        for at in (1, n_layer + 1, 2 * n_layer):
            session = engine.session()
            session.forward(tokens[:10])
            with breaking(engine, at), pytest.raises(KeyboardInterrupt):
                session.forward(tokens[10:])
            still_whole(session)

        def interrupted(*_):
            raise KeyboardInterrupt

        for steps in range(4):  # decode steps before the one that is broken off: 0 is run, 1 recorded, others are replayed
            for where, name in ((ops.stream, "synchronize"), (ops.stream, "replay"), (ops, "attention")):
                session = engine.session()
                session.forward(tokens[:9])
                for token in tokens[9 : 9 + steps]:
                    session.forward([token])
                with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                    patch.setattr(where, name, interrupted)
                    session.forward(tokens[9 + steps : 10 + steps])
                still_whole(session)


# ---- what a step costs ----


def test_nothing_is_allocated_once_it_runs(device, paths, monkeypatch):
    """A prompt as long as a batch and two steps of a session: from then on there is room for everything."""
    for arch in ARCHS:
        with opened(Lent(device), paths[arch], n_batch=40) as engine:
            warm, session = engine.session(), engine.session()
            for n in (40, 9, 8, 1):
                warm.forward(prompt(n))
            session.forward(prompt(20))
            sizes, allocate = [], device.allocate
            with monkeypatch.context() as patch:
                patch.setattr(device, "allocate", lambda nbytes, a=allocate, s=sizes: s.append(nbytes) or a(nbytes))
                for n in (1, 1, 1, 13, 30, 39, 10, 9, 5, 2, 70):
                    session.forward(prompt(n))
            assert not sizes, arch


def test_a_decode_step_is_one_launch_and_a_few_bytes(paths):
    """Copies up: token and position; down: the token that was likeliest, and its logit."""
    device = SimDevice()
    with opened(CudaOps(device), paths["qwen35moe"]) as engine:
        session, calls = engine.session(), []
        stream = session.generate(prompt(5), SamplingParams(temperature=0, max_tokens=20))
        for _ in range(4):
            next(stream)
        launch, before = engine.executor.ops.stream.launch, device.counted.copy()
        engine.executor.ops.stream.launch = lambda kernel, *a, **b: calls.append(kernel.name) or launch(kernel, *a, **b)
        for _ in range(5):
            next(stream)
        counted = {name: (device.counted[name] - before[name]) / 5 for name in ("graph", "upload", "download")}
        assert counted == {"graph": 1, "upload": 8, "download": 8}
        assert set(calls) <= {"top_k"}


# ---- faults ----


@pytest.mark.parametrize("arch", ARCHS)
def test_a_fault_in_a_step_is_one_line_and_the_process_lives(paths, arch):
    """In a prompt, in the first, the recorded and a replayed step: the device is lost, every use of it says why."""
    for before in ([], [20], [20, 1], [20, 1, 1], [20, 1, 1, 1]):
        device = SimDevice(seed=len(before))
        engine = opened(CudaOps(device), paths[arch], n_batch=16)
        session, other = engine.session(), engine.session()
        for n in before:
            session.forward(prompt(n))
        device.fail_at = device.counted["launches"] + 17
        with pytest.raises(DeviceError, match="failed as asked for") as first:
            session.forward(prompt(1 if before else 20))
        assert "\n" not in str(first.value)
        for use in (lambda s=session: s.forward([1]), lambda s=other: answer(s, [1, 2], GREEDY), engine.session):
            with pytest.raises(DeviceError, match="failed as asked for"):
                use()
        engine.close()
    with opened(CudaOps(SimDevice()), paths[arch]) as again:
        again.session().forward([1, 2, 3])


def test_too_little_memory_for_the_model_leaves_nothing_behind(paths):
    device = SimDevice()
    with opened(Lent(device), paths["qwen35moe"]):
        needed = device.memory()[1] - device.memory()[0]
    for share in (0.01, 0.3, 0.7, 0.99):
        device = SimDevice(total=int(share * needed))
        with pytest.raises(OutOfMemory) as error:
            opened(CudaOps(device), paths["qwen35moe"])
        assert "\n" not in str(error.value)
        assert device.closed
        device.close()


def test_too_little_memory_for_a_session_costs_only_that(paths):
    device = SimDevice()
    with opened(CudaOps(device), paths["qwen35moe"], n_ctx=1024) as engine:
        wanted = engine.session().forward(prompt(10))
        gc.collect()
        free, total = device.memory()
        device.storage.limits["device"] = total - free + 1_000_000
        sessions = []
        with pytest.raises(OutOfMemory, match="no memory for a context of 1024 tokens: open the model with a smaller one"):
            for _ in range(100):
                sessions.append(engine.session())
        assert sessions
        np.testing.assert_allclose(sessions[0].forward(prompt(10)), wanted, **CLOSE)
        sessions.pop()
        np.testing.assert_allclose(engine.session().forward(prompt(10)), wanted, **CLOSE)


def test_closing_gives_the_device_back(paths):
    device = SimDevice()
    with opened(CudaOps(device), paths["qwen3moe"]) as engine:
        session = engine.session()
        session.forward(prompt(10))
        assert engine.device == "cuda" and not device.closed
    assert device.closed and device.memory()[0] == device.memory()[1]
    del engine, session
    gc.collect()
