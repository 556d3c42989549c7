"""Conversions end to end: GGUF to per-expert and back without a changed byte, hub folders with the values of llama.cpp."""

import filecmp
import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from convert import values
from convert.__main__ import main
from rgpu.gguf import GGUFFile, names
from rgpu.gguf.layout import ALIGNMENT, KINDS, find_experts

from .gguf_forms import rewrite
from .test_layout import experts, tensors, write
from .tiny import stock_gguf
from .tiny_hub import hub_checkpoint, hub_config, hub_tensors

MIXED = {"gate": "Q4_K", "up": "Q5_K", "down": "Q6_K"}


def mixed(name: str) -> str:
    """Types as in a mixed file: another one for each kind of expert, and within down from layer to layer."""
    layer, kind = names.parse_stacked(name) or (0, "")
    return ("Q6_K" if layer % 2 else "Q4_K") if kind == "down" else MIXED.get(kind, "Q8_0")


SOURCES = {
    "qwen35moe F32": dict(arch="qwen35moe"),
    "qwen35moe Q8_0": dict(arch="qwen35moe", quant="Q8_0"),
    "qwen35moe mixed": dict(arch="qwen35moe", quant=mixed, k=True),
    "qwen35moe with MTP": dict(arch="qwen35moe", metadata={"qwen35moe.nextn_predict_layers": 1, "qwen35moe.block_count": 5}),
    "qwen3moe MXFP4": dict(arch="qwen3moe", quant=lambda name: "MXFP4" if "_exps" in name else "BF16"),
}


def run(*arguments) -> None:
    assert main([str(a) for a in arguments]) == 0


@pytest.fixture
def convert(tmp_path):
    """Converts any source with any options into a file of its own; returns that file, opened."""
    opened = []

    def converted(source: Path, *options) -> GGUFFile:
        out = tmp_path / f"out-{len(opened)}.gguf"
        run(source, out, *options)
        opened.append(GGUFFile(out))
        return opened[-1]

    yield converted
    for file in opened:
        file.close()


def assert_same_tensors(a: GGUFFile, b: GGUFFile, except_for: tuple[str, ...] = ()) -> None:
    assert list(a.tensors) == list(b.tensors)
    for name, info in a.tensors.items():
        other = b.tensors[name]
        assert (info.quant, info.shape) == (other.quant, other.shape), name
        assert name.endswith(except_for or "\0") or np.array_equal(a.bytes(name), b.bytes(name)), name


# ---- GGUF to GGUF ----


@pytest.mark.parametrize("source", SOURCES)
def test_back_and_forth_gives_the_source_byte_for_byte(tmp_path, source):
    stock = stock_gguf(tmp_path / "stock.gguf", **SOURCES[source])
    run(stock, tmp_path / "expert.gguf")
    run("--stock", tmp_path / "expert.gguf", tmp_path / "back.gguf")
    assert filecmp.cmp(stock, tmp_path / "back.gguf", shallow=False)


@pytest.mark.parametrize("form", [{"fused": True}, {"alignment": 64}, {"alignment": 8192}, {"fused": True, "alignment": 4096}])
def test_fused_experts_and_other_alignments_come_back(tmp_path, form):
    source = rewrite(stock_gguf(tmp_path / "stock.gguf", "qwen35moe", "Q8_0"), tmp_path / "other.gguf", **form)
    run(source, tmp_path / "expert.gguf")
    run("--stock", tmp_path / "expert.gguf", tmp_path / "back.gguf")
    assert filecmp.cmp(source, tmp_path / "back.gguf", shallow=False)


@pytest.mark.parametrize("fused", [False, True])
def test_a_split_source_comes_back_as_one_file(tmp_path, fused):
    stock = stock_gguf(tmp_path / "stock.gguf", "qwen35moe", "Q8_0" if fused else mixed, k=True)
    stock = rewrite(stock, tmp_path / "merged.gguf", fused=fused)
    split = rewrite(stock, tmp_path / "split.gguf", per_file=9)
    shards = sorted(tmp_path.glob("split-*.gguf"))
    assert split == shards[0] and len(shards) > 5
    run(shards[3], tmp_path / "expert.gguf")
    run(stock, tmp_path / "expert-of-merged.gguf")
    assert filecmp.cmp(tmp_path / "expert.gguf", tmp_path / "expert-of-merged.gguf", shallow=False)
    run("--stock", tmp_path / "expert.gguf", tmp_path / "back.gguf")
    assert filecmp.cmp(stock, tmp_path / "back.gguf", shallow=False)


