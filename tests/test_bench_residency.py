"""The laboratory of residency: the optimum is one, the classical LRU is it, and the figures are what they are called."""

import csv
import json
from collections import OrderedDict
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import residency, residency_bars
from bench.belady import belady, layer_lru
from bench.replay import Replay, profile, replay
from rgpu.residency.policy import LRU, POLICIES, Static
from rgpu.residency.trace import RoutingTrace


def trace_of(*tokens: list[list[int]], n_expert: int) -> RoutingTrace:
    """Experts by token and layer."""
    return RoutingTrace(np.array(tokens, np.int16), None, n_expert, "by hand")


@st.composite
def traces(draw, n_layer: int, n_expert: int, k: int, n_tokens: int) -> RoutingTrace:
    experts = st.permutations(range(n_expert)).map(lambda order: order[:k])
    layers = st.lists(experts, min_size=n_layer, max_size=n_layer)
    return trace_of(*draw(st.lists(layers, min_size=1, max_size=n_tokens)), n_expert=n_expert)


# ---- what policies are compared with ----


def test_belady_by_hand():
    """One layer, two slots. After 0 1 2 in turn, 0 and 1 are used next; 3 never, so it is not kept."""
    trace = trace_of([[0]], [[1]], [[2]], [[0]], [[3]], [[1]], [[0]], [[2]], n_expert=4)
    optimum = belady(trace, 2)
    assert optimum.hits.ravel().tolist() == [False, False, False, True, False, True, True, False]
    # 0 and 1 are kept when they come; 2 would have to leave before its next use; what comes last is of no use.
    assert optimum.moved.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def best(trace: RoutingTrace, slots: int) -> int:
    """The most hits, by trying everything that could be kept after each token."""
    hits = {frozenset(): 0}
    for token in range(len(trace.ids)):
        used = set(trace.keys(token).tolist())
        after: dict[frozenset, int] = {}
        for residents, n in hits.items():
            for kept in combinations(sorted(residents | used), min(slots, len(residents | used))):
                after[frozenset(kept)] = max(after.get(frozenset(kept), 0), n + len(residents & used))
        hits = after
    return max(hits.values())


@settings(max_examples=60)
@given(traces(n_layer=2, n_expert=3, k=1, n_tokens=8), st.integers(1, 5))
def test_belady_is_the_optimum(trace, slots):
    assert belady(trace, slots).hits.sum() == best(trace, slots)


