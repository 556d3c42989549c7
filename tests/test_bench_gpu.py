"""bench.gpu on the stand-in, with tiny shapes: every part runs, counts what kernels do, and is measured once for a commit.

So that the program is known to work before it meets a GPU. The seconds are the stand-in's and mean nothing.
"""

import csv
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bench import gpu, gpu_bytes, gpu_model, gpu_ops, gpu_rates, machine, shapes
from bench.compare import tokens
from bench.gpu_rates import Clock, Sizes, figure, fill
from rgpu import backend
from rgpu.engine import Engine
from rgpu.errors import DeviceError
from rgpu.ops.cuda import CudaOps
from tests import tiny
from tests.cuda_sim import SimDevice

SIZES = Sizes(
    n_embd=256, n_ff=256, n_expert=6, k=2, n_head=4, n_head_kv=2, head=64, n_k_head=1, n_v_head=2, d=32,
    matrices=((64, 256), (8, 512), (100_000, 256)), wide=(40, 256), prompts=(9, 20), contexts=(0, 16, 40),
    memory=1 << 20, most=3, product=256, rounds=2, launches=5, steps=3, repeats=1,
)  # fmt: skip
QUANTS = ["Q4_K", "Q6_K"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.stock_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf", "qwen35moe")


@pytest.fixture
def stand_in(monkeypatch):
    """The engine's GPU; the bench's is another."""
    device = SimDevice()
    monkeypatch.setattr(gpu, "open_device", SimDevice)
    monkeypatch.setattr(backend, "_cuda", lambda *arguments: (CudaOps(device), device.name))
    return device


@pytest.fixture
def bench(stand_in, model, tmp_path, capsys):
    """bench(*options): exit code, rows of the CSV, the last line of stdout, stderr."""

    def run(*options, types=QUANTS):
        code = gpu.main([*options, "--results", str(tmp_path), "--model", str(model), "--types", *types], SIZES)
        out, err = capsys.readouterr()
        path = tmp_path / "gpu.csv"
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        return code, rows, json.loads(out) if out else None, err  # nothing but one line of JSON

    return run


def test_every_part_is_measured_once(bench):
    code, rows, last, err = bench("--commit", "abc")
    assert code == 0 and {row["part"] for row in rows} == set(gpu.PARTS)
    assert {(row["gpu"], row["commit"]) for row in rows} == {("CUDA stand-in", "abc")}
    keys = [tuple(row[key] for key in ("part", "op", "type", "tokens", "context", "shape", "note")) for row in rows]
    assert len(set(keys)) == len(keys) and err.count("100000x256") == len(QUANTS)  # more than the memory
    counts = {part: sum(row["part"] == part for row in rows) for part in gpu.PARTS}
    assert counts == {"rates": 7, "matvec": 4, "experts": 9, "attention": 12, "recurrent": 3, "tiles": 4, "model": 14}
    beside = ("copy", "upload", "download", "launch", "mma", "open", "generate")
    rate = {(row["op"], row["type"]): row for row in rows if row["part"] == "rates"}
    copy, product = float(rate["copy", ""]["gb_s"]), float(rate["mma", "f16"]["tflop_s"])
    for row in rows:
        assert float(row["us"]) > 0
        if row["gb_s"] and row["tokens"]:
            assert float(row["of_copy"]) == round(100 * float(row["gb_s"]) / copy, 1)
        if row["tflop_s"] and row["tokens"]:
            assert float(row["of_product"]) == round(100 * float(row["tflop_s"]) / product, 1)
    assert all(bool(row["of_copy"] or row["of_product"]) == (row["op"] not in beside) for row in rows)
    matvec = {row["type"]: float(row["of_copy"]) for row in rows if row["part"] == "matvec" and row["shape"] == "64x256"}
    worst = min(matvec, key=matvec.get)
    assert last["bars"]["matvec 64x256"] == {"median": sum(matvec.values()) / 2, "worst": matvec[worst], "type": worst}
    assert set(last["bars"]["decode one graph, host_us"]) == {"0", "16", "40"}
    again = bench("--commit", "abc")
    assert again[:2] == (0, rows) and again[3].count("measured before") == len(gpu.PARTS)
    assert again[2]["bars"].keys() == last["bars"].keys()


def test_what_is_measured_again(bench):
    parts = "--parts", "recurrent"
    first = bench(*parts, "--commit", "abc")[1]
    assert {row["part"] for row in first} == {"rates", "recurrent"}  # what it is compared with
    for types, new in ((["Q4_K"], 2), (["Q4_K"], 0), (QUANTS, 4), (QUANTS, 0)):  # a row of a prompt's each, of two lengths
        rows = bench("--parts", "tiles", "--commit", "abc", types=types)[1]
        assert len(rows) - len(first) == new
        first = rows
    for options, new in (
        (("--commit", "abc"), 0),
        (("--commit", "abc", "--again"), 3),
        (("--commit", "def"), 10),
        (("--commit", "abc-dirty"), 10),
        (("--commit", "abc-dirty"), 10),  # of which tree?
    ):
        code, rows, _, _ = bench(*parts, *options)
        assert code == 0 and len(rows) - len(first) == new
        first = rows


def test_a_part_that_breaks_off_leaves_no_rows(bench, monkeypatch):
    def broken(device, sizes, args):
        yield figure("half", 1.0)
        raise DeviceError("the GPU is gone")

    monkeypatch.setitem(gpu.PARTS, "tiles", broken)
    code, rows, last, err = bench("--parts", "recurrent", "tiles", "--commit", "abc")
    assert (code, last) == (1, None) and err.endswith("error: the GPU is gone\n")
    assert {row["part"] for row in rows} == {"rates", "recurrent"}


def test_without_a_gpu_it_says_so(bench, monkeypatch):
    def absent():
        raise DeviceError("no NVIDIA driver: install it")

    monkeypatch.setattr(gpu, "open_device", absent)
    assert bench() == (1, [], None, "error: no NVIDIA driver: install it\n")


# ---- what is counted ----


@pytest.mark.parametrize("part, kernels", [
    (gpu_ops.matvec, ["matmul_one"]), (gpu_ops.experts, ["gate_up", "down"]), (gpu_ops.recurrent, ["delta_rule"]),
    (gpu_ops.attention, ["attention"]),
], ids=["matvec", "experts", "recurrent", "attention"])  # fmt: skip
def test_bytes_are_those_that_kernels_move(part, kernels):
    """A call loads what its row says, and beside it what every warp loads again, from a cache: the token, the queries."""
    device = SimDevice(counting=True)
    sizes = replace(SIZES, matrices=((512, 512),), contexts=(512,))
    row = next(row for row in part(device, sizes, ["Q4_K"]) if row["tokens"] == 1)
    moved = sum(sum(device.traffic[name]) / device.counted[name] for name in kernels)
    assert 0.999 * moved / 4 < row["gb_s"] * row["us"] * 1e3 < 1.001 * moved


# In which whole parts are the same: 64 of 16 tokens' queries, 2 of 8 experts, 512 of 1024 rows.
REPEATING = replace(
    SIZES, n_expert=8, n_head=8, prompts=(64,), contexts=(0, 80), matrices=((64, 256), (1024, 512)), wide=(1024, 256)
)  # fmt: skip
KERNELS = """
    matmul_one matmul_few matmul_many gate_up down product_many swiglu_many combine attention attention_combine attention_many
    short_conv delta_rule rms_norm swiglu gate add route
"""


def test_the_table_of_bytes(tmp_path, monkeypatch, capsys):
    def count():
        assert gpu.main(["--counted", "--types", "Q4_K", "F16", "--results", str(tmp_path)], REPEATING) == 0
        return list(csv.DictReader((tmp_path / "gpu_bytes.csv").read_text().splitlines())), capsys.readouterr().out

    rows, text = count()
    assert {row["kernel"] for row in rows} == {*KERNELS.split()}
    assert text.count("\n") == len(rows) + 2 and len({text.count("|") for text in text.splitlines()}) == 1
    for row in rows:
        assert int(row["loaded"]) >= int(row["read"]) > 0 and int(row["stored"]) == int(row["written"]) > 0, row
        assert float(row["us at 300 GB/s"]) >= float(row["us at 4.8 TB/s"]) >= int(row["read"]) / 4.8e6 * 0.999
    monkeypatch.setattr(gpu_bytes, "PART", 1024)
    assert count()[0] == rows  # all rows of a matrix


def test_without_the_stand_in_nothing_is_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tests.cuda_sim", None)
    assert gpu.main(["--counted", "--results", str(tmp_path)], REPEATING) == 1
    assert capsys.readouterr().err.startswith("error: kernels are counted on tests/cuda_sim, which is not here")
    assert not [*tmp_path.iterdir()]


def test_the_tests_for_a_gpu_run_on_the_stand_in():
    """Those that take no minute; the others: RGPU_STAND_IN=1 python -m pytest tests/test_gpu.py."""
    long = "TestProducts TestStates TestVerbs TestEngines real long command".split()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", f"not ({' or '.join(long)})"]
    environment = os.environ | {"RGPU_STAND_IN": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT, env=environment)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 15 and "skipped" not in done.stdout


def test_multiply_adds_are_those_of_the_verbs(model, monkeypatch):
    with Engine.open(model, device="reference", n_ctx=64) as engine:
        ops, done = engine.executor.ops, []

        def counted(verb, cost):
            real = getattr(ops, verb)
            monkeypatch.setattr(ops, verb, lambda *a: done.append(cost(*a)) or real(*a))

        def seen(out, q, cache, pos, scale):
            return 2 * q[0].size * sum(int(pos[0]) + t + 1 for t in range(len(q)))

        counted("matmul", lambda out, weight, x: len(x) * math.prod(weight.shape))
        counted("expert_ffn", lambda out, x, bank, table, ids, weights: ids.size * sum(math.prod(w.shape) for w in bank))
        counted("attention", seen)
        session = engine.session()
        for n, context in ((7, 0), (5, 7)):
            done.clear()
            session.forward(tokens(n, engine.hparams.n_vocab))
            assert sum(done) == gpu_model.multiply_adds(engine, n, context)


def test_steps_are_counted_and_timed(stand_in, model):
    engine = gpu_model.OnGpu(model, 64, 20)
    try:
        engine.eval(tokens(5, 500))
        engine.keep()
        with engine.timed():
            engine.step([1, 2])
            graphs = stand_in.counted["graph"]
            whole, beside = engine.times([3, 4])
        assert 0 < beside < whole and stand_in.counted["graph"] == graphs + 2
        with engine.timed(recorded=False):
            engine.step([5])
        assert stand_in.counted["graph"] == graphs + 2
        before = stand_in.counted["launches"]
        assert engine.launches(6) == stand_in.counted["launches"] - before > 50
        engine.back()
        assert engine.session.state.n_past == 5
    finally:
        engine.close()


def test_a_clock_times_long_enough_and_takes_the_median():
    calls, durations = [], iter([1e-3, 6e-3, 9e-3, 7.5e-3])
    event = SimpleNamespace(synchronize=lambda: None, elapsed=lambda since: next(durations))
    device = SimpleNamespace(event=lambda timed: event)
    clock = Clock(device, SimpleNamespace(record=lambda event: calls.append("|")), 3)
    assert clock(lambda: calls.append("w")) == 7.5e-3 / 5
    assert "".join(calls) == "ww|w||wwwww||wwwww||wwwww|"


@pytest.mark.parametrize("quant", ["Q6_K", "F32"])
def test_memory_is_filled_with_a_pattern(quant, monkeypatch):
    monkeypatch.setattr(gpu_rates, "PATTERN", 5000)
    device, n = SimDevice(), 210 * 4 * 25
    stream, address, back = device.stream(), device.allocate(n), np.zeros(n, np.uint8)
    fill(stream, address, n, quant)
    stream.download(back, address)
    period = 5000 // (4 if quant == "F32" else 210) * (4 if quant == "F32" else 210)
    assert np.array_equal(back, np.resize(back[:period], n)) and len(np.unique(back[:period])) == 256


def test_the_model_is_written_once(tmp_path, monkeypatch, capsys):
    written = []

    def write(arguments):
        print("{}")
        written.append(arguments[0])
        with open(arguments[0], "wb") as f:
            f.write(b"GGUF")

    monkeypatch.setattr(shapes, "main", write)
    monkeypatch.setattr(gpu_model.tempfile, "gettempdir", lambda: str(tmp_path))
    path = gpu_model.made(None)
    assert path.read_bytes() == b"GGUF" and gpu_model.made(None) == path and len(written) == 1
    assert [*tmp_path.iterdir()] == [path] and capsys.readouterr().out == ""
    assert gpu_model.made(tmp_path / "mine.gguf") == tmp_path / "mine.gguf"