def test_files_of_llama_cpp_come_back_byte_for_byte(tmp_path, shared):
    for source in sorted((shared / "data/tiny/models").glob("*.gguf")):
        run(source, tmp_path / "expert.gguf", "--force")
        run("--stock", tmp_path / "expert.gguf", tmp_path / "back.gguf", "--force")
        assert filecmp.cmp(source, tmp_path / "back.gguf", shallow=False), source.name


def test_experts_are_contiguous_page_aligned_records_behind_the_dense_tensors(tmp_path):
    stock = stock_gguf(tmp_path / "stock.gguf", "qwen35moe", mixed, k=True)
    run(stock, tmp_path / "expert.gguf")
    with GGUFFile(stock) as source, GGUFFile(tmp_path / "expert.gguf") as file:
        dense = [name for name in source.tensors if "_exps" not in name]
        records = [names.expert(layer, kind, e) for layer in range(4) for e in range(8) for kind in KINDS]
        assert list(file.tensors) == dense + records
        assert all(info.offset % ALIGNMENT == 0 for info in file.tensors.values())
        for before, after in zip(records, records[1:], strict=False):
            a, b = file.tensors[before], file.tensors[after]
            assert b.offset == -(-(a.offset + a.nbytes) // ALIGNMENT) * ALIGNMENT
        assert all(np.array_equal(file.bytes(name), source.bytes(name)) for name in dense)
        for layer in range(4):
            for old, new in zip(find_experts(source, layer, 8), find_experts(file, layer, 8), strict=True):
                assert (old.quant, old.shape, old.nbytes) == (new.quant, new.shape, new.nbytes)
                for a, b in zip(old.offset, new.offset, strict=True):
                    assert np.array_equal(source.mapping()[a : a + old.nbytes], file.mapping()[b : b + new.nbytes])


def test_metadata_is_the_sources_in_its_order_with_our_keys_behind(tmp_path):
    stock = rewrite(stock_gguf(tmp_path / "stock.gguf", "qwen3moe"), tmp_path / "aligned.gguf", alignment=128)
    run(stock, tmp_path / "expert.gguf")
    with GGUFFile(stock) as source, GGUFFile(tmp_path / "expert.gguf") as file:
        keys = list(source.metadata)
        assert list(file.metadata)[: len(keys)] == keys
        assert all(key.startswith("rgpu.") for key in list(file.metadata)[len(keys) :])
        changed = [key for key in keys if source.metadata.raw(key) != file.metadata.raw(key)]
        assert changed == ["general.alignment"] and file.metadata["general.alignment"] == 4096
        assert file.metadata["rgpu.layout.version"] == 1 and file.metadata["rgpu.source.alignment"] == 128
        assert len(file.metadata["rgpu.source.digest"]) == 64
        assert file.metadata["rgpu.source.tensors"] == list(source.tensors)


def test_another_reader_reads_the_file(tmp_path):
    stock = stock_gguf(tmp_path / "stock.gguf", "qwen3moe", "Q8_0")
    run(stock, tmp_path / "expert.gguf")
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "expert.gguf").tensors}
    source = {t.name: t for t in gguf.GGUFReader(stock).tensors}
    for e in range(8):
        t = found[f"blk.1.ffn_down.{e}.weight"]
        assert np.array_equal(t.data, source["blk.1.ffn_down_exps.weight"].data[e])
    assert np.array_equal(found["token_embd.weight"].data, source["token_embd.weight"].data)


def test_expert_biases_stay_dense(tmp_path):
    content = tensors("stacked") | {"blk.1.ffn_up_exps.bias": experts(1)["gate"][:, 0, :64].astype(np.float32)}
    stock = write(tmp_path / "stock.gguf", content)
    run(stock, tmp_path / "expert.gguf")
    with GGUFFile(tmp_path / "expert.gguf") as file:
        dense = [name for name in content if not name.endswith("_exps.weight")]
        assert list(file.tensors)[: len(dense)] == dense and dense[-1] == "blk.1.ffn_up_exps.bias"
    run("--stock", tmp_path / "expert.gguf", tmp_path / "back.gguf")
    assert filecmp.cmp(stock, tmp_path / "back.gguf", shallow=False)


def test_restoring_an_edited_file_says_so(tmp_path, capfd):
    stock = stock_gguf(tmp_path / "stock.gguf", "qwen3moe")
    run(stock, tmp_path / "expert.gguf")
    content = (tmp_path / "expert.gguf").read_bytes()
    assert content.count(b"tiny-qwen3moe") == 1
    (tmp_path / "expert.gguf").write_bytes(content.replace(b"tiny-qwen3moe", b"tiny-QWEN3moe"))
    capfd.readouterr()
    run("--stock", tmp_path / "expert.gguf", tmp_path / "back.gguf")
    assert "edited" in capfd.readouterr().err
    with GGUFFile(stock) as source, GGUFFile(tmp_path / "back.gguf") as back:
        assert back.metadata["general.name"] == "tiny-QWEN3moe"
        assert_same_tensors(source, back)