@settings(max_examples=60)
@given(traces(n_layer=3, n_expert=6, k=2, n_tokens=30), st.integers(3, 18), st.sampled_from(list(POLICIES)), st.booleans())
def test_belady_is_never_beaten(trace, slots, name, everywhere):
    policy = POLICIES[name](3, 6)
    replayed, optimum = replay(trace, policy, slots, everywhere), belady(trace, slots)
    assert replayed.hits.sum() <= optimum.hits.sum()
    assert layer_lru(trace, [slots // 3])[0].hits.sum() <= optimum.hits.sum()


@settings(max_examples=60)
@given(traces(n_layer=2, n_expert=7, k=2, n_tokens=30))
def test_layer_lru_is_a_row_of_the_last_used(trace):
    sizes = [1, 2, 3, 5, 7]
    for slots, lru in zip(sizes, layer_lru(trace, sizes), strict=True):
        rows = [OrderedDict(), OrderedDict()]
        for token, layers in enumerate(trace.ids.tolist()):
            for row, ids, hits in zip(rows, layers, lru.hits[token], strict=True):
                assert hits.tolist() == [expert in row for expert in ids]
                for expert in ids:
                    row[expert] = None
                    row.move_to_end(expert)
                while len(row) > slots:
                    row.popitem(last=False)
        assert lru.moved.tolist() == (~lru.hits).sum(axis=(1, 2)).tolist()


# ---- replays ----


def test_a_step_sees_what_the_one_before_left():
    trace = trace_of([[0]], [[0]], [[1]], [[0]], [[1]], n_expert=2)
    replayed = replay(trace, LRU(1, 2), 1)
    assert replayed.hits.ravel().tolist() == [False, True, False, False, False]
    assert replayed.moved.tolist() == [1, 0, 1, 1, 1] and replayed.held.tolist() == [[1]] * 5
    assert (replayed.seconds > 0).all()


def test_a_profile_fills_the_arena_first():
    trace = trace_of([[0, 1]], [[1, 2]], [[1, 3]], n_expert=4)
    assert profile(trace, slice(0, 2)).tolist() == [1, 2, 1, 0]
    policy = Static(1, 4)
    policy.restore(profile(trace, slice(0, 3)))
    replayed = replay(trace, policy, 2)
    assert replayed.hits.tolist() == [[[True, True]], [[True, False]], [[True, False]]] and not replayed.moved.any()


def test_near_misses_reach_the_policy():
    ids = [[[0]], [[1]], [[0]], [[0]]]
    trace = RoutingTrace(np.array(ids, np.int16), None, 3, "", near=np.array([[[2]]] * 4, np.int16))
    heard = []
    policy = POLICIES["lru"](1, 3)
    policy.touch = lambda step, keys, near: heard.append((step, keys.tolist(), near.tolist()))
    replay(trace, policy, 1)
    assert heard == [(1, [0], [2]), (2, [1], [2]), (3, [0], [2]), (4, [0], [2])]


def test_generated_routing_has_the_published_locality():
    """Fewer layers than the bar's, so within 3 points of it."""
    trace = RoutingTrace.generate(600, n_layer=9, seed=5)
    rates = {slots: 100 * lru.hits[200:, 1:].mean() for slots, lru in zip((24, 64), layer_lru(trace, (24, 64)), strict=True)}
    assert rates == pytest.approx({24: 47.8, 64: 78.4}, abs=3)


# ---- the command ----


def run(capsys, *argv) -> tuple[dict, str]:
    assert residency.main([str(each) for each in argv]) == 0
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def test_sets(capsys, tmp_path):
    argv = ["--sets", "B", "--tokens", 400, "--slots", 8, 24, "--policies", "rotary", "static", "--results", tmp_path]
    printed, err = run(capsys, *argv)
    results = printed["results"]
    assert [(each["slots"], each["policy"]) for each in results] == [
        (slots, policy) for slots in (8, 24) for policy in ("layer lru", "belady", "rotary", "static", "used only")
    ]
    with (tmp_path / "residency.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, each in zip(rows, results, strict=True):
        assert row["policy"] == each["policy"] and float(row["warm"]) == each["warm"] and len(row["layers"].split()) == 40
        assert np.mean(each["layers"]) == pytest.approx(each["warm"], abs=0.06)  # 40 rates, each rounded to 0.1
        assert each["mb"] == pytest.approx(1.905 * each["moved"], abs=0.1)
    assert results[3]["cold"] is None and float(rows[2]["cold"]) < float(rows[2]["warm"]) > float(rows[2]["changed"])
    assert "rotary" in err and printed["bars"] == []  # of no bar all figures are there


def test_a_recorded_trace(capsys, tmp_path):
    trace = RoutingTrace.generate(60, n_layer=2, n_expert=16, k=2)
    trace.near = None
    trace.save(tmp_path / "mine.npz")
    argv = ["--trace", tmp_path / "mine.npz", "--slots", 4, "--policies", "lru", "rotary", "--results", tmp_path]
    results = run(capsys, *argv)[0]["results"]
    assert [each["policy"] for each in results] == ["layer lru", "belady", "lru", "rotary"]
    assert {each["source"] for each in results} == {"mine"} and {each["changed"] for each in results} == {None}


def test_pictures(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    run(capsys, "--sets", "B", "--tokens", 300, "--slots", 8, 12, "--policies", "rotary", "--png", "--results", tmp_path)
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("residency.png", "residency_map.png"))


def test_one_line_for_what_is_no_trace(capsys, tmp_path):
    (tmp_path / "text.npz").write_text("no trace")
    for name in ("text.npz", "none.npz"):
        assert residency.main(["--trace", str(tmp_path / name), "--results", str(tmp_path)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and name in err


# ---- the parts of a run, and the bars ----


def test_parts_of_a_run():
    """Hits in 1 of 2 routed experts while cold, both while warm, none after the change."""
    hits = np.zeros((1100, 1, 2), bool)
    hits[:100, :, 0] = hits[300:900] = True
    figures = residency.result("B", 8, "rotary", 900, Replay(hits, (~hits).sum(axis=(1, 2)) + 3.0))
    assert (figures.cold, figures.warm, figures.changed, figures.moved, figures.mb) == (50, 100, 0, 3, 5.7)
    # Without a change, and too short to be warm after 300 tokens.
    figures = residency.result("mine", 8, "static", 400, Replay(hits[:400], np.zeros(400)))
    assert (figures.cold, figures.warm, figures.changed) == (None, 50, None)


def figures(rate: float, moved: float = 1.0, us: float = 30.0):
    return SimpleNamespace(warm=rate, changed=rate - 1, moved=moved, us=us)


def found(rotary: float, us: float = 30.0, moved: float = 20.0) -> dict:
    """Results with LRU at 60 % and 50 moves, the optimum at 80, `rotary` as given."""
    results = {}
    for name in "ABC":
        for slots in (4, 45, 70):
            results[name, slots, "layer lru"] = figures(60, moved=50)
            results[name, slots, "lru"], results[name, slots, "belady"] = figures(59), figures(80)
            results[name, slots, "rotary"], results[name, slots, "used only"] = figures(rotary, moved, us), figures(61)
            results[name, slots, "static"] = figures(40)
    return results


@pytest.mark.parametrize(
    "results, missed",
    [
        (found(70.0), {"told of used"}),
        (found(63.0), {"told of used", "part of the way"}),
        (found(62.0), {"told of used", "part of the way", "LRU, points, mean"}),
        (found(59.9), {"told of used", "part of the way", "LRU, points, mean", "LRU, points, least", "moves"}),
        (found(70.0, moved=25.5), {"told of used", "moves"}),
        (found(70.0, us=51.0), {"told of used", "touch and turn"}),
        (found(39.0), {"told of used", "part of the way", "LRU, points, mean", "LRU, points, least", "moves", "over static"}),
    ],
)
def test_bars(results, missed):
    bars = residency_bars.bars(results)
    assert len(bars) == 8  # all but the generator's
    for bar in bars:
        assert bar.met != any(part in bar.what for part in missed), bar


def test_the_bar_of_the_generator():
    results = {("B", slots, "layer lru"): figures(rate) for slots, rate in {24: 48.8, 48: 70.5, 64: 77.4, 96: 87.8}.items()}
    assert [bar.met for bar in residency_bars.bars(results)] == [True, False, True, False]
