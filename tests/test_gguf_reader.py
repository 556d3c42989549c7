"""The GGUF reader on well-formed files, against gguf-py and files made by hand."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from rgpu.errors import GGUFError
from rgpu.gguf import GGUFFile, names
from tests import gguf_bytes as make
from tests.gguf_bytes import file_with

SCALARS = {
    make.U8: 200,
    make.I8: -100,
    make.U16: 60000,
    make.I16: -30000,
    make.U32: 4_000_000_000,
    make.I32: -2_000_000_000,
    make.F32: 0.15625,
    make.BOOL: True,
    make.STRING: "naïve Ġtoken",
    make.U64: 2**64 - 3,
    make.I64: -(2**62),
    make.F64: 0.1,
}
ARRAYS = {**{kind: [value, type(value)(1), value] for kind, value in SCALARS.items()}, make.BOOL: [True, False, True]}
ARRAYS[make.STRING] = ["", "Ġa b", "日本"]


def random_blocks(quant: GGMLQuantizationType, rows: int, columns: int, seed: int) -> np.ndarray:
    """Stored bytes [rows, bytes per row] of random weights; float types get real numbers, never NaN."""
    rng = np.random.default_rng(seed)
    block, nbytes = GGML_QUANT_SIZES[quant]
    floats = {"F32": np.float32, "F16": np.float16}
    if quant.name in floats:
        return rng.standard_normal((rows, columns)).astype(floats[quant.name]).view(np.uint8)
    return rng.integers(0, 100, (rows, columns // block * nbytes), np.uint8)


def write_model(path, n_tensors: int = 7, alignment: int | None = None, **options) -> dict[str, np.ndarray]:
    """A file by gguf-py with pairs of many types and tensors of seven quants; returns the tensors' stored bytes."""
    writer = GGUFWriter(path, "qwen3moe", **options)
    if alignment:
        writer.add_custom_alignment(alignment)
    for kind, value in SCALARS.items():
        writer.add_key_value(f"scalar.{kind}", value, GGUFValueType(kind))
    writer.add_array("array.i", [3, 1, 2])
    writer.add_array("array.f", [0.5, -2.25])
    writer.add_array("array.b", [True, False])
    writer.add_token_list(["<s>", "Ġa", "日本", ""])
    stored = {}
    for i, name in enumerate(["F32", "Q4_K", "F16", "Q6_K", "Q8_0", "BF16", "IQ4_XS"][:n_tensors]):
        quant = GGMLQuantizationType[name]
        rows = random_blocks(quant, 3 + i, 256, seed=i)
        stored[f"blk.{i}.{name}"] = rows.reshape(-1)
        writer.add_tensor(f"blk.{i}.{name}", rows, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type(tmp_path, version):
    pairs = [make.pair(f"scalar.{kind}", kind, value) for kind, value in SCALARS.items()]
    pairs += [make.array(f"array.{kind}", kind, values) for kind, values in ARRAYS.items()]
    pairs += [make.array(f"empty.{kind}", kind, []) for kind in ARRAYS]
    with GGUFFile(file_with(tmp_path, make.model(pairs, version=version))) as file:
        assert file.version == version
        assert list(file.metadata)[0] == "scalar.0" and len(file.metadata) == len(pairs)
        for kind, value in SCALARS.items():
            found = file.metadata[f"scalar.{kind}"]
            assert found == value and type(found) is type(value)
            assert file.metadata.type_of(f"scalar.{kind}") == (kind, None)
        for kind, values in ARRAYS.items():
            found, empty = file.metadata[f"array.{kind}"], file.metadata[f"empty.{kind}"]
            assert list(found) == values and len(empty) == 0
            assert file.metadata.type_of(f"array.{kind}") == (make.ARRAY, kind)
            if kind == make.STRING:
                assert type(found) is list and type(empty) is list
            else:
                expected = "bool" if kind == make.BOOL else np.dtype(make.FORMATS[kind]).name
                assert found.dtype.name == empty.dtype.name == expected


def test_missing_key_is_a_key_error(tmp_path):
    file = GGUFFile(file_with(tmp_path, make.model([make.pair("a", make.U8, 1)])))
    with pytest.raises(KeyError):
        file.metadata["b"]
    assert file.metadata.get("b", 5) == 5 and "b" not in file.metadata and "a" in file.metadata


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_equals_gguf_py(tmp_path, alignment):
    path = tmp_path / "model.gguf"
    stored = write_model(path, alignment=alignment)
    oracle = GGUFReader(path)
    with GGUFFile(path) as file:
        assert file.alignment == (alignment or 32) and file.paths == [path]
        keys = [key for key in oracle.fields if not key.startswith("GGUF.")]
        assert list(file.metadata) == keys
        for key in keys:
            found = file.metadata[key]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == oracle.fields[key].contents()
            types = [int(each) for each in oracle.fields[key].types]
            assert file.metadata.type_of(key) == (types[0], types[1] if types[0] == make.ARRAY else None)
        assert list(file.tensors) == [tensor.name for tensor in oracle.tensors] == list(stored)
        for tensor in oracle.tensors:
            info = file.tensors[tensor.name]
            assert (info.name, info.quant, info.shard) == (tensor.name, tensor.tensor_type.name, 0)
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
            assert info.shape == tuple(tensor.shape.tolist()[::-1])
            np.testing.assert_array_equal(file.bytes(tensor.name), stored[tensor.name])
            np.testing.assert_array_equal(file.mapping(0)[info.offset : info.offset + info.nbytes], stored[tensor.name])
            values = file.dequantize(tensor.name)
            expected = dequantize(tensor.data, tensor.tensor_type)
            assert values.dtype == np.float32 and values.shape == info.shape and values.flags.writeable
            np.testing.assert_array_equal(values, expected.reshape(info.shape))


@pytest.mark.parametrize("version", [2, 3])
def test_shapes_keep_the_dimensions_of_the_file(tmp_path, version):
    data = np.random.default_rng(5).standard_normal(24).astype(np.float32)
    entries = [((24,), (24,)), ((24, 1), (1, 24)), ((1, 24), (24, 1)), ((2, 3, 4), (4, 3, 2)), ((2, 3, 2, 2), (2, 2, 3, 2))]
    tensors = [make.tensor(f"t{i}", ne, 0, 96 * i) for i, (ne, _) in enumerate(entries)]
    with GGUFFile(file_with(tmp_path, make.model([], tensors, data.tobytes() * len(entries), version=version))) as file:
        for i, (_, shape) in enumerate(entries):
            assert file.tensors[f"t{i}"].shape == shape
            np.testing.assert_array_equal(file.dequantize(f"t{i}"), data.reshape(shape))


def test_any_order_and_gaps(tmp_path):
    data = np.random.default_rng(6).integers(1, 255, 512, np.uint8)
    tensors = [make.tensor("late", (8,), 0, 480), make.tensor("early", (8,), 0, 0), make.tensor("middle", (5,), 0, 128)]
    with GGUFFile(file_with(tmp_path, make.model([], tensors, data.tobytes()))) as file:
        assert list(file.tensors) == ["late", "early", "middle"]
        for name, offset, nbytes in (("late", 480, 32), ("early", 0, 32), ("middle", 128, 20)):
            np.testing.assert_array_equal(file.bytes(name), data[offset : offset + nbytes])


def test_raw_pairs_make_an_equal_file(tmp_path):
    source = tmp_path / "source.gguf"
    write_model(source, n_tensors=1, alignment=64)
    with GGUFFile(source) as file:
        pairs = [make.string(key) + file.metadata.raw(key) for key in file.metadata]
        info = file.tensors["blk.0.F32"]
        tensors = [make.tensor(info.name, info.shape[::-1], 0, 0)]
        data = file.bytes(info.name).tobytes()
    assert make.model(pairs, tensors, data, alignment=64) == source.read_bytes()


def test_values_are_decoded_once_and_arrays_are_read_only(tmp_path):
    pairs = [make.array("tokens", make.STRING, ["a", "b"]), make.array("scores", make.F32, [1.5, 2.5])]
    with GGUFFile(file_with(tmp_path, make.model(pairs))) as file:
        assert file.metadata["tokens"] is file.metadata["tokens"]
        scores = file.metadata["scores"]
        assert scores is file.metadata["scores"]
        with pytest.raises(ValueError, match="read-only"):
            scores[0] = 7
    assert scores.tolist() == [1.5, 2.5]


def test_views_share_the_mapping_and_are_read_only(tmp_path):
    path = tmp_path / "model.gguf"
    write_model(path)
    with GGUFFile(path) as file:
        view = file.bytes("blk.1.Q4_K")
        assert view.dtype == np.uint8 and view.ndim == 1 and np.shares_memory(view, file.mapping(0))
        assert file.mapping(0).size == path.stat().st_size
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1


def test_after_close_views_live_and_access_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    stored = write_model(path)
    file = GGUFFile(path)
    view = file.bytes("blk.1.Q4_K")
    assert file.metadata["scalar.4"] == SCALARS[make.U32]
    file.close()
    file.close()
    np.testing.assert_array_equal(view, stored["blk.1.Q4_K"])
    for access in (
        lambda: file.bytes("blk.1.Q4_K"),
        lambda: file.dequantize("blk.1.Q4_K"),
        lambda: file.mapping(0),
        lambda: file.metadata["scalar.4"],
        lambda: file.metadata.raw("scalar.4"),
        lambda: file.integer("scalar.4"),
    ):
        with pytest.raises(GGUFError, match="is closed"):
            access()


def test_unknown_tensor_is_named(tmp_path):
    with GGUFFile(file_with(tmp_path, make.model())) as file, pytest.raises(GGUFError, match="no tensor 'blk.0.x'"):
        file.bytes("blk.0.x")


def test_integer_and_integers(tmp_path):
    pairs = [make.pair(f"n{kind}", kind, 9) for kind in (make.U8, make.I8, make.U16, make.I16, make.U32, make.I32, make.U64)]
    pairs += [make.array("same", make.U32, [4, 4, 4]), make.array("heads", make.I32, [2, 0, 4])]
    pairs += [make.array("pattern", make.BOOL, [True, False, True]), make.pair("rate", make.F32, 2.0)]
    with GGUFFile(file_with(tmp_path, make.model(pairs))) as file:
        for kind in (make.U8, make.I8, make.U16, make.I16, make.U32, make.I32, make.U64):
            assert file.integer(f"n{kind}") == 9 and file.integers(f"n{kind}", 2) == [9, 9]
        assert file.integer("same") == 4 and type(file.integer("same")) is int
        assert file.integers("heads", 3) == [2, 0, 4] and file.integers("pattern", 3) == [1, 0, 1]
        assert file.integer("absent", 7) == 7 and file.integer("absent", 0) == 0
        with pytest.raises(GGUFError, match="'absent' is missing"):
            file.integer("absent")
        with pytest.raises(GGUFError, match="'absent' is missing"):
            file.integers("absent", 3)
        with pytest.raises(GGUFError, match=r"'heads' should hold one number, found \[2, 0, 4\]"):
            file.integer("heads")
        with pytest.raises(GGUFError, match="'heads' should have 4 entries, found 3"):
            file.integers("heads", 4)
        with pytest.raises(GGUFError, match=r"'rate' should be an integer, found 2\.0"):
            file.integer("rate")


def test_types_without_a_reference_dequantisation_say_so(tmp_path):
    content = make.model([], [make.tensor("ids", (4,), 26, 0)], np.array([1, 2, 3, 4], np.int32).tobytes())
    with GGUFFile(file_with(tmp_path, content)) as file:
        assert file.tensors["ids"].quant == "I32" and file.bytes("ids").view(np.int32).tolist() == [1, 2, 3, 4]
        with pytest.raises(GGUFError, match="does not dequantise I32"):
            file.dequantize("ids")


RESIDENT = """
import sys
from rgpu.gguf import GGUFFile

def resident():
    lines = open("/proc/self/smaps").read().splitlines()
    i = next(i for i, line in enumerate(lines) if line.endswith(sys.argv[1]))
    return next(int(line.split()[1]) for line in lines[i:] if line.startswith("Rss:"))

file = GGUFFile(sys.argv[1])
views = [file.bytes(name) for name in file.tensors]
opened = resident()
for view in views[1:]:
    view[0] + view[-1]
print(opened, resident())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads /proc/self/smaps")
def test_opening_touches_no_tensor_page(tmp_path):
    tensors = [make.tensor(f"t{i}", (1 << 20, 16), 0, i << 26) for i in range(8)]
    path = file_with(tmp_path, make.model([], tensors))
    os.truncate(path, 600 << 20)
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", RESIDENT, path], cwd=root, capture_output=True, check=True, text=True)
    opened, touched = map(int, run.stdout.split())
    assert opened <= 4096  # KiB: the header's page and what the kernel maps around it, at most a huge page; the tensors: 512 MiB
    assert touched - opened >= 14 * 4  # KiB: first and last page of the tensors away from the header were still untouched


def test_the_vocabulary_equals_gguf_py(shared):
    path = shared / "data" / "vocab" / "ggml-vocab-gpt-2.gguf"
    oracle = GGUFReader(path)
    with GGUFFile(path) as file:
        for key in file.metadata:
            found = file.metadata[key]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == oracle.fields[key].contents()


def test_vocabularies_of_the_shared_folder(shared):
    paths = sorted((shared / "data" / "vocab").glob("*.gguf"))
    assert paths
    for path in paths:
        with GGUFFile(path) as file:
            assert not file.tensors and file.metadata["general.architecture"]
            n_tokens = len(file.metadata["tokenizer.ggml.token_type"])
            assert n_tokens == len(set(file.metadata["tokenizer.ggml.tokens"])) > 50_000
            assert all(" " in merge for merge in file.metadata["tokenizer.ggml.merges"])


def test_names():
    assert names.block(3, "attn_q.weight") == "blk.3.attn_q.weight"
    assert names.parse_block("blk.12.ffn_gate.7.weight") == (12, "ffn_gate.7.weight")
    for kind in ("gate", "up", "down"):
        assert names.stacked(0, kind) == f"blk.0.ffn_{kind}_exps.weight"
        assert names.parse_stacked(names.stacked(41, kind)) == (41, kind)
        assert names.expert(2, kind, 255) == f"blk.2.ffn_{kind}.255.weight"
        assert names.parse_expert(names.expert(10, kind, 0)) == (10, kind, 0)
    assert names.fused(7) == "blk.7.ffn_gate_up_exps.weight" and names.parse_fused(names.fused(7)) == 7
    parsers = (names.parse_block, names.parse_stacked, names.parse_fused, names.parse_expert)
    for other in ("output.weight", "blk.x.attn_q.weight", "blk.01.ffn_up.1.weight", "xblk.1.ffn_up.1.weight", "blk.1."):
        assert [parse(other) for parse in parsers] == [None] * 4
    for other in ("blk.1.ffn_gate.weight", "blk.1.ffn_gate_shexp.weight", "blk.1.ffn_gate_exps.bias", "blk.1.ffn_up.1.weight\n"):
        assert [parse(other) for parse in parsers[1:]] == [None] * 3
