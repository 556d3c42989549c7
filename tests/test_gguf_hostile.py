"""Files that are cut short, damaged or lying: always one GGUFError that says where, soon and in little memory."""

import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rgpu.errors import GGUFError
from rgpu.gguf import GGUFFile
from tests import gguf_bytes as make
from tests.gguf_bytes import file_with, refuse

DATA = np.random.default_rng(1).standard_normal(256).astype(np.float32).tobytes()
PAIRS = [
    make.pair("general.architecture", make.STRING, "qwen3moe"),
    make.pair("general.alignment", make.U32, 64),
    make.array("tokens", make.STRING, ["a", "bc", "日"]),
    make.array("scores", make.F32, [0.5, 1.5]),
    make.pair("yes", make.BOOL, True),
]
TENSORS = [make.tensor("first", (8, 4), 0, 0), make.tensor("second", (256, 2), 12, 128), make.tensor("third", (5,), 0, 448)]
VALID = make.model(PAIRS, TENSORS, DATA[: 448 + 20], alignment=64)
HUGE = 2**60


def read_everything(path) -> None:
    with GGUFFile(path) as file:
        for key in file.metadata:
            assert file.metadata.raw(key) and file.metadata[key] is not None
        for name, info in file.tensors.items():
            assert file.bytes(name).size == info.nbytes > 0
            assert int(file.bytes(name).sum()) >= 0


def test_the_valid_file_is_valid(tmp_path):
    read_everything(file_with(tmp_path, VALID))


def test_cut_anywhere(tmp_path):
    """No cut opens except that behind the last tensor's last byte; each names an offset, a tensor or the header."""
    path = tmp_path / "model.gguf"
    directory_end = len(VALID) - 468
    for size in range(len(VALID)):
        path.write_bytes(VALID[:size])
        if size == 0:
            words = ["the file is empty"]
        elif size < 24:
            words = ["inside the header"] if size >= 4 else ["is not a GGUF file"]
        elif size < directory_end - 64:
            words = []
        else:
            words = ["tensor"]
        refuse(path, *words)
        with pytest.raises(GGUFError, match="header|offset [0-9]|not a GGUF|empty|tensor 'f|tensor 's|tensor 't"):
            GGUFFile(path)


@settings(max_examples=400, deadline=None)
@given(position=st.integers(0, len(VALID) - 1), value=st.integers(0, 255))
def test_one_byte_changed(tmp_path_factory, position, value):
    content = bytearray(VALID)
    content[position] = value
    check_bytes(tmp_path_factory, bytes(content))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(4, len(VALID) - 469), st.sampled_from([0, 1, 2, 9, 127, 128, 255])), max_size=12))
def test_many_bytes_changed(tmp_path_factory, changes):
    content = bytearray(VALID)
    for position, value in changes:
        content[position] = value
    check_bytes(tmp_path_factory, bytes(content))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
@example(struct.pack("<IQQ", 3, 0, 1) + make.string("k") + struct.pack("<IIQ", 9, 8, 2**64 - 1))
@example(struct.pack("<IQQ", 3, 0, 1) + make.string("k") + struct.pack("<IQ", 8, 2**64 - 1))
@example(struct.pack("<IQQ", 3, 0, 1) + make.string("k") + struct.pack("<IIQQ", 9, 8, 1, 2**63 - 60) + b"x" * 20)
def test_rubbish_behind_the_magic(tmp_path_factory, rubbish):
    check_bytes(tmp_path_factory, b"GGUF" + rubbish)


def check_bytes(tmp_path_factory, content: bytes) -> None:
    """Opens and reads to the end, or one GGUFError line: nothing else."""
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(content)
    try:
        read_everything(path)
    except GGUFError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


# Not a file that can be read


def test_missing_file(tmp_path):
    refuse(tmp_path / "none.gguf", "cannot be opened: No such file or directory")


def test_directory(tmp_path):
    refuse(tmp_path, "is a directory")


def test_empty_file(tmp_path):
    refuse(file_with(tmp_path, b""), "the file is empty")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    refuse(tmp_path / "pipe.gguf", "is not a regular file")


def test_no_permission(tmp_path, monkeypatch):
    path = file_with(tmp_path, VALID)

    def denied(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)  # chmod stops nobody who runs the tests as root
    refuse(path, "cannot be opened: Permission denied")


def test_null_byte_in_the_path():
    with pytest.raises(GGUFError, match="cannot be opened"):
        GGUFFile("model\0.gguf")


def test_not_gguf(tmp_path):
    refuse(file_with(tmp_path, b"\x08\0\0\0\0\0\0\0{}      "), "is not a GGUF file", r"b'\x08\x00\x00\x00'")


# The header


def test_big_endian(tmp_path):
    content = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    refuse(file_with(tmp_path, content), "is a big-endian GGUF file")


