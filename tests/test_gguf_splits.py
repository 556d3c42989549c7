"""Split GGUF files: opened from any shard, and every way in which the shards can disagree."""

import numpy as np
import pytest

from rgpu.errors import GGUFError
from rgpu.gguf import GGUFFile
from tests import gguf_bytes as make
from tests.gguf_bytes import file_with, refuse
from tests.test_gguf_reader import write_model

DATA = np.random.default_rng(1).standard_normal(256).astype(np.float32).tobytes()


@pytest.mark.parametrize("small_first_shard", [False, True])
def test_split_opens_from_every_shard(tmp_path, small_first_shard):
    stored = write_model(tmp_path / "model.gguf", split_max_tensors=3, small_first_shard=small_first_shard)
    n_shards = 4 if small_first_shard else 3
    paths = [tmp_path / f"model-{i + 1:05d}-of-{n_shards:05d}.gguf" for i in range(n_shards)]
    assert sorted(tmp_path.iterdir()) == paths
    for path in paths:
        with GGUFFile(path) as file:
            assert file.path == path and file.paths == paths
            assert file.metadata["tokenizer.ggml.tokens"] == ["<s>", "Ġa", "日本", ""]
            assert file.integer("split.tensors.count") == 7
            assert list(file.tensors) == list(stored)
            shards = [info.shard for info in file.tensors.values()]
            assert shards == ([1, 1, 1, 2, 2, 2, 3] if small_first_shard else [0, 0, 0, 1, 1, 1, 2])
            for name, expected in stored.items():
                np.testing.assert_array_equal(file.bytes(name), expected)


def test_each_shard_has_its_own_alignment(tmp_path):
    data = np.random.default_rng(7).standard_normal((3, 8)).astype(np.float32)
    paths = []
    for i, alignment in enumerate((64, 32, 4096)):
        split = [("split.no", make.U16, i), ("split.count", make.U16, 3), ("split.tensors.count", make.I32, 3)]
        pairs = [make.pair("general.alignment", make.U32, alignment)] + [make.pair(*each) for each in split]
        content = make.model(pairs, [make.tensor(f"t{i}", (8,), 0, 0)], data[i].tobytes(), alignment=alignment)
        paths.append(file_with(tmp_path, content, f"m-{i + 1:05d}-of-00003.gguf"))
    with GGUFFile(paths[1]) as file:
        assert file.alignment == 64
        for i in range(3):
            assert file.tensors[f"t{i}"].shard == i
            np.testing.assert_array_equal(file.dequantize(f"t{i}"), data[i])


@pytest.mark.parametrize("count", [0, 1])
def test_split_count_of_a_single_file_means_unsplit(tmp_path, count):
    pairs = [make.pair("split.no", make.U16, 0), make.pair("split.count", make.U16, count)]
    pairs += [make.pair("split.tensors.count", make.I32, 9), make.pair("a", make.U8, 3)]
    with GGUFFile(file_with(tmp_path, make.model(pairs), "any name.gguf")) as file:
        assert file.paths == [tmp_path / "any name.gguf"] and file.metadata["a"] == 3


def split_file(number: int, count: int, total: int | None, *names: str) -> bytes:
    pairs = [make.pair("split.no", make.U16, number), make.pair("split.count", make.U16, count)]
    pairs += [] if total is None else [make.pair("split.tensors.count", make.I32, total)]
    return make.model(pairs, [make.tensor(name, (8,), 0, 32 * i) for i, name in enumerate(names)], DATA)


def test_missing_shards_are_named(tmp_path):
    path = file_with(tmp_path, split_file(1, 3, 3, "b"), "m-00002-of-00003.gguf")
    refuse(path, "2 of 3 files of this split are missing: ", "m-00001-of-00003.gguf", "m-00003-of-00003.gguf")


def test_many_missing_shards_stay_one_line(tmp_path):
    path = file_with(tmp_path, split_file(0, 60000, 3, "b"), "m-00001-of-60000.gguf")
    with pytest.raises(GGUFError, match="59999 of 60000 files .* and 59996 more") as caught:
        GGUFFile(path)
    assert len(str(caught.value)) < 600


def test_name_that_hides_the_other_shards(tmp_path):
    path = file_with(tmp_path, split_file(0, 2, 2, "a"), "renamed.gguf")
    refuse(path, "is file 1 of a split into 2, so its name should end in -00001-of-00002.gguf")


def test_name_of_another_shard(tmp_path):
    path = file_with(tmp_path, split_file(0, 2, 2, "a"), "m-00002-of-00002.gguf")
    refuse(path, "is file 1 of a split into 2, so its name should end in -00001-of-00002.gguf")


def test_split_number_beyond_its_count(tmp_path):
    path = file_with(tmp_path, split_file(5, 2, 2, "a"), "m-00002-of-00002.gguf")
    refuse(path, "split.no is 5, which is not below split.count 2")


def test_shard_with_another_number(tmp_path):
    path = file_with(tmp_path, split_file(0, 2, 2, "a"), "m-00001-of-00002.gguf")
    other = file_with(tmp_path, split_file(0, 2, 2, "b"), "m-00002-of-00002.gguf")
    with pytest.raises(GGUFError, match="m-00002-of-00002.gguf: split.no and split.count are 0 and 2, expected 1 and 2"):
        GGUFFile(path)
    other.write_bytes(make.model())
    with pytest.raises(GGUFError, match="m-00002-of-00002.gguf: split.no and split.count are 0 and 0, expected 1 and 2"):
        GGUFFile(path)
    other.write_bytes(split_file(1, 2, 2, "b"))
    assert list(GGUFFile(path).tensors) == list(GGUFFile(other).tensors) == ["a", "b"]


@pytest.mark.parametrize("total", [1, 3, -1])
def test_total_of_tensors_differs(tmp_path, total):
    path = file_with(tmp_path, split_file(0, 2, total, "a"), "m-00001-of-00002.gguf")
    file_with(tmp_path, split_file(1, 2, total, "b"), "m-00002-of-00002.gguf")
    refuse(path, f"split.tensors.count is {total}, but the files hold 2 tensors")


def test_duplicate_tensor_in_another_shard(tmp_path):
    path = file_with(tmp_path, split_file(0, 2, None, "a", "b"), "m-00001-of-00002.gguf")
    other = file_with(tmp_path, split_file(1, 2, None, "c", "b"), "m-00002-of-00002.gguf")
    with pytest.raises(GGUFError, match=f"{other.name}: tensor 'b' occurs in an earlier file"):
        GGUFFile(path)


def test_damaged_shard_is_the_one_named(tmp_path):
    path = file_with(tmp_path, split_file(0, 2, 2, "a"), "m-00001-of-00002.gguf")
    file_with(tmp_path, split_file(1, 2, 2, "b")[:60], "m-00002-of-00002.gguf")
    with pytest.raises(GGUFError, match="m-00002-of-00002.gguf: the header claims 3 key-value pairs"):
        GGUFFile(path)


@pytest.mark.parametrize(("kind", "value"), [(make.U64, 2**60), (make.STRING, "many"), (make.I32, -1), (make.F32, 2.0)])
def test_split_count_of_a_wrong_kind(tmp_path, kind, value):
    content = make.model([make.pair("split.count", kind, value)])
    refuse(file_with(tmp_path, content), f"split.count should be an integer from 0 to 65535, found {value!r}")
