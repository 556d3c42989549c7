"""bench.ram: two runs of the same tokens, its row, and what makes it fail. (What is measured: test_ram.py, test_cached.py.)"""

import csv
import json

import pytest

from bench import ram
from rgpu.errors import RgpuError
from rgpu.machine import PROFILES
from tests import arenas

pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return arenas.written(tmp_path_factory.mktemp("bench"), "qwen3moe", "per_expert")


@pytest.fixture
def bench(model, tmp_path, monkeypatch, capsys):
    """bench(size, change): exit code, the CSV's rows, the last line of stdout, stderr; `change` alters what a run has found."""
    monkeypatch.setattr(ram, "RESULTS", tmp_path)

    def run(size="1T", change=None):
        def here(path, cap, *arguments):
            with arenas.few_slots(8):
                found = ram.generate(path, cap, *arguments)
            return change(cap, found) if change else found

        monkeypatch.setattr(ram, "in_a_process", here)
        monkeypatch.setattr(ram, "this_machine", lambda *arguments, **more: PROFILES["cpu"])
        code = ram.main([str(model), "--ram", size, "--tokens", "30", "--warm", "10", "--seed", "1"])
        out, err = capsys.readouterr()
        rows = list(csv.DictReader((tmp_path / "ram.csv").read_text().splitlines()))
        return code, rows, json.loads(out.splitlines()[-1]), err

    return run


def test_a_run_that_is_right(bench, model):
    code, rows, last, err = bench()
    assert code == 0 and len(rows) == 1 and {key: str(value) for key, value in last.items()} == rows[0]
    assert (last["model"], last["ram_gb"], last["set"], last["slots_per_layer"]) == (model.name, 1000, "B", 8)
    assert last["identical"] is True and 0.05 < last["peak_gb"] < 4 and last["tok_s"] > 0 and last["mapped_tok_s"] > 0
    misses = (1 - last["hit_rate"]) * 3 * arenas.K
    assert 0.3 < last["hit_rate"] < 0.99 and 0 < last["swaps_per_token"] <= misses
    record = 3 * 4096  # bytes that a miss reads: each of the matrices has a page
    assert last["read_mb_per_token"] == pytest.approx(misses * record / 1e6, abs=0.006)
    assert last["plan_hit_rate"] == 1 and last["of_plan"] == pytest.approx(last["tok_s"] / last["plan_tok_s"], abs=1e-3)
    assert "8 slots per layer" in err and "held" in err and "identical" in err


def test_other_tokens_or_more_memory_are_a_failure(bench):
    code, _, last, err = bench(change=lambda cap, found: found | {"tokens": found["tokens"][:-1] + [0]} if cap else found)
    assert (code, last["identical"]) == (1, False) and "DIFFERENT" in err
    code, _, last, err = bench(size="900M", change=lambda cap, found: found | {"peak": 901_000_000})
    assert code == 1 and last["identical"] and "0.901 GB of 0.9: EXCEEDED" in err


def test_a_run_that_fails_is_one_clear_line(model, monkeypatch, capsys):
    monkeypatch.undo()  # for the child, compiled kernels are in the cache
    with pytest.raises(RgpuError, match=r"^the run with ram = 1M failed: rgpu\.errors\.OutOfMemory: .* are left"):
        ram.in_a_process(str(model), "1M", "", 1, 1)
    assert ram.main([str(model.with_name("missing.gguf")), "--ram", "1G"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "missing.gguf" in err
