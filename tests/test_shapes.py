"""Shapes of models: files against what the engine finds and allocates, known names against its tables and published sizes."""

import pytest

from bench.shapes import SHAPES
from convert.stock import to_per_expert
from rgpu import catalogue
from rgpu.catalogue import MODELS
from rgpu.errors import RgpuError, UnsupportedModel
from rgpu.gguf import GGUFFile
from rgpu.gguf.layout import find_experts
from rgpu.models import architectures
from rgpu.models.base import Layer
from rgpu.ops.reference import ReferenceOps
from rgpu.quants import TYPES
from rgpu.shapes import from_gguf
from rgpu.state import KVCache, State
from tests.tiny import VOCAB, stock_gguf

QWEN3_30B = {
    "block_count": 48, "embedding_length": 2048, "attention.head_count": 32, "attention.head_count_kv": 4, "expert_count": 128,
    "attention.key_length": 128, "attention.value_length": 128, "expert_used_count": 8, "expert_feed_forward_length": 768,
    "context_length": 40960, "attention.layer_norm_rms_epsilon": 1e-6,
}  # fmt: skip
ARCHES = {"qwen3.6-35b-a3b": SHAPES | {"block_count": 40, "expert_count": 256}, "qwen3-30b-a3b": QWEN3_30B}


def known(name: str):
    return catalogue.shape(name, MODELS[name])


@pytest.fixture(params=[("qwen35moe", "F32"), ("qwen35moe", "Q4_K"), ("qwen3moe", "Q8_0")], ids=str)
def stock(request, tmp_path):
    """A tiny model, with a block of multi-token prediction where the architecture has one."""
    arch, quant = request.param
    mtp = {} if arch == "qwen3moe" else {f"{arch}.nextn_predict_layers": 1, f"{arch}.block_count": 5}
    return stock_gguf(tmp_path / "stock.gguf", arch, quant, metadata=mtp)


# ---- files ----


def test_a_file_has_the_bytes_that_its_directory_says(stock):
    with GGUFFile(stock) as file:
        shape = from_gguf(file)
        hp = architectures()[shape.arch].hparams(file.metadata, VOCAB)
        records = [sum(part.nbytes for part in find_experts(file, layer, hp.n_expert)) for layer in range(hp.n_layer)]
        assert shape.records == tuple(records) and shape.n_layer == hp.n_layer
        mtp = sum(info.nbytes for name, info in file.tensors.items() if name.startswith(f"blk.{hp.n_layer}."))
        assert bool(mtp) == bool(hp.n_layer_nextn)
        assert shape.file == sum(info.nbytes for info in file.tensors.values())
        assert shape.dense + shape.embedding + shape.experts + mtp == shape.file
        assert shape.embedding == file.tensors["token_embd.weight"].nbytes
        assert shape.routed == sum(records) * hp.n_expert_used
        assert (shape.n_vocab, shape.n_ctx_train) == (VOCAB, hp.n_ctx_train)


@pytest.mark.parametrize("kv", ["f16", "f32", "q8_0"])
def test_a_session_takes_as_much_as_the_engine_allocates(stock, kv):
    with GGUFFile(stock) as file:
        shape = from_gguf(file)
        cls = architectures()[shape.arch]
        hp = cls.hparams(file.metadata, VOCAB)
        model = cls.__new__(cls)
        model.hp, model.layers = hp, [Layer(i, cls.layer_kind(hp, i)) for i in range(hp.n_layer)]
        state = State(model, ReferenceOps(None), TYPES[kv.upper()], n_ctx=7)
    caches = [layer for layer in state.layers if isinstance(layer, KVCache)]
    assert shape.kv(7, kv) == sum(cache.k.nbytes + cache.v.nbytes for cache in caches)
    assert shape.state == sum(array.nbytes for array in state.recurrent)
    assert shape.attention == len(caches) * 2 * hp.n_head * hp.n_embd_head_k
    # An estimate from above, but not far above: memory is kept free for it.
    assert 1.0 <= shape.activations / sum(cls.workspace(hp).values()) <= 2.0


def test_both_layouts_have_one_shape(stock, tmp_path):
    with GGUFFile(stock) as file:
        to_per_expert(file, tmp_path / "own.gguf")
        shape = from_gguf(file)
    with GGUFFile(tmp_path / "own.gguf") as file:
        own = from_gguf(file)
    assert sorted(own.tensors) == sorted(shape.tensors) and own.records == shape.records and own.dense == shape.dense


def test_another_type_is_what_a_file_of_that_type_would_be(tmp_path):
    files = [stock_gguf(tmp_path / f"{quant}.gguf", "qwen3moe", quant) for quant in ("F32", "F16")]
    shapes = []
    for path in files:
        with GGUFFile(path) as file:
            shapes.append(from_gguf(file))
    assert sorted(shapes[0].as_type("F16").tensors) == sorted(shapes[1].tensors)
    assert shapes[0].as_type("Q4_0").file < shapes[1].file < shapes[0].file


def test_a_tied_embedding_is_read_as_the_output(tmp_path):
    with GGUFFile(stock_gguf(tmp_path / "x.gguf", "qwen3moe")) as file:
        shape = from_gguf(file)
        del file.tensors["output.weight"]
        tied = from_gguf(file)
    assert tied.embedding == 0 and tied.dense == shape.dense and tied.file == shape.file - shape.embedding


