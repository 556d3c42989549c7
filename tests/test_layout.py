"""Expert records: each form of a file gives the place of each expert's bytes; what is incomplete is named."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from rgpu.errors import UnsupportedModel
from rgpu.gguf import GGUFFile
from rgpu.gguf.layout import KINDS, find_experts

N_EXPERT, N_EMBD, N_FF = 5, 64, 32
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def experts(layer: int) -> dict[str, np.ndarray]:
    """Random Q8_0 bytes of one layer: gate and up [n_expert, n_ff, bytes], down [n_expert, n_embd, bytes]."""
    rng = np.random.default_rng(layer)
    rows = {"gate": (N_FF, N_EMBD), "up": (N_FF, N_EMBD), "down": (N_EMBD, N_FF)}
    return {kind: rng.integers(0, 256, (N_EXPERT, n, m // 32 * 34), np.uint8) for kind, (n, m) in rows.items()}


def tensors(form: str, layers: int = 2) -> dict[str, np.ndarray]:
    """All tensors of a file in one of the three forms, with something dense before, between and behind."""
    out = {"token_embd.weight": np.full((3, 34), 7, np.uint8)}
    for layer in range(layers):
        found, b = experts(layer), f"blk.{layer}."
        if form == "fused":
            out[b + "ffn_down_exps.weight"] = found["down"]
            out[b + "ffn_gate_up_exps.weight"] = np.concatenate([found["gate"], found["up"]], axis=1)
        elif form == "stacked":
            out |= {f"{b}ffn_{kind}_exps.weight": found[kind] for kind in ("down", "gate", "up")}
        else:
            # By kind, then expert: the order of the files of 2023, in which a record is in three places.
            out |= {f"{b}ffn_{kind}.{e}.weight": found[kind][e] for kind in KINDS for e in range(N_EXPERT)}
        out[b + "ffn_gate_inp.weight"] = np.full((1, 34), layer, np.uint8)
    return out


def write(path: Path, content: dict[str, np.ndarray], per_file: int = 0) -> Path:
    writer = gguf.GGUFWriter(path, "qwen35moe", split_max_tensors=per_file)
    for name, data in content.items():
        floats = data.dtype == np.float32
        writer.add_tensor(name, data, raw_dtype=None if floats else Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(path.parent.glob(f"{path.stem}-00001-of-*")) if per_file else path


@pytest.mark.parametrize("per_file", [0, 3], ids=["single", "split"])
@pytest.mark.parametrize("form", ["stacked", "fused", "per_expert"])
def test_finds_the_bytes_of_every_expert(tmp_path, form, per_file):
    with GGUFFile(write(tmp_path / "m.gguf", tensors(form), per_file)) as file:
        assert len(file.paths) > 1 or not per_file
        for layer in range(2):
            found = find_experts(file, layer, N_EXPERT)
            for kind, matrix in zip(KINDS, found, strict=True):
                needed = experts(layer)[kind]
                assert (matrix.quant, matrix.shape) == ("Q8_0", (N_EMBD, N_FF) if kind == "down" else (N_FF, N_EMBD))
                assert matrix.nbytes == needed[0].size
                for e in range(N_EXPERT):
                    mapped = file.mapping(int(matrix.shard[e]))
                    begin = int(matrix.offset[e])
                    assert np.array_equal(mapped[begin : begin + matrix.nbytes], needed[e].reshape(-1)), (kind, e)


def without(content, *names):
    return {name: data for name, data in content.items() if name not in names}


STACKED, FUSED, SINGLE = tensors("stacked", 1), tensors("fused", 1), tensors("per_expert", 1)
FAULTS = {
    "a stack is missing": (without(STACKED, "blk.0.ffn_up_exps.weight"), "blk.0.ffn_up_exps.weight"),
    "down is missing": (without(FUSED, "blk.0.ffn_down_exps.weight"), "blk.0.ffn_down_exps.weight"),
    "an expert is missing": (without(SINGLE, "blk.0.ffn_down.3.weight"), "blk.0.ffn_down.3.weight"),
    "the last expert is missing": (without(SINGLE, "blk.0.ffn_gate.4.weight"), "blk.0.ffn_gate.4.weight"),
    "an expert too many": (SINGLE | {"blk.0.ffn_up.5.weight": experts(0)["up"][0]}, "blk.0.ffn_up.5.weight"),
    "another shape": (SINGLE | {"blk.0.ffn_up.2.weight": experts(0)["up"][0][:16]}, "blk.0.ffn_up.2.weight"),
    "another type": (SINGLE | {"blk.0.ffn_up.1.weight": np.ones((N_FF, N_EMBD), np.float32)}, "F32"),
    "too few in a stack": (STACKED | {"blk.0.ffn_down_exps.weight": experts(0)["down"][:4]}, "blk.0.ffn_down_exps.weight"),
    "a stack of two axes": (STACKED | {"blk.0.ffn_up_exps.weight": experts(0)["up"][0]}, "blk.0.ffn_up_exps.weight"),
    "an expert of three axes": (SINGLE | {"blk.0.ffn_up.0.weight": experts(0)["up"]}, "blk.0.ffn_up.0.weight"),
    "an odd fused stack": (FUSED | {"blk.0.ffn_gate_up_exps.weight": experts(0)["up"][:, :31]}, "odd"),
    "up unlike gate": (STACKED | {"blk.0.ffn_up_exps.weight": experts(0)["up"][:, :16]}, "up is [16, 64]"),
    "down unlike gate": (STACKED | {"blk.0.ffn_down_exps.weight": experts(0)["up"]}, "down is [32, 64]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_names_what_does_not_fit(tmp_path, fault):
    content, word = FAULTS[fault]
    with GGUFFile(write(tmp_path / "m.gguf", content)) as file, pytest.raises(UnsupportedModel) as caught:
        find_experts(file, 0, N_EXPERT)
    assert word in str(caught.value) and "\n" not in str(caught.value)
