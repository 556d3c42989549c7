"""The benchmarks measure what they say: who runs when, from where, how many bytes; what lands in the CSV and on stdout."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import compare, decode, first_token, machine, plot, prefill
from bench.engines import LlamaCpp, Rgpu
from bench.machine import Interval, Patience
from rgpu.engine import builtin_model
from rgpu.errors import RgpuError
from tests import tiny

ASKED = "machine commit model type threads test tok_s peer peer_tok_s ratio".split()
PROMPT = [3, 141, 59, 26, 5, 35, 8, 97, 93, 238]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return tiny.stock_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf", "qwen35moe")


# ---- who runs, and from where ----


def test_turns_alternate_and_the_first_round_is_not_counted():
    calls = []

    def turn(name):
        calls.append(name)
        return len(calls)

    results = compare.alternate([lambda: turn("a"), lambda: turn("b")], 2, after=lambda: calls.append("-"))
    assert "".join(calls) == "ab-ab-ab-"
    assert results == [[4, 7], [5, 8]]


@pytest.fixture(params=["rgpu", "llama.cpp"])
def engine(request, tiny_model):
    if request.param == "llama.cpp":
        pytest.importorskip("llama_cpp", reason="needs the extra `bench`")
    opened = (Rgpu if request.param == "rgpu" else LlamaCpp)(tiny_model, 1, 64)
    yield opened
    opened.close()


def test_an_engine_goes_back_to_where_it_was(engine):
    """What follows a kept position does not depend on what came between."""
    engine.eval(PROMPT[:6])
    engine.keep()
    engine.step(PROMPT[6:])
    first = engine.logits()
    engine.eval([7, 7, 7])
    engine.back()
    assert engine.n_past == 6
    engine.step(PROMPT[6:])
    np.testing.assert_array_equal(engine.logits(), first)
    assert engine.n_past == len(PROMPT) and first.shape == (tiny.VOCAB,) and first.std() > 0.1


def test_both_engines_compute_the_same(tiny_model):
    pytest.importorskip("llama_cpp", reason="needs the extra `bench`")
    logits = []
    for kind in (Rgpu, LlamaCpp):
        engine = kind(tiny_model, 1, 64)
        engine.eval(PROMPT)
        logits.append(engine.logits())
        engine.close()
    # As in test_llamacpp.py, but with llama.cpp's KV cache in f16, which rounds keys and values by 2^-11.
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-2)


# ---- bytes, processors, memory ----


def test_bytes_of_weights_per_token():
    sizes = {
        "token_embd.weight": 1000,
        "output.weight": 2000,
        "blk.0.attn_q.weight": 30,
        "blk.0.ffn_gate_exps.weight": 800,  # 2 of 8 experts: 200
        "blk.0.ffn_up.0.weight": 100,  # the same, separate: 25 each
        "blk.0.ffn_up.1.weight": 100,
        "blk.1.attn_q.weight": 7,  # behind the last layer: multi-token prediction
    }
    file = SimpleNamespace(tensors={name: SimpleNamespace(nbytes=n) for name, n in sizes.items()})
    hp = SimpleNamespace(n_layer=1, n_expert=8, n_expert_used=2)
    assert decode.weight_bytes(file, hp) == 2000 + 30 + 200 + 2 * 25
    del file.tensors["output.weight"]
    assert decode.weight_bytes(file, hp) == 1000 + 30 + 200 + 2 * 25


def test_bytes_of_state_per_token(tiny_model):
    """One attention layer of four: 2 heads of 32 in f16, keys and values. The others: 4 states [16, 16], 3 rows of 128."""
    engine = Rgpu(tiny_model, 1, 64)
    kv, recurrent = 2 * 2 * 32 * 2, 3 * 4 * (4 * 16 * 16 + 3 * 128)
    assert decode.state_bytes(engine.session.state, 10.5) == 10.5 * kv + 2 * recurrent
    engine.close()


def watch(monkeypatch, busy: list[float], own: list[float]):
    """Clocks that show these values in turn."""
    for name, values in (("busy_seconds", busy), ("own_seconds", own)):
        monkeypatch.setattr(machine, name, iter(values).__next__)


def test_what_others_use(monkeypatch):
    watch(monkeypatch, [10.0, 13.0, 20.0, 20.5], [1.0, 2.0, 3.0, 3.6])
    intervals = []
    for seconds in (4, 1):
        with Interval() as interval:
            pass
        interval.seconds = seconds
        intervals.append(interval)
    assert intervals[0].others == pytest.approx(2) and intervals[1].others == 0  # ticks fell short of ours
    assert machine.others_cpu(intervals) == pytest.approx(2 / 5)
    intervals[1].others = None
    assert machine.others_cpu(intervals) == ""


def test_waiting_for_an_idle_machine(monkeypatch, capsys):
    monkeypatch.setattr(machine, "WINDOW", 0.01)
    patience = Patience(0.025)
    watch(monkeypatch, [0.0, 0.0], [0.0, 0.0])
    patience.wait()
    assert patience.left == 0.025 and not capsys.readouterr().err
    watch(monkeypatch, [1.0 * i for i in range(9)], [0.0] * 9)
    patience.wait()
    patience.wait()
    assert patience.left <= 0 and capsys.readouterr().err.count("does not become idle") == 1


def test_memory_is_read_from_the_file_if_no_cache_holds_it(monkeypatch, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(1 << 16))
    monkeypatch.setattr(machine.rates, "PIECE", 1 << 12)
    monkeypatch.setattr(machine, "CACHED", 1 << 14)
    rate, source = machine.read(path, 2)
    assert rate > 0 and source == "file"
    monkeypatch.setattr(machine, "CACHED", 1 << 20)
    assert machine.read(path, 2)[1] == "buffer"


# ---- the commands ----


def rows_of(folder, capsys) -> tuple[list[dict], list[dict]]:
    """(what a command printed as its last line, what is in its CSV)."""
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    (path,) = folder.iterdir()
    with path.open(newline="") as f:
        return printed, list(csv.DictReader(f))


def test_decode(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(decode, "read_rate", lambda path, threads: (20e9, "file"))
    command = [str(builtin_model()), "--threads", "1", "--rounds", "1", "--steps", "3", "--wait", "0", "--results", str(tmp_path)]
    assert decode.main([*command, "--contexts", "5", "0"]) == 0
    rows, kept = rows_of(tmp_path, capsys)
    assert [{key: str(value) for key, value in row.items()} for row in rows] == kept
    assert set(ASKED) <= set(rows[0]) and [row["context"] for row in rows] == [0, 5]
    for row in rows:
        assert row["model"] == "demo.gguf" and row["type"] == "Q4_K_M" and row["test"] == "decode 3" and row["peer"] == ""
        assert 0 < row["tok_s_min"] <= row["tok_s"] <= row["tok_s_max"]
        # The built-in model reads 1.9 MB (bench/LOG.md), and the state more; the columns are rounded to 1e-4 GB.
        assert 0.0019 < row["gb_per_token"] < 0.004
        assert row["share"] == pytest.approx(row["tok_s"] * row["gb_per_token"] / 20, rel=0.05, abs=1e-3)
    assert decode.main(command) == 0
    assert len(rows_of(tmp_path, capsys)[1]) == 3


def test_prefill_beside_a_peer(monkeypatch, tmp_path, capsys, tiny_model):
    class Peer(Rgpu):
        name, note = "peer", "a note"

        def __init__(self, path, threads, n_ctx, repack):
            assert not repack
            super().__init__(path, threads, n_ctx)

    monkeypatch.setattr(compare, "LlamaCpp", Peer)
    command = [str(tiny_model), "--tokens", "9", "--rounds", "3", "--wait", "0", "--results", str(tmp_path)]
    assert prefill.main([*command, "--contexts", "4", "--vs", "llama.cpp", "--no-repack"]) == 0
    (row,), _ = rows_of(tmp_path, capsys)
    assert (row["peer"], row["peer_note"], row["rss_gb"], row["type"]) == ("peer", "a note", "", "F32")
    assert row["ratio"] == pytest.approx(row["tok_s"] / row["peer_tok_s"], abs=1e-3)
    assert row["peer_tok_s_min"] <= row["peer_tok_s"] <= row["peer_tok_s_max"]


def test_first_token(tmp_path, capsys):
    assert first_token.main([str(builtin_model()), "--rounds", "1", "--wait", "0", "--results", str(tmp_path)]) == 0
    (row,), (kept,) = rows_of(tmp_path, capsys)
    assert list(kept) == first_token.COLUMNS
    assert 0 < row["seconds"] == row["seconds_min"] == row["seconds_max"] and row["test"] == "first token 256"


def test_wrong_calls(tmp_path, capsys, tiny_model):
    assert decode.main([str(tmp_path / "none.gguf")]) == 1
    assert "none.gguf" in capsys.readouterr().err
    for wrong in (["--no-repack"], ["--rounds", "0"], ["--contexts", "-1"]):
        with pytest.raises(SystemExit):
            decode.main([str(tiny_model), *wrong])
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RgpuError, match="other columns"):
        compare.append({"a": 1, "c": 2}, tmp_path / "x.csv")


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    columns = "machine commit model type threads context tok_s peer peer_tok_s gb_per_token share peer_share read_from".split()
    lines = [
        "old,1,a.gguf,Q4_0,2,0,30,,,0.4,0.5,,file",
        "new,2,a.gguf,Q4_0,2,0,31,llama.cpp,29,0.4,0.5,0.4,file",
        "new,2,a.gguf,Q4_0,2,512,28,,,0.4,0.5,,file",
        "new,2,s.gguf,Q4_0,2,0,3000,,,0.01,0.1,,buffer",
        "new,3,a.gguf,Q4_0,2,0,33,llama.cpp,29,0.4,0.5,0.4,file",
    ]
    (tmp_path / "decode.csv").write_text("\n".join([",".join(columns), *lines]) + "\n")
    curves = plot.newest(tmp_path / "decode.csv", None)
    assert [(label, sorted(points), points[0]["tok_s"]) for label, points in curves.items()] == [
        ("a.gguf: Q4_0, 2 threads", [0, 512], "33")
    ]
    assert plot.newest(tmp_path / "decode.csv", "old")["a.gguf: Q4_0, 2 threads"][0]["tok_s"] == "30"
    assert plot.main(["--results", str(tmp_path)]) == 0
    for path in json.loads(capsys.readouterr().out):
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert plot.main(["--results", str(tmp_path), "--machine", "none"]) == 1
