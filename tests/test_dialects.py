"""Files of other writers open and compute the same: fused experts, Ollama's names and keys, vectors as {n, 1}, MTP blocks."""

import gguf
import numpy as np
import pytest

from rgpu import Engine
from rgpu.gguf.reader import GGUFFile
from rgpu.models import architectures
from tests.tiny import VOCAB, add, draw, stock_gguf, tiny_metadata

ARCH = "qwen35moe"
TOKENS = [5, 77, 300, 12, 9]


def rewritten(path, change, metadata=None, lies=None):
    """A GGUF of the tiny model's tensors after `change(dict of name -> array) -> dict`, and with changed keys.

    `lies` are keys that the tensors do not follow.
    """
    keys = {key: value for key, value in (tiny_metadata(ARCH, False) | (metadata or {})).items() if value is not None}
    table = architectures()[ARCH].tensors(architectures()[ARCH].hparams(keys, VOCAB))
    writer = gguf.GGUFWriter(path, ARCH)
    for key, value in (keys | (lies or {})).items():
        if isinstance(value, list) and value and isinstance(value[0], int):
            writer.add_array(key, value)
        else:
            add(writer, key, value)
    for name, array in change({t.name: draw(t.name, t.shape, 0) for t in table}).items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    return logits(stock_gguf(tmp_path_factory.mktemp("plain") / "plain.gguf", ARCH))


def logits(path):
    with Engine.open(path, kv="f32", threads=1) as engine:
        return engine.session().forward(TOKENS, all=True)


def test_fused_gate_and_up(tmp_path, wanted):
    def fuse(tensors):
        fused = {}
        for name, array in tensors.items():
            if name.endswith("ffn_gate_exps.weight"):
                up = tensors[name.replace("gate", "up")]
                fused[name.replace("gate", "gate_up")] = np.concatenate([array, up], axis=1)
            elif not name.endswith("ffn_up_exps.weight"):
                fused[name] = array
        return fused

    np.testing.assert_array_equal(logits(rewritten(tmp_path / "fused.gguf", fuse)), wanted)


def test_ollama(tmp_path, wanted):
    def rename(tensors):
        named = {name.replace("ssm_dt.bias", "ssm_dt"): array for name, array in tensors.items()}
        return named | {"v.patch_embd.weight": np.ones((4, 4), np.float32), "mtp.fc.weight": np.ones((4, 4), np.float32)}

    kv = [0, 0, 0, 2]
    path = rewritten(tmp_path / "ollama.gguf", rename, {f"{ARCH}.attention.head_count_kv": kv})
    np.testing.assert_array_equal(logits(path), wanted)


def test_vectors_of_two_dimensions(tmp_path, wanted):
    def column(tensors):
        return {name: array[None] if "norm" in name or name.endswith("ssm_a") else array for name, array in tensors.items()}

    np.testing.assert_array_equal(logits(rewritten(tmp_path / "column.gguf", column)), wanted)


def test_an_mtp_block_is_not_run(tmp_path, wanted):
    path = stock_gguf(tmp_path / "mtp.gguf", ARCH, metadata={f"{ARCH}.block_count": 5, f"{ARCH}.nextn_predict_layers": 1})
    with GGUFFile(path) as file:
        assert any(name.startswith("blk.4.nextn") for name in file.tensors)
    np.testing.assert_array_equal(logits(path), wanted)