@pytest.mark.parametrize("version", [0, 1, 4])
def test_unknown_version(tmp_path, version):
    refuse(file_with(tmp_path, make.model(version=version)), f"GGUF version {version} is not supported, only 2 and 3 are")


def test_claims_too_many_tensors(tmp_path):
    content = make.model(n_tensors=HUGE, data=bytes(76))
    assert len(content) <= 110
    refuse(file_with(tmp_path, content), f"the header claims {HUGE} tensors, which a file of {len(content)} bytes cannot hold")


def test_claims_too_many_pairs(tmp_path):
    refuse(file_with(tmp_path, make.model(n_pairs=HUGE, data=bytes(76))), f"the header claims {HUGE} key-value pairs")


def test_one_tensor_more_than_there_are(tmp_path):
    content = make.model([], [make.tensor("t", (8,), 0, 0)], b"\1" * 32, n_tensors=2)
    refuse(file_with(tmp_path, content), "the name of tensor 1 at offset 57 has ")
    content = make.model([], [make.tensor("t", (8,), 0, 0)], b"\0" * 8 + b"\1" * 4, n_tensors=2)
    refuse(file_with(tmp_path, content + bytes(20)), "tensor '' at offset 57 has 0 dimensions")
    content = make.model([], [make.tensor("t", (8,), 0, 0), make.tensor("much longer", (8, 1, 1, 1), 0, 0)[:-9]], alignment=1)
    refuse(file_with(tmp_path, content), f"the file ends ({len(content)} bytes) inside tensor info 1 at offset 57")


# Metadata


def test_key_longer_than_the_file(tmp_path):
    pair = make.string("key", HUGE) + struct.pack("<IB", 0, 1)
    refuse(file_with(tmp_path, make.model([pair])), f"key-value pair 0 at offset 24 has a key of {HUGE} bytes")


def test_string_longer_than_the_file(tmp_path):
    pair = make.string("key") + struct.pack("<I", make.STRING) + make.string("value", HUGE)
    refuse(file_with(tmp_path, make.model([pair])), "the file ends (", "inside key 'key' at offset 24")


@pytest.mark.parametrize("kind", [make.U8, make.F64, make.STRING, make.BOOL])
def test_array_longer_than_the_file(tmp_path, kind):
    pair = make.array("key", kind, [], count=HUGE)
    refuse(file_with(tmp_path, make.model([pair], data=bytes(40))), f"key 'key' at offset 24 claims {HUGE} elements, but only")


def test_string_in_an_array_longer_than_the_file(tmp_path):
    pair = make.array("key", make.STRING, ["a", "b"]) + make.string("c", HUGE)
    pair = pair.replace(struct.pack("<IQ", make.STRING, 2), struct.pack("<IQ", make.STRING, 4))
    refuse(file_with(tmp_path, make.model([pair], data=bytes(40))), "inside key 'key' at offset 24")


def test_array_of_arrays(tmp_path):
    pair = make.string("key") + struct.pack("<IIQIQ", make.ARRAY, make.ARRAY, 1, 0, 0)
    refuse(file_with(tmp_path, make.model([pair])), "key 'key' at offset 24 is an array of arrays")


def test_unknown_value_type(tmp_path):
    pair = make.string("key") + struct.pack("<IQ", 13, 0)
    refuse(file_with(tmp_path, make.model([pair])), "key 'key' at offset 24 has the unknown value type 13")


def test_unknown_element_type(tmp_path):
    pair = make.string("key") + struct.pack("<IIQ", make.ARRAY, 77, 0)
    refuse(file_with(tmp_path, make.model([pair])), "key 'key' at offset 24 has the unknown value type 77")


def test_duplicate_key(tmp_path):
    pairs = [make.pair("key", make.U8, 1), make.pair("key", make.U8, 2)]
    refuse(file_with(tmp_path, make.model(pairs)), "key 'key' at offset 40 occurs twice")


def test_key_that_is_not_utf8(tmp_path):
    refuse(file_with(tmp_path, make.model([make.pair(b"\xff\xfe", make.U8, 1)])), "key-value pair 0 at offset 24", "not UTF-8")


def test_values_that_are_not_utf8_are_refused_on_access(tmp_path):
    pairs = [make.pair("one", make.STRING, b"\xc3"), make.array("many", make.STRING, ["a", b"b\xff"])]
    with GGUFFile(file_with(tmp_path, make.model(pairs))) as file:
        with pytest.raises(GGUFError, match=r"the string of key 'one' \(offset 47\) is not UTF-8"):
            file.metadata["one"]
        with pytest.raises(GGUFError, match="string 1 of key 'many'"):
            file.metadata["many"]
        assert file.metadata.raw("one").endswith(b"\xc3")


@pytest.mark.parametrize("alignment", [0, 3, 48, 2**32 - 1])
def test_alignment_not_a_power_of_two(tmp_path, alignment):
    content = make.model([make.pair("general.alignment", make.U32, alignment)])
    refuse(file_with(tmp_path, content), f"general.alignment should be a u32 and a power of two, found {alignment}")


