"""--ram from end to end, in processes of its own: the cap is held, files change under it, Ctrl-C, a kill, wrong values.

Tiny models are far below any cap that a Python process can have. Where slots must be few, the process is told how many.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from rgpu import Engine, EngineConfig
from rgpu.errors import GGUFError, OutOfMemory
from rgpu.residency.trace import RoutingTrace
from tests.arenas import FLOOR, few_slots, written
from tests.program import PLAIN, ROOT, expected_answer
from tests.test_chat import call
from tests.tiny import stock_gguf

pytestmark = pytest.mark.usefixtures("fresh_cache")
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs /proc: who else tells the peak?")


def command(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def python(code, *arguments):
    """A child that runs this code; it is killed if it hangs."""
    return subprocess.run(command(code, *arguments), capture_output=True, text=True, cwd=ROOT, timeout=120)


# ---- memory ----

N_EXPERT, K, N_LAYER = 64, 4, 3
HELD = """
import json, re, sys
from pathlib import Path
from rgpu import Engine, EngineConfig, engine
from rgpu.errors import OutOfMemory

path, trace = sys.argv[1:]
engine.RESERVE = 8 << 20  # a fifth of the model, so that experts which pile up are noticed
engine.LEARNED = 10**9

def run(ram):
    with Engine(EngineConfig(path, n_ctx=512, n_batch=64, threads=2, replay_trace=trace, ram=ram)) as opened:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        session = opened.session()
        tokens = [int(session.forward(list(range(2, 200))).argmax())]
        for _ in range(100):
            tokens.append(int(session.forward(tokens[-1:]).argmax()))
        status = Path("/proc/self/status").read_text()
        return tokens, 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]), opened.residency

Engine(EngineConfig(path, n_ctx=512, n_batch=64)).close()  # what a compiler leaves in memory is no part of this
try:
    run("10M")
except OutOfMemory as error:
    cap = 10_000_000 + int(float(re.search(r"allow ([0-9.]+) GB more", str(error))[1]) * 1e9)
tokens, peak, counts = run(cap)
print(json.dumps([cap, peak, counts.slots_per_layer, counts.hit_rate, counts.read_bytes, tokens == run(None)[0]]))
"""


@needs_proc
def test_the_cap_is_held_whatever_is_routed(tmp_path, monkeypatch):
    """The model's whole 40 MB of experts are used again and again, no token has one in common with the fifteen before it."""
    monkeypatch.undo()  # for the child, compiled kernels are in the cache
    keys = {"expert_count": N_EXPERT, "expert_used_count": K, "expert_feed_forward_length": 256}
    metadata = {f"qwen3moe.{key}": value for key, value in keys.items()}
    path = stock_gguf(tmp_path / "model.gguf", "qwen3moe", "Q8_0", k=True, metadata=metadata)
    ids = np.arange(300 * K, dtype=np.int16).reshape(300, 1, K) % N_EXPERT
    RoutingTrace(ids.repeat(N_LAYER, axis=1), None, N_EXPERT, "adversarial").save(tmp_path / "trace.npz")
    done = python(HELD, path, tmp_path / "trace.npz")
    assert done.returncode == 0, done.stderr
    cap, peak, slots, hit_rate, read_bytes, same = json.loads(done.stdout)
    assert same and peak <= cap, f"{peak / 1e6:.1f} MB of {cap / 1e6:.1f}"
    assert K + 2 <= slots < N_EXPERT / 2 and hit_rate <= slots / N_EXPERT and read_bytes > 2 * path.stat().st_size


@needs_proc
def test_a_cap_that_is_too_small_says_by_how_much(model, monkeypatch, capsys):
    with pytest.raises(OutOfMemory) as error:
        Engine(EngineConfig(model, device="reference", ram="20M", n_ctx=64))
    more = float(re.search(r"allow ([0-9.]+) GB more", str(error.value))[1])
    before = os.listdir("/proc/self/fd")
    with Engine(EngineConfig(model, device="reference", ram=20_000_000 + int((more + 0.02) * 1e9), n_ctx=64)) as engine:
        assert engine.session().forward([1, 2, 3]).std() > 0.5
    assert os.listdir("/proc/self/fd") == before
    code, out, err = call(monkeypatch, capsys, "-m", str(model), *PLAIN, "-p", "fox", "--ram", "20M", "--ctx", "64")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: 0 kB are left for experts, and at least .* are needed \(5 of every layer's 8\): allow .*\n", err)
    assert os.listdir("/proc/self/fd") == before, "an engine that could not be opened leaves no file open"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ram", "six"], "ram is 'six', but must be a size such as 6.3G, 800M or 6GiB"),
        (["--ram", "0"], "ram is '0', but must be a size such as 6.3G, 800M or 6GiB"),
        (["--ram", "4G", "--policy", "best"], "policy is 'best', but there are: rotary, lru, lfru, static"),
        (["--trace", "FOLDER/missing/t.npz"], "the trace is to be FOLDER/missing/t.npz, but there is no folder FOLDER/missing"),
    ],
)
def test_wrong_values_are_one_clear_line(model, tmp_path, monkeypatch, capsys, options, message):
    options = [option.replace("FOLDER", str(tmp_path)) for option in options]
    code, out, err = call(monkeypatch, capsys, "-m", str(model), *PLAIN, "-p", "fox", *options)
    assert (code, out) == (1, "")
    assert err == f"error: {message}\n".replace("FOLDER", str(tmp_path))


