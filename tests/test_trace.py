"""Routing traces: what is saved comes back, what is no trace is refused in one line, what is generated has locality."""

from dataclasses import replace

import numpy as np
import pytest

from rgpu.errors import RgpuError
from rgpu.residency.trace import SETS, RoutingTrace


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return RoutingTrace.generate(50, n_layer=3, n_expert=16, k=4, seed=1)


def same(a, b) -> bool:
    return (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))


@pytest.mark.parametrize("without", [(), ("weights",), ("near",), ("weights", "near")])
def test_what_is_saved_comes_back(trace, without, tmp_path):
    trace = replace(trace, **dict.fromkeys(without))
    trace.save(tmp_path / "trace")  # at exactly this path
    loaded = RoutingTrace.load(tmp_path / "trace")
    assert same(loaded.ids, trace.ids) and same(loaded.weights, trace.weights) and same(loaded.near, trace.near)
    assert (loaded.n_expert, loaded.source) == (16, trace.source)


def test_compact(trace, tmp_path):
    trace.save(tmp_path / "trace.npz")
    assert (tmp_path / "trace.npz").stat().st_size < trace.ids.nbytes + trace.weights.nbytes + trace.near.nbytes + 2000


def test_keys(trace):
    keys, near = trace.keys(7), trace.near_keys(7)
    assert keys.tolist() == [layer * 16 + expert for layer in range(3) for expert in trace.ids[7, layer].tolist()]
    assert near.tolist() == [layer * 16 + expert for layer in range(3) for expert in trace.near[7, layer].tolist()]
    assert replace(trace, near=None).near_keys(7) is None


# ---- what is refused ----


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"some text\n", b"\x93NUMPY\x01\x00"])
def test_something_else(content, tmp_path):
    path = tmp_path / "else.npz"
    path.write_bytes(content)
    with pytest.raises(RgpuError, match=r"else\.npz is no routing trace"):
        RoutingTrace.load(path)


def test_an_array_of_another_kind(tmp_path):
    np.save(tmp_path / "one.npy", np.arange(3))
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    for name in ("one.npy", "other.npz"):
        with pytest.raises(RgpuError, match="is no routing trace"):
            RoutingTrace.load(tmp_path / name)


def test_truncated_or_damaged_at_any_place(trace, tmp_path):
    whole, path = tmp_path / "whole.npz", tmp_path / "part.npz"
    trace.save(whole)
    content = whole.read_bytes()
    random = np.random.default_rng(0)
    for end in random.integers(0, len(content), 40):
        path.write_bytes(content[:end])
        with pytest.raises(RgpuError, match="is no routing trace"):
            RoutingTrace.load(path)
    for at in random.integers(0, len(content), 200):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            loaded = RoutingTrace.load(path)
        except RgpuError as error:
            assert "\n" not in str(error)
        else:  # a date, or another byte that nobody reads
            assert same(loaded.ids, trace.ids)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        RoutingTrace.load(tmp_path / "none.npz")


def test_another_format(trace, tmp_path):
    trace.save(tmp_path / "trace.npz")
    with np.load(tmp_path / "trace.npz") as file:
        arrays = {**file, "rgpu_trace": 2}
    np.savez(tmp_path / "later.npz", **arrays)
    with pytest.raises(RgpuError, match="format 2, and 1 is needed"):
        RoutingTrace.load(tmp_path / "later.npz")


def changed(array: np.ndarray, at, value) -> np.ndarray:
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize(
    "what, wrong",
    [
        ("ids are int32", lambda t: {"ids": t.ids.astype(np.int32)}),
        ("ids are int16", lambda t: {"ids": t.ids[0]}),
        ("ids are int16", lambda t: {"ids": t.ids[:0], "weights": None, "near": None}),
        ("experts 0 to 16 of 16", lambda t: {"ids": changed(t.ids, (3, 1, 2), 16)}),
        ("experts -1 to 15 of 16", lambda t: {"near": changed(t.near, (3, 1, 2), -1)}),
        ("two ranks", lambda t: {"ids": changed(t.ids, (3, 1, 2), t.ids[3, 1, 0])}),
        ("two ranks", lambda t: {"near": changed(t.near, (3, 1, 2), t.ids[3, 1, 0])}),
        ("weights are float32", lambda t: {"weights": t.weights.astype(np.float32)}),
        ("weights are float16", lambda t: {"weights": t.weights[:-1]}),
        ("not finite", lambda t: {"weights": changed(t.weights, (3, 1, 2), np.nan)}),
        ("near misses are int16", lambda t: {"near": t.near[:, :2]}),
    ],
)
def test_contradictions(trace, what, wrong, tmp_path):
    replace(trace, **wrong(trace)).save(tmp_path / "wrong.npz")
    with pytest.raises(RgpuError, match=what):
        RoutingTrace.load(tmp_path / "wrong.npz")


# ---- what is generated ----


def test_ranks_and_weights(trace):
    assert trace.ids.dtype == np.int16 and trace.ids.shape == trace.weights.shape == trace.near.shape == (50, 3, 4)
    ranks = np.concatenate((trace.ids, trace.near), axis=-1)
    assert ranks.min() >= 0 and ranks.max() < 16 and (np.diff(np.sort(ranks), axis=-1) > 0).all()
    assert (np.diff(trace.weights, axis=-1) <= 0).all()
    # float16 has 11 bits: each of 4 weights below 1 is off by at most 2⁻¹²
    assert abs(trace.weights.astype(np.float64).sum(axis=-1) - 1).max() <= 4 * 2**-12


def test_there_may_be_fewer_near_misses_than_experts_used():
    trace = RoutingTrace.generate(5, n_layer=2, n_expert=6, k=4)
    assert trace.near.shape == (5, 2, 2)
    assert RoutingTrace.generate(5, n_layer=2, n_expert=4, k=4).near.shape == (5, 2, 0)


def test_a_seed_gives_the_same_trace_again(trace):
    again = RoutingTrace.generate(50, n_layer=3, n_expert=16, k=4, seed=1)
    assert same(again.ids, trace.ids) and same(again.weights, trace.weights)
    assert not same(RoutingTrace.generate(50, n_layer=3, n_expert=16, k=4, seed=2).ids, trace.ids)


def repeats(ids: np.ndarray, distance: int) -> np.ndarray:
    """[n_tokens - distance]: the part of a token's experts that the token so far before it used too."""
    return np.array([np.mean(np.isin(a, b)) for a, b in zip(ids[distance:, 1], ids[:-distance, 1], strict=True)])


def test_a_topic_lasts_until_it_is_changed():
    whole, cut = (RoutingTrace.generate(240, n_layer=2, n_expert=256, seed=3, topics=topics) for topics in ((), (120,)))
    assert same(whole.ids[:120], cut.ids[:120]) and not same(whole.ids[120:], cut.ids[120:])
    across = slice(120 - 40, 120)  # tokens 120 to 159 beside 80 to 119
    assert repeats(cut.ids, 40)[across].mean() < 0.75 * repeats(whole.ids, 40)[across].mean()


def distinct(ids: np.ndarray) -> float:
    return np.mean([len(np.unique(ids[:, layer])) for layer in range(ids.shape[1])])


def test_sets_differ_in_locality_and_layer_0_is_flatter():
    ids = {name: RoutingTrace.generate(200, n_layer=6, set=name, seed=4).ids for name in SETS}
    assert distinct(ids["A"][:, 1:]) < distinct(ids["B"][:, 1:]) < distinct(ids["C"][:, 1:])
    assert distinct(ids["B"][:, :1]) > max(distinct(ids["B"][:, layer : layer + 1]) for layer in range(1, 6))
