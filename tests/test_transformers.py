"""Checkpoint → convert → engine gives what transformers computes: logits, greedy tokens and every layer, float32 throughout.

One thread, because on a busy machine the meetings of several cost more than these small models.
The expected numbers are tests/vectors/transformers-*.npz, written by tests/vectors/make_vectors.py from the same seeds.
"""

from pathlib import Path

import numpy as np
import pytest

from convert.__main__ import main as convert
from rgpu.engine import Engine, EngineConfig
from rgpu.gguf.reader import GGUFFile
from rgpu.kernels import most_threads

from .tiny import digest
from .tiny_hub import hub_checkpoint, hub_config, hub_tensors

ARCHITECTURES = ("qwen35moe", "qwen3moe")
LENGTHS = (1, 2, 3, 4, 5, 63, 64, 65, 150)
# Float32 transformers is up to 6e-5 from float64 on these prompts, a float32 engine as far to the other side; a decay or
# a head order that is wrong moves logits (deviation 1.45) by 0.1 and more.
LOGITS = 1e-3
# Of the largest value of a layer. Float32 transformers is 2e-5 from float64 here; the gated norm amplifies.
LAYER = 1e-4
LAYOUTS = {
    "qwen35moe": {
        "stacked": dict(),
        "single": dict(experts="single"),
        "hub": dict(nested=True, mtp=True),
        "hub-fp8-style": dict(nested=True, mtp=True, experts="single", shards=3),
    },
    "qwen3moe": {"stacked": dict(), "hub": dict(experts="single", shards=2)},
}


def converted(folder: Path, arch: str, **layout) -> Path:
    """A tiny checkpoint in some layout, converted to F32."""
    out = folder / "model.gguf"
    assert not convert([str(hub_checkpoint(folder / "hub", arch, **layout)), str(out), "--type", "F32"])
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {arch: converted(tmp_path_factory.mktemp(arch), arch, **LAYOUTS[arch]["hub"]) for arch in ARCHITECTURES}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request, models):
    """(engine, expected arrays) of one architecture."""
    with Engine.open(models[request.param], device="cpu", kv="f32", threads=1) as engine:
        yield engine, expected(request.param)


def expected(arch: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "vectors" / f"transformers-{arch}.npz") as arrays:
        return dict(arrays)


def forward(session, ids) -> np.ndarray:
    """[len(ids), n_vocab]"""
    return session.forward(ids.tolist(), all=True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_weights_are_those_of_the_vectors(arch):
    assert digest(hub_tensors(hub_config(arch))) == str(expected(arch)["weights_sha256"])


@pytest.mark.parametrize("n", LENGTHS)
def test_logits_of_a_prompt(case, n):
    engine, want = case
    got = forward(engine.session(), want[f"p{n}_ids"])
    np.testing.assert_allclose(got[want[f"p{n}_rows"]], want[f"p{n}_logits"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("n", LENGTHS)
def test_greedy_steps(case, n):
    """32 tokens, each the best by our own logits; the 8 best logits after each."""
    engine, want = case
    session = engine.session()
    logits, tokens, steps = session.forward(want[f"p{n}_ids"].tolist()), [], []
    for _ in want[f"p{n}_greedy"]:
        tokens.append(int(logits.argmax()))
        logits = session.forward(tokens[-1:])
        steps.append(logits.copy())
    assert tokens == want[f"p{n}_greedy"].tolist()
    top = np.take_along_axis(np.array(steps), want[f"p{n}_top_ids"], axis=1)
    np.testing.assert_allclose(top, want[f"p{n}_top_logits"], rtol=0, atol=LOGITS)
    if n == 5:
        np.testing.assert_allclose(steps, want["p5_steps"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize(
    ("n", "cuts"),
    [(n, [cut]) for n in (2, 3, 4, 5) for cut in range(1, n)]
    + [(65, [cut]) for cut in (1, 2, 3, 31, 32, 33, 61, 62, 63, 64)]
    + [(150, cuts) for cuts in ([64], [65], [147], [149], [1, 2, 3, 4, 5, 6], [63, 64, 128], [50, 51, 117], [21, 86, 149])],
)
def test_a_prompt_split_between_calls(case, n, cuts):
    engine, want = case
    session = engine.session()
    got = np.concatenate([forward(session, part) for part in np.split(want[f"p{n}_ids"], cuts)])
    np.testing.assert_allclose(got[want[f"p{n}_rows"]], want[f"p{n}_logits"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("n_batch", [1, 3, 64, 70])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_any_batch_size(models, arch, n_batch):
    """The engine's own chunks of a prompt, whose edges need not be those of the delta rule's."""
    want = expected(arch)
    with Engine(EngineConfig(models[arch], device="cpu", kv="f32", threads=1, n_batch=n_batch)) as engine:
        got = forward(engine.session(), want["p150_ids"])
    np.testing.assert_allclose(got[want["p150_rows"]], want["p150_logits"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("threads", [min(2, most_threads())])
def test_the_number_of_threads_changes_nothing(case, models, threads):
    engine, want = case
    with Engine.open(models[engine.hparams.arch], device="cpu", kv="f32", threads=threads) as other:
        for n in (1, 5, 65):
            one, several = (forward(e.session(), want[f"p{n}_ids"]) for e in (engine, other))
            assert np.array_equal(one.view(np.uint32), several.view(np.uint32))


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_layer(models, arch, device):
    """Outputs of each mixer, each feed-forward block and each layer; the message names the first that differs."""
    want, got, order = expected(arch), {}, []

    def record(layer, part, x):
        name = f"layer{layer}_{part}"
        order.append(name)
        got[name] = np.array(x)

    with Engine.open(models[arch], device=device, kv="f32", threads=1) as engine:
        engine.executor.trace = record
        engine.session().forward(want["layers_ids"].tolist())
    assert order == [f"layer{i}_{part}" for i in range(len(order) // 3) for part in ("mix", "ffn", "out")]
    assert set(order) == {name for name in want if name.startswith("layer") and name.endswith(("_mix", "_ffn", "_out"))}
    errors = {name: float(np.abs(got[name] - want[name]).max() / np.abs(want[name]).max()) for name in order}
    first = next((name for name in order if not errors[name] <= LAYER), None)
    assert first is None, f"{first} is the first that differs: {errors}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_reference_backend(models, arch):
    want = expected(arch)
    with Engine.open(models[arch], device="reference", kv="f32", threads=1) as engine:
        session = engine.session()
        got = np.concatenate([forward(session, part) for part in np.split(want["p65_ids"], [64])])
    np.testing.assert_allclose(got, want["p65_logits"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize(("arch", "layout"), [(arch, layout) for arch in ARCHITECTURES for layout in LAYOUTS[arch]])
def test_every_layout_of_a_checkpoint_converts_to_the_same_tensors(models, tmp_path, arch, layout):
    path = converted(tmp_path, arch, **LAYOUTS[arch][layout])
    with GGUFFile(path) as file, GGUFFile(models[arch]) as other:
        mtp = f"blk.{hub_config(arch)['num_hidden_layers']}."
        names = {name for name in other.tensors if not name.startswith(mtp)}
        assert {name for name in file.tensors if not name.startswith(mtp)} == names
        assert (len(names) < len(other.tensors)) == (arch == "qwen35moe")  # its hub layout has the MTP block
        for name in names:
            assert file.tensors[name].shape == other.tensors[name].shape
            assert file.bytes(name).tobytes() == other.bytes(name).tobytes(), name
