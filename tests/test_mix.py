"""The choice of types against llama.cpp's: its dry runs in mix_llamacpp.json, and files that its quantiser wrote."""

import json
from pathlib import Path

import pytest

from convert.quantize import ENCODERS
from rgpu.gguf import GGUFFile
from rgpu.gguf.mix import FILE_TYPES, MIXES, Mix, file_type, more_bits
from tests.vectors.cases import CASES, LETTERS
from tests.vectors.cases import tensors as case_tensors

VECTORS = json.loads((Path(__file__).parent / "vectors" / "mix_llamacpp.json").read_text())


def test_case_table_matches_vectors():
    assert len(VECTORS) == len(CASES) and all(of_case.keys() == FILE_TYPES.keys() for of_case in VECTORS)


@pytest.mark.parametrize("mix", FILE_TYPES)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_types_equal_llama_cpp(case, mix):
    keys, shapes = case_tensors(CASES[case])
    arch = CASES[case]["arch"]
    n_layer, n_expert, n_head, n_head_kv = (
        keys[f"{arch}.{key}"] for key in ("block_count", "expert_count", "attention.head_count", "attention.head_count_kv")
    )
    names = sorted(shapes)
    choose = Mix(mix, n_layer, n_expert, n_head, n_head_kv, reversed(names)).choose
    expected = {name: LETTERS[letter] for name, letter in zip(names, VECTORS[case][mix], strict=True)}
    assert {name: choose(name, shapes[name]) for name in names} == expected


@pytest.mark.parametrize(
    "file, mix",
    [
        *(("tiny-F32", "F32"), ("tiny-BF16", "BF16"), ("tiny-Q8_0", "Q8_0"), ("tiny-mtp-F32", "F32"), ("tinyk-IQ4_XS", "IQ4_XS")),
        *(("tinyk-Q4_K_M", "Q4_K_M"), ("tinyk-Q5_K_M", "Q5_K_M"), ("tinyk-MXFP4_MOE", "MXFP4_MOE")),
    ],
)
def test_types_equal_those_of_its_files(shared, file, mix):
    with GGUFFile(shared / "data" / "tiny" / "models" / f"{file}.gguf") as found:
        arch = found.metadata["general.architecture"]
        keys = ("block_count", "expert_count", "attention.head_count", "attention.head_count_kv")
        choose = Mix(mix, *(found.integer(f"{arch}.{key}") for key in keys), found.tensors).choose
        tensors = found.tensors.values()
        assert {t.name: choose(t.name, t.shape) for t in tensors} == {t.name: t.quant for t in tensors}
        assert file_type(mix) == found.integer("general.file_type")


def test_every_mix_on_offer_has_its_encoders():
    shapes = [(4096, 2048), (4096, 2880), (4096, 40), (16, 512, 2048), (2048,)]
    names = ["output.weight", "token_embd.weight", "output_norm.weight"]
    roles = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_norm", "ffn_down_exps", "ffn_up_exps", "ffn_gate_inp")
    names += [f"blk.{i}.{role}.weight" for i in range(16) for role in roles]
    for mix in MIXES:
        for n_expert in (8, 128):
            choose = Mix(mix, 16, n_expert, 16, 2, names).choose
            assert {choose(name, shape) for name in names for shape in shapes} <= ENCODERS.keys()


def test_layers_with_more_bits():
    """The lists of gguf.md, section 4, for 40, 41 and 48 layers."""
    forty = {*range(5), 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, *range(35, 40)}
    assert {i for i in range(40) if more_bits(i, 40)} == forty
    assert {i for i in range(41) if more_bits(i, 41)} == forty | {40}
    assert sum(more_bits(i, 48) for i in range(48)) == 24


def test_shapes_of_one_row_are_vectors():
    """llama.cpp ignores trailing dimensions of 1: {n, 1} is (1, n) here."""
    choose = Mix("Q4_K_M", 4, 16, 4, 2, ["output.weight"]).choose
    assert choose("blk.0.ffn_gate_inp_shexp.weight", (1, 2048)) == "F32"
    assert choose("blk.0.ffn_down_exps.bias", (16, 2048)) == "F32"  # gpt-oss
    assert choose("blk.0.attn_q.weight", (1, 4, 256)) == "Q4_K"