def test_only_progress_is_printed_and_only_to_stderr(tmp_path, capfd):
    stock = stock_gguf(tmp_path / "stock.gguf", "qwen3moe")
    run(stock, tmp_path / "expert.gguf")
    out, err = capfd.readouterr()
    assert out == "" and "expert.gguf" in err and "100%" in err and "B/s" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expert.gguf", "stock.gguf"]


# ---- checkpoints ----


def test_reproduces_llama_cpps_conversion_tensor_for_tensor(tmp_path, shared):
    run(shared / "data/tiny/hub-tiny", tmp_path / "expert.gguf", "--type", "F32")
    run("--stock", tmp_path / "expert.gguf", tmp_path / "stock.gguf")
    with GGUFFile(shared / "data/tiny/models/tiny-F32.gguf") as theirs, GGUFFile(tmp_path / "stock.gguf") as ours:
        assert list(ours.tensors) == list(theirs.tensors)
        for name, info in theirs.tensors.items():
            assert (ours.tensors[name].quant, ours.tensors[name].shape) == (info.quant, info.shape), name
            assert np.array_equal(ours.bytes(name), theirs.bytes(name)), name
        assert set(ours.metadata) == set(theirs.metadata)
        # The name is made from that of the folder, which was another one.
        differing = [key for key in theirs.metadata if ours.metadata.raw(key) != theirs.metadata.raw(key)]
        assert differing == ["general.name"]


