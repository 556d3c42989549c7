"""Files written by llama.cpp's converter and quantiser, and its logits on them; the converter against llama.cpp's.

Most of them are in the shared reference data (its README says how they were made); tiny-Q8_0 is in tests/vectors as well.
"""

from pathlib import Path

import numpy as np
import pytest

from convert.__main__ import main as convert
from rgpu.engine import Engine
from rgpu.gguf.reader import GGUFFile

VECTORS = Path(__file__).parent / "vectors"
FLOAT = ("tiny-F32", "tiny-mtp-F32")
QUANTISED = ("tiny-BF16", "tiny-Q8_0", "tinyk-IQ4_XS", "tinyk-MXFP4_MOE", "tinyk-Q4_K_M", "tinyk-Q5_K_M")
N_PROMPTS = 8
# llama.cpp and transformers agree to 2e-5 on these files; llama.cpp itself moves by 1e-5 between a batch and token by token.
LOGITS = 5e-4


@pytest.fixture
def folder(request):
    """The folder of the shared tiny files."""
    return request.getfixturevalue("shared") / "data" / "tiny"


def find(request, name: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A model file and llama.cpp's numbers for it, from the repository if they are there."""
    model, numbers = VECTORS / f"{name}.gguf", VECTORS / f"{name}.npz"
    if not model.exists():
        shared = request.getfixturevalue("folder")
        model, numbers = shared / "models" / f"{name}.gguf", shared / "ref" / f"{name}.npz"
    with np.load(numbers) as arrays:
        return model, dict(arrays)


@pytest.mark.parametrize("name", FLOAT)
def test_logits_and_greedy_tokens_of_float_files(request, name):
    path, want = find(request, name)
    with Engine.open(path, device="cpu", kv="f32", threads=1) as engine:
        for i in range(N_PROMPTS):
            session = engine.session()
            logits = session.forward(want[f"p{i}_ids"].tolist())
            np.testing.assert_allclose(logits, want[f"p{i}_logits"], rtol=0, atol=LOGITS, err_msg=f"prompt {i}")
            for step, token in enumerate(want[f"p{i}_greedy"].tolist()):
                assert int(logits.argmax()) == token, f"prompt {i}, step {step}"
                best = logits[want[f"p{i}_steps_top_ids"][step]]
                np.testing.assert_allclose(best, want[f"p{i}_steps_top_logits"][step], rtol=0, atol=LOGITS)
                logits = session.forward([token])


@pytest.mark.parametrize("name", QUANTISED)
def test_logits_of_quantised_files(request, name):
    """Our distance to the exact logits of these weights is at most 1.1 times llama.cpp's, in the median over prompts.

    In the median, because one flipped choice of an expert moves a prompt's logits by 1 and more.
    """
    path, want = find(request, name)
    ours, theirs = [], []
    with Engine.open(path, device="cpu", kv="f32", threads=1) as engine:
        for i in range(N_PROMPTS):
            exact = want[f"p{i}_logits_dq"]
            ours.append(rms(engine.session().forward(want[f"p{i}_ids"].tolist()) - exact))
            theirs.append(rms(want[f"p{i}_logits"] - exact))
    assert np.median(ours) <= 1.1 * np.median(theirs), f"ours {ours}, llama.cpp's {theirs}"


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.parametrize("name", FLOAT + QUANTISED)
def test_stock_and_converted_files_give_identical_logits(request, name, tmp_path):
    path, want = find(request, name)
    assert not convert([str(path), str(tmp_path / "model.gguf")])
    logits = []
    for file in (path, tmp_path / "model.gguf"):
        with Engine.open(file, device="cpu", threads=1) as engine:
            session = engine.session()
            prompt = session.forward(want["p4_ids"].tolist(), all=True)
            logits.append(np.concatenate([prompt, [session.forward([token]) for token in want["p4_greedy"][:4].tolist()]]))
    assert np.ptp(logits[0], axis=1).min() > 1  # no row is constant
    assert np.array_equal(logits[0].view(np.uint32), logits[1].view(np.uint32))


def test_converter_reproduces_the_file_of_llamacpp(folder, tmp_path):
    """hub-tiny → per-expert F32 → stock equals tiny-F32.gguf: names, order, shapes, values, the model's and tokeniser's keys."""
    ours, restored = tmp_path / "ours.gguf", tmp_path / "stock.gguf"
    assert not convert([str(folder / "hub-tiny"), str(ours), "--type", "F32"])
    assert not convert(["--stock", str(ours), str(restored)])
    with GGUFFile(folder / "models" / "tiny-F32.gguf") as want, GGUFFile(restored) as got:
        assert list(got.tensors) == list(want.tensors)
        for name, info in want.tensors.items():
            assert (got.tensors[name].quant, got.tensors[name].shape) == (info.quant, info.shape), name
            if name.endswith("ssm_a"):
                # -exp(A_log): NumPy's and torch's exp may differ in the last of 24 bits.
                np.testing.assert_allclose(got.dequantize(name), want.dequantize(name), rtol=1.2e-7, atol=0)
            else:
                assert got.bytes(name).tobytes() == want.bytes(name).tobytes(), name
        for key in want.metadata:
            if key.startswith(("qwen35moe.", "tokenizer.")):
                assert got.metadata.raw(key) == want.metadata.raw(key), key