# ---- files that change ----

CHANGED = """
import json, os, shutil, sys
from rgpu import Engine, EngineConfig, RgpuError
from tests.arenas import FLOOR, few_slots, tokens

path, outcomes = sys.argv[1], []
for ram in (None, "1T"):
    for event in ("half", "nothing left", "unlinked"):
        copy = path + ".copy"
        shutil.copy(path, copy)
        with few_slots(FLOOR):
            engine = Engine(EngineConfig(copy, device="reference", n_ctx=64, ram=ram))
        session = engine.session()
        first = [session.forward([t]) for t in tokens(3)]
        if event == "unlinked":
            os.unlink(copy)
        else:
            os.truncate(copy, os.path.getsize(copy) // 2 if event == "half" else 0)
        try:
            for t in tokens(9, 1):
                last = session.forward([t])
            outcomes.append([event, ram, last.tolist()])
        except RgpuError as error:
            outcomes.append([event, ram, f"{type(error).__name__}: {error}"])
        engine.close()
print(json.dumps(outcomes))
"""


def test_a_file_that_shrinks_or_vanishes_while_it_is_open(model, tmp_path):
    path = tmp_path / "model.gguf"
    shutil.copy(model, path)
    size, copy = path.stat().st_size, f"{path}.copy"
    done = python(CHANGED, path)
    assert done.returncode == 0, f"signal {-done.returncode}: {done.stderr}"
    outcomes = {(event, ram): outcome for event, ram, outcome in json.loads(done.stdout)}
    for event, left in (("half", size // 2), ("nothing left", 0)):
        told = f"GGUFError: {copy}: has been shortened to {left} bytes, of {size}, while it is in use"
        assert outcomes[event, None] == told
        told = f"GGUFError: {copy}: ends at byte {left}: it is shorter than when it was opened"
        assert outcomes[event, "1T"] == told
    assert outcomes["unlinked", "1T"] == outcomes["unlinked", None]
    assert np.std(outcomes["unlinked", None]) > 0.5


def test_every_file_of_a_split_model_is_watched(tmp_path):
    with Engine(EngineConfig(written(tmp_path, "qwen3moe", "split"), device="reference", n_ctx=64)) as engine:
        session = engine.session()
        expected = session.forward([1, 2, 3])
        path = engine.file.paths[2]
        content = path.read_bytes()
        os.truncate(path, len(content) - 1)
        with pytest.raises(GGUFError, match=f"^{path}: has been shortened to {len(content) - 1} bytes, of {len(content)}, while"):
            session.forward([4])
        with path.open("r+b") as file:
            file.write(content)
        session.reset()
        np.testing.assert_array_equal(session.forward([1, 2, 3]), expected)


CHAT = """
import os, sys
from rgpu import chat, session
from tests.arenas import FLOOR, few_slots

path, forwards = sys.argv[1], 0
extend = session.Session._extend

def shortening(self, *arguments, **named):
    global forwards
    forwards += 1
    if forwards == 6 and path:
        os.truncate(path, os.path.getsize(path) // 2)
    return extend(self, *arguments, **named)

session.Session._extend = shortening
with few_slots(FLOOR):
    sys.exit(chat.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("ram", [[], ["--ram", "1T"]])
def test_the_chat_ends_with_one_clear_line(model, engine, tmp_path, ram):
    path = tmp_path / "model.gguf"
    shutil.copy(model, path)
    done = python(CHAT, path, "-m", path, *PLAIN, "-p", "fox", *ram)
    assert done.returncode == 1
    said = r"ends at byte \d+: it is shorter than when it was opened" if ram else r"has been shortened to \d+ bytes, of \d+, .*"
    assert re.fullmatch(rf"error: {path}: {said}\n", done.stderr), done.stderr
    text = done.stdout.removesuffix("\n")
    assert text and expected_answer(engine, "fox", 30).startswith(text), "what was said before is right"


# ---- signals ----


def test_ctrl_c_and_a_kill_leave_nothing_behind(model, engine, tmp_path):
    """In the middle of an answer under a cap, with reads all the time; the next start gives the right answer."""
    arguments = ["", "-m", model, *PLAIN, "-p", "fox", "--json", "--ram", "1T", "--trace", tmp_path / "trace.npz"]
    for sent, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        with subprocess.Popen(command(CHAT, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout.read(1)
            process.send_signal(sent)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (code, b"")
        if sent == signal.SIGINT:
            assert json.loads(out.decode().splitlines()[-1])["stop_reason"] == "interrupt"
            assert len(RoutingTrace.load(tmp_path / "trace.npz").ids) > 10
            os.unlink(tmp_path / "trace.npz")
    assert os.listdir(tmp_path) == [], "a trace is written at the end, or not at all"
    done = python(CHAT, *arguments, "-n", 12)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.rpartition("\n{")[0] == expected_answer(engine, "fox", 12).removesuffix("\n")


def test_the_answer_under_a_cap_is_that_of_the_mapped_file(model, engine, monkeypatch, capsys):
    with few_slots(FLOOR):
        code, out, err = call(monkeypatch, capsys, "-m", str(model), *PLAIN, "-p", "the quick", "-n", "40", "--ram", "1T")
    assert (code, err) == (0, "") and out == expected_answer(engine, "the quick", 40).removesuffix("\n") + "\n"