@pytest.mark.parametrize("key, said", [("general.architecture", "no model"), ("qwen3moe.expert_count", "no experts")])
def test_what_is_no_model_with_experts(tmp_path, key, said):
    with GGUFFile(stock_gguf(tmp_path / "x.gguf", "qwen3moe")) as file:
        file.metadata = {name: file.metadata[name] for name in file.metadata if name != key}
        with pytest.raises(UnsupportedModel, match=said):
            from_gguf(file)


# ---- names ----


@pytest.mark.parametrize("name", ARCHES)
def test_known_models_have_the_matrices_that_the_engine_binds(name):
    params = MODELS[name]
    keys = {f"{params.arch}.{key}": value for key, value in ARCHES[name].items()}
    cls = architectures()[params.arch]
    table = cls.tensors(cls.hparams(keys, params.n_vocab))
    matrices = {t.name: t.shape for t in table if len(t.shape) > 1 and t.shape[0] > 1}
    assert dict(catalogue.tensors(params)) == matrices
    vectors = sum(4 * t.shape[-1] for t in table if t.name not in matrices)
    assert vectors < 2e-3 * known(name).dense


def test_the_35b_is_what_it_was_measured_to_be():
    """Figures of its Q4_K_M file: 320 experts read per token 609.5 MB, all 19.5 GB; dense 1.37 GB; state 63 and 3 MB."""
    shape = known("qwen3.6-35b-a3b")
    assert sorted(set(shape.records)) == [1769472, 2039808] and shape.records.count(2039808) == 20
    assert shape.routed == pytest.approx(609.5e6, rel=1e-3) and shape.experts == pytest.approx(19.5e9, rel=1e-3)
    assert shape.dense == pytest.approx(1.37e9, rel=0.01) and shape.file == pytest.approx(20175.7 * 2**20, rel=1e-3)
    assert (shape.kv(1, "f16"), shape.kv(1, "q8_0")) == (20480, 10880)
    assert shape.state == 30 * 4 * (32 * 128 * 128 + 3 * 8192)
    attention, delta_net, shared = 0.27e9, 1.01e9, 0.126e9
    routed = 320 * 3 * 512 * 2048
    assert shape.weights == pytest.approx(attention + delta_net + shared + routed + 40 * 256 * 2048, rel=0.01)


@pytest.mark.parametrize(
    "name, gigabytes", [("gpt-oss-20b", 12.1), ("gpt-oss-120b", 63.4), ("qwen3-30b-a3b", 18.6), ("qwen3.5-397b-a17b", 241)]
)
def test_files_have_their_published_sizes(name, gigabytes):
    assert known(name).file / 1e9 == pytest.approx(gigabytes, rel=0.01)


@pytest.mark.parametrize("name, total", [("qwen3-30b-a3b", 30.53), ("glm-4.5-air", 106.8), ("qwen3.5-397b-a17b", 397)])
def test_models_have_their_published_parameters(name, total):
    assert known(name).as_type("F16").file / 2e9 == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("name, active", [("qwen3-30b-a3b", 3.35), ("qwen3.5-397b-a17b", 17.4), ("gpt-oss-20b", 3.61 + 0.58)])
def test_a_token_is_multiplied_with_the_published_active_parameters(name, active):
    """In 1e9, embedding and output matrix included (gpt-oss counts but one of them)."""
    shape = known(name)
    assert (shape.weights + 2 * shape.output_weights) / 1e9 == pytest.approx(active, rel=0.01)


def test_a_sliding_window_bounds_half_of_the_layers():
    """gpt-oss-20b: 12 full layers take 24,576 bytes per token at f16."""
    shape = known("gpt-oss-20b")
    assert shape.kv(2000, "f16") - shape.kv(1000, "f16") == 24576 * 1000
    assert shape.kv(100, "f16") == 2 * 24576 * 100


def test_hyperparameters_from_a_command_line():
    ours = catalogue.parse("n_layer=94, n_embd=4096,n_head=64,n_ff_exp=1536", MODELS["qwen3-30b-a3b"])
    shape = catalogue.shape("235b", ours)
    assert shape.as_type("F16").file / 2e9 == pytest.approx(235, rel=0.01)  # Qwen3-235B-A22B
    assert shape.n_expert == 128


@pytest.mark.parametrize(
    "text, said",
    [
        ("n_layers=3", "no hyperparameter 'n_layers'"),
        ("n_layer=many", "'many', but must be a whole number"),
        ("n_layer=0", "n_layer is 0"),
        ("n_expert_used=129", "129 experts used of 128"),
        ("interval=4", "n_k_head"),
        ("mix=Q9", "mix is 'Q9'"),
        ("n_layer_dense_lead=48,n_ff=8", "48 of 48 layers"),
    ],
)
def test_senseless_hyperparameters(text, said):
    with pytest.raises(RgpuError, match=said):
        catalogue.parse(text, MODELS["qwen3-30b-a3b"])


def test_missing_hyperparameters_are_named():
    with pytest.raises(RgpuError, match="lacks n_embd, n_vocab, .*n_ff_exp"):
        catalogue.parse("n_layer=3", None)