LAYOUTS = {
    "single experts": dict(experts="single"),
    "nested": dict(nested=True),
    "nested, single experts, in three files": dict(nested=True, experts="single", shards=3),
    "in four files": dict(shards=4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_checkpoint_gives_the_same_model(tmp_path, convert, layout):
    plain = convert(hub_checkpoint(tmp_path / "a" / "model", mtp=True), "--type", "F32")
    other = convert(hub_checkpoint(tmp_path / "b" / "model", mtp=True, **LAYOUTS[layout]), "--type", "F32")
    assert {*plain.tensors} == {*other.tensors} and {*plain.metadata} == {*other.metadata}
    assert all(np.array_equal(plain.bytes(name), other.bytes(name)) for name in plain.tensors)
    own = ("rgpu.source.tensors", "rgpu.source.digest")  # the order of the files is another
    assert all(plain.metadata.raw(key) == other.metadata.raw(key) for key in plain.metadata if key not in own)


@pytest.mark.parametrize("form", ["stacked", "single"])
def test_qwen3moe_values_are_those_of_the_checkpoint(tmp_path, convert, form):
    file = convert(hub_checkpoint(tmp_path / "model", "qwen3moe", experts=form), "--type", "F32")
    hub = hub_tensors(hub_config("qwen3moe"))
    needed = {
        "token_embd.weight": hub["embed_tokens.weight"],
        "output.weight": hub["lm_head.weight"],
        "blk.1.ffn_norm.weight": hub["layers.1.post_attention_layernorm.weight"],
        "blk.2.attn_q.weight": hub["layers.2.self_attn.q_proj.weight"],
        "blk.0.ffn_gate_inp.weight": hub["layers.0.mlp.gate.weight"],
        "blk.2.ffn_gate.7.weight": hub["layers.2.mlp.experts.gate_up_proj"][7, :32],
        "blk.2.ffn_up.7.weight": hub["layers.2.mlp.experts.gate_up_proj"][7, 32:],
        "blk.1.ffn_down.0.weight": hub["layers.1.mlp.experts.down_proj"][0],
    }
    for name, x in needed.items():
        assert np.array_equal(file.dequantize(name), x), name


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision_checkpoints_keep_every_bit(tmp_path, convert, dtype):
    folder = hub_checkpoint(tmp_path / "model", dtype=dtype)
    half, full = convert(folder, "--type", dtype), convert(folder, "--type", "F32")
    matrices = [name for name, info in half.tensors.items() if info.quant == dtype]
    assert len(matrices) > 100  # experts, attention, embeddings; norms and routers stay F32
    for name in half.tensors:
        assert np.array_equal(half.dequantize(name), full.dequantize(name)), name


def test_a_quantised_checkpoint_equals_its_quantised_gguf(tmp_path, convert):
    folder = hub_checkpoint(tmp_path / "model", k=True)
    run(folder, tmp_path / "float.gguf", "--type", "F32")
    run("--stock", tmp_path / "float.gguf", tmp_path / "stock.gguf")
    direct, indirect = convert(folder, "--type", "q4_k_m"), convert(tmp_path / "stock.gguf", "--type", "Q4_K_M")
    assert_same_tensors(direct, indirect)
    assert {"Q4_K", "Q6_K", "F32"} <= {info.quant for info in direct.tensors.values()}
    for file in (direct, indirect):
        assert file.metadata["general.file_type"] == 15 and file.metadata["general.quantization_version"] == 2
    assert list(direct.metadata) == list(indirect.metadata)


def test_blocks_are_those_of_gguf_py(tmp_path, convert):
    folder = hub_checkpoint(tmp_path / "model", dtype="BF16")
    blocks, full = convert(folder, "--type", "Q8_0"), convert(folder, "--type", "F32")
    quantised = [name for name, info in blocks.tensors.items() if info.quant == "Q8_0"]
    assert "blk.3.ffn_up.5.weight" in quantised and "output.weight" in quantised
    for name in quantised:
        needed = gguf.quants.quantize(full.dequantize(name), gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(blocks.bytes(name), needed.reshape(-1)), name


@pytest.mark.parametrize("form", ["stacked", "single"])
def test_slices_change_nothing(tmp_path, convert, monkeypatch, form):
    folder = hub_checkpoint(tmp_path / "model", experts=form, dtype="BF16")
    plain = convert(folder, "--type", "Q8_0")
    monkeypatch.setattr(values, "SLICE", 4 * 64 * 100)  # 100 rows of an embedding, 3 experts
    assert_same_tensors(plain, convert(folder, "--type", "Q8_0"))


def test_default_type_of_a_checkpoint_is_q4_k_m_and_help_says_so(tmp_path, convert, capsys):
    file = convert(hub_checkpoint(tmp_path / "model", "qwen3moe", k=True))
    assert file.metadata["general.file_type"] == 15
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "default: Q4_K_M for a model folder" in " ".join(capsys.readouterr().out.split())


def test_mtp_block_is_kept_or_left_out(tmp_path, convert, capfd):
    folder = hub_checkpoint(tmp_path / "model", mtp=True, nested=True)
    kept = convert(folder, "--type", "F32")
    assert kept.metadata["qwen35moe.block_count"] == 5 and kept.metadata["qwen35moe.nextn_predict_layers"] == 1
    assert {"blk.4.nextn.eh_proj.weight", "blk.4.attn_q.weight", "blk.4.ffn_up.7.weight"} <= {*kept.tensors}
    assert capfd.readouterr().err.count("skipped the vision tower: 1 tensors") == 1
    without = convert(folder, "--type", "F32", "--no-mtp")
    assert "skipped the multi-token-prediction block" in capfd.readouterr().err
    assert without.metadata["qwen35moe.block_count"] == 4 and "qwen35moe.nextn_predict_layers" not in without.metadata
    assert {*without.tensors} == {name for name in kept.tensors if not name.startswith("blk.4.")}


def edit(folder: Path, **changes) -> Path:
    """Changes keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def test_an_mtp_block_that_only_the_configuration_has_is_left_out(tmp_path, convert, capfd):
    file = convert(edit(hub_checkpoint(tmp_path / "model"), mtp_num_hidden_layers=1), "--type", "F32")
    assert file.metadata["qwen35moe.block_count"] == 4
    assert "the checkpoint does not" in capfd.readouterr().err


def test_tied_embeddings_are_stored_once(tmp_path, convert):
    folder = edit(hub_checkpoint(tmp_path / "model", "qwen3moe"), tie_word_embeddings=True)
    file = convert(folder, "--type", "F32")
    assert "output.weight" not in file.tensors and "token_embd.weight" in file.tensors


def test_model_card_and_sampling_become_general_keys(tmp_path, convert):
    folder = hub_checkpoint(tmp_path / "Tiny-8x1M-Instruct", "qwen3moe")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- moe\n- 2024\nlanguage:\n- en\n---\n# Tiny\n")
    metadata = convert(folder, "--type", "F32").metadata
    assert metadata["general.name"].startswith("Tiny 8x1M") and metadata["general.license"] == "apache-2.0"
    assert metadata["general.tags"] == ["moe", "2024"] and metadata["general.languages"] == ["en"]
    assert metadata["general.sampling.top_k"] == 20 and metadata.type_of("general.sampling.top_k")[0] == 5  # i32
    assert metadata["general.sampling.top_p"] == pytest.approx(0.95, abs=1e-7)


def test_a_broken_model_card_is_ignored_with_a_line(tmp_path, convert, capfd):
    folder = hub_checkpoint(tmp_path / "model", "qwen3moe")
    (folder / "README.md").write_text("---\na: [1\n---\n")
    assert convert(folder, "--type", "F32").metadata["general.type"] == "model"
    assert capfd.readouterr().err.count("model card is ignored") == 1
