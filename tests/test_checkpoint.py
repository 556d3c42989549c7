"""Safetensors files that lie, are cut short or hold what is not supported: one ConvertError, in bounded time."""

import json
import struct
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.checkpoint import Checkpoint
from rgpu.errors import ConvertError


def header(content, length=None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **others):
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | others}


HOSTILE = {
    "empty": (b"", "can't be opened"),
    "seven bytes": (bytes(7), "not a safetensors file"),
    "a header beyond the file": (header({}, 2**60), "not a safetensors file"),
    "no header": (header({}, 0), "not a safetensors file"),
    "not JSON": (header(b"{nope}"), "not valid JSON"),
    "not UTF-8": (header(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "deeply nested": (header(b"[" * 100_000), "not valid JSON"),
    "a list": (header([1, 2]), "JSON object"),
    "an entry that is a number": (header({"x": 5}), "malformed"),
    "an entry without offsets": (header({"x": {"dtype": "F32", "shape": [2]}}), "malformed"),
    "three offsets": (header(entry(offsets=(0, 8, 9))) + bytes(8), "malformed"),
    "a negative size": (header(entry(shape=(-2,))) + bytes(8), "malformed"),
    "a negative offset": (header(entry(offsets=(-8, 0))) + bytes(8), "malformed"),
    "a size with a point": (header(entry(shape=(2.0,))) + bytes(8), "malformed"),
    "a size that is true": (header(entry(shape=(True, 2))) + bytes(8), "malformed"),
    "sizes that overflow": (header(entry(shape=(2**40, 2**40))) + bytes(8), "data_offsets"),
    "too many axes": (header(entry(shape=(1,) * 100)) + bytes(8), "malformed"),
    "offsets beyond the file": (header(entry(offsets=(8, 16))) + bytes(8), "data_offsets"),
    "offsets that disagree with the shape": (header(entry(shape=(3,))) + bytes(8), "data_offsets"),
    "an unknown type": (header(entry(dtype="F8_E4M3", offsets=(0, 2))) + bytes(8), "F8_E4M3"),
    "a type that is a list": (header(entry(dtype=["F32"])) + bytes(8), "malformed"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_safetensors(tmp_path, fault):
    content, word = HOSTILE[fault]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    begun = time.monotonic()
    with pytest.raises(ConvertError, match=word) as caught:
        Checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 and time.monotonic() - begun < 2


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 140))
def test_a_header_with_any_bytes_changed_opens_or_is_refused(tmp_path, changes, length):
    content = bytearray(header({"__metadata__": {}} | entry()) + bytes(8))
    for at, byte in changes:
        content[at % len(content)] = byte
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)  # the mapping of the last one must keep its bytes
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) - length] if length < len(content) else content)
    try:
        found = Checkpoint(tmp_path)
    except ConvertError as error:
        assert "\n" not in str(error)
    else:
        assert all(found.read(name).dtype == np.float32 for name in found.tensors)