def test_alignment_of_another_type(tmp_path):
    content = make.model([make.pair("general.alignment", make.STRING, "32")])
    refuse(file_with(tmp_path, content), "general.alignment should be a u32 and a power of two, found '32'")
    content = make.model([make.array("general.alignment", make.U32, [32, 32])])
    refuse(file_with(tmp_path, content), "general.alignment should be a u32 and a power of two, found array([32, 32]")


def test_alignment_beyond_the_file(tmp_path):
    content = make.model([make.pair("general.alignment", make.U32, 2**31)], [make.tensor("t", (8,), 0, 0)], bytes(64))
    refuse(file_with(tmp_path, content), f"tensor 't' (32 bytes at offset {2**31}) passes the file's end")


# Tensors


@pytest.mark.parametrize("length", [1025, HUGE, 2**64 - 1])
def test_tensor_name_too_long(tmp_path, length):
    entry = make.string("name", length) + struct.pack("<IQIQ", 1, 8, 0, 0)
    refuse(file_with(tmp_path, make.model([], [entry], DATA * 2)), f"the name of tensor 0 at offset 24 has {length} bytes")


def test_tensor_name_that_is_not_utf8(tmp_path):
    content = make.model([], [make.tensor(b"\xff", (8,), 0, 0)], DATA)
    refuse(file_with(tmp_path, content), "the name of tensor 0 at offset 24 is not UTF-8")


def test_tensor_name_with_line_breaks(tmp_path):
    refuse(file_with(tmp_path, make.model([], [make.tensor("a\nb", (8,), 99, 0)], DATA)), r"tensor 'a\nb' has the unknown type")


@pytest.mark.parametrize("n_dims", [0, 5, 2**32 - 1])
def test_number_of_dimensions(tmp_path, n_dims):
    content = make.model([], [make.tensor("t", (8,), 0, 0, n_dims=n_dims)], DATA)
    refuse(file_with(tmp_path, content), f"tensor 't' at offset 24 has {n_dims} dimensions, 1 to 4 are allowed")


def test_zero_dimension(tmp_path):
    refuse(file_with(tmp_path, make.model([], [make.tensor("t", (8, 0), 0, 0)], DATA)), "tensor 't' has the dimensions [8, 0]")


@pytest.mark.parametrize("ne", [(HUGE,), (2**32, 2**32), (2**63, 2**63, 2**63, 2**63), (2**63, 2)])
def test_dimensions_that_overflow(tmp_path, ne):
    content = make.model([], [make.tensor("t", ne, 0, 0)], DATA)
    refuse(file_with(tmp_path, content), f"tensor 't' ({4 * math.prod(ne)} bytes at offset", "passes the file's end")


def test_row_not_a_multiple_of_the_block(tmp_path):
    content = make.model([], [make.tensor("t", (255, 256), 12, 0)], bytes(1 << 16))
    refuse(file_with(tmp_path, content), "tensor 't' has the dimensions [255, 256]; Q4_K needs the first divisible by 256")


@pytest.mark.parametrize("type_id", [4, 31, 255, 2**32 - 1])
def test_unknown_type(tmp_path, type_id):
    content = make.model([], [make.tensor("t", (256,), type_id, 0)], DATA)
    refuse(file_with(tmp_path, content), f"tensor 't' has the unknown type id {type_id}")


def test_unaligned_offset(tmp_path):
    content = make.model([], [make.tensor("t", (8,), 0, 16)], DATA)
    refuse(file_with(tmp_path, content), "tensor 't' has the offset 16, not a multiple of the alignment 32")


@pytest.mark.parametrize("offset", [1024, HUGE, 2**64 - 32])
def test_offset_beyond_the_file(tmp_path, offset):
    content = make.model([], [make.tensor("t", (8,), 0, offset)], DATA)
    place = f"(32 bytes at offset {offset + 64}) passes the file's end ({len(content)} bytes)"
    refuse(file_with(tmp_path, content), f"tensor 't' {place}")


def test_last_byte_missing(tmp_path):
    path = file_with(tmp_path, VALID[:-1])
    refuse(path, "tensor 'third' (20 bytes at offset", f"passes the file's end ({len(VALID) - 1} bytes)")


def test_duplicate_tensor(tmp_path):
    content = make.model([], [make.tensor("t", (8,), 0, 0), make.tensor("t", (8,), 0, 32)], DATA)
    refuse(file_with(tmp_path, content), "tensor 't' occurs twice")


def test_overlapping_tensors(tmp_path):
    content = make.model([], [make.tensor("b", (8,), 0, 32), make.tensor("a", (9,), 0, 0)], DATA)
    refuse(file_with(tmp_path, content), "tensors 'a' and 'b' overlap at offset 128")
