"""The terminal chat as users and scripts meet it: the real program in a pipe; at a terminal: test_terminal.py.

The model is random: its words mean nothing, but they are the engine's own words, and every stream, exit code and key counts.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rgpu import chat
from rgpu.conversation import Conversation, read_messages
from rgpu.engine import KV_TYPES, Engine, EngineConfig
from rgpu.errors import RgpuError
from rgpu.sampler import SamplingParams
from rgpu.terminal import Terminal
from tests import tiny
from tests.program import PLAIN, ROOT, command, expected_answer, run

STATISTICS = [
    "prompt_tokens", "reused_tokens", "generated_tokens", "ttft_s", "prefill_tok_s", "decode_tok_s", "peak_memory_bytes",
    "stop_reason", "model", "device",
]  # fmt: skip


def call(monkeypatch, capsys, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """The same in this process, which is quicker: exit code, stdout, stderr."""
    read, write = os.pipe()
    os.write(write, stdin)
    os.close(write)
    with os.fdopen(read) as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        try:
            code = chat.main(list(arguments))
        except SystemExit as leaving:
            code = leaving.code
    return code, *capsys.readouterr()


# ---- in a pipe ----


def test_a_prompt_gets_one_answer_and_statistics(model, engine):
    done = run(model, "-p", "Hello you", "-n", "12", "--json")
    text, _, last = done.stdout.decode().rstrip("\n").rpartition("\n")
    assert done.returncode == 0
    assert text == expected_answer(engine, "Hello you", 12).removesuffix("\n")
    assert done.stderr == b"", "a pipe stays quiet"
    numbers = json.loads(last)
    assert list(numbers) == STATISTICS
    assert numbers["prompt_tokens"] == len(engine.session().encode([{"role": "user", "content": "Hello you"}], None, False))
    assert (numbers["generated_tokens"], numbers["stop_reason"], numbers["reused_tokens"]) == (12, "length", 0)
    assert (numbers["model"], numbers["device"]) == ("tiny-qwen35moe", "reference")
    assert 0 < numbers["ttft_s"] < 60 and numbers["prefill_tok_s"] > 0 and numbers["decode_tok_s"] > 0
    assert 20e6 < numbers["peak_memory_bytes"] < 4e9


def test_standard_input_is_the_message_and_follows_the_prompt(model, engine, monkeypatch, capsys):
    asked = ["-m", str(model), *PLAIN, "-n", "6"]
    assert run(model, "-n", "6", stdin="the quick\nfox\n").stdout.decode() == expected_answer(engine, "the quick\nfox", 6) + "\n"
    both = call(monkeypatch, capsys, *asked, "-p", "What is this?", stdin="déjà\nvu\n".encode())
    assert both == (0, expected_answer(engine, "What is this?\n\ndéjà\nvu", 6) + "\n", "")


def test_a_system_prompt_is_part_of_the_prompt(model, engine, monkeypatch, capsys):
    asked = ["-m", str(model), *PLAIN, "-n", "2", "-p", "fox", "--json"]
    _, without, _ = call(monkeypatch, capsys, *asked)
    _, out, _ = call(monkeypatch, capsys, *asked, "--system", "def")
    more = json.loads(out.splitlines()[-1])["prompt_tokens"] - json.loads(without.splitlines()[-1])["prompt_tokens"]
    assert more == len(engine.tokenizer.encode("<|im_start|>system\ndef<|im_end|>\n"))


def test_a_pipe_gets_no_thoughts(model, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "-m", str(model), "--device", "reference", "-p", "fox", "-n", "5", "--seed", "1")
    assert (code, out) == (0, "")
    assert err == "note: the model was still thinking at --max-tokens: raise it, or use --no-think\n"


def test_a_reader_that_leaves_ends_it_quietly(model):
    with subprocess.Popen(
        command(model, "-p", "fox"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def test_output_that_an_encoding_lacks_is_replaced(model):
    done = run(model, "-p", "fox", "-n", "40", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.isascii() and b"?" in done.stdout


def test_closed_streams_are_no_obstacle(model):
    shell = f"exec {shlex.join(command(model, '-p', 'fox', '-n', '2'))} <&- 2>&-"
    assert subprocess.run(["sh", "-c", shell], stdout=subprocess.PIPE, cwd=ROOT, check=True).stdout


def test_ctrl_c_stops_the_one_answer(model):
    with subprocess.Popen(
        command(model, "-p", "fox", "--json"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    assert json.loads(out.decode().splitlines()[-1])["stop_reason"] == "interrupt"


def test_a_start_from_the_cache_is_silent_on_the_cpu_too(model):
    compiled = run(model, "-p", "fox", "-n", "2", "--device", "cpu")
    assert compiled.stderr in (b"", b"compiling kernels for this machine (once)\n")
    again = run(model, "-p", "fox", "-n", "2", "--device", "cpu")
    assert (again.returncode, again.stdout, again.stderr) == (0, compiled.stdout, b"")


def test_a_model_without_template_continues_the_text(base_model, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "-m", str(base_model), *PLAIN, "-p", "the quick brown", "-n", "9")
    with Engine.open(base_model, device="reference") as engine:
        pieces = engine.session().generate("the quick brown", SamplingParams(max_tokens=9, seed=1))
        assert out == "".join(piece.text for piece in pieces).removesuffix("\n") + "\n"
    assert (code, err) == (0, "note: this model has no chat template, so it continues the text instead of answering\n")
    code, out, err = call(monkeypatch, capsys, "-m", str(base_model), *PLAIN, "-p", "fox", "--system", "def")
    assert (code, out) == (1, "") and err.startswith("error: --system needs a model with a chat template")


# ---- errors ----


def test_a_full_context_says_so(model, monkeypatch, capsys):
    asked = ["-m", str(model), *PLAIN, "-p", "the quick brown fox jumps over the lazy dog"]
    code, out, err = call(monkeypatch, capsys, *asked, "--ctx", "9")
    assert (code, out) == (1, "") and re.fullmatch(r"error: \d+ tokens do not fit the context of 9: .*--ctx.*\n", err)
    code, out, err = call(monkeypatch, capsys, *asked, "--ctx", "64", "--json")
    assert code == 0 and "the context of 64 tokens is full" in err
    assert json.loads(out.splitlines()[-1])["stop_reason"] == "context"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-m", "/nowhere/x.gguf"], 1, "error: /nowhere/x.gguf"),
        (["--kv", "f64"], 1, "error: kv is 'f64'"),
        (["--device", "abacus"], 1, "error: device is 'abacus'"),
        (["--ctx", "0"], 1, "error: n_ctx is 0"),
        (["--ctx", "5000"], 1, "error: n_ctx is 5000, but the model was trained for 4096"),
        (["--top-p", "3"], 1, "error: top_p is 3.0"),
        (["-p", ""], 1, "error: there is no message"),
        (["--temp", "warm"], 2, "argument --temp: invalid float value: 'warm'"),
        (["--wat"], 2, "unrecognized arguments: --wat"),
    ],
)
def test_errors_are_one_line_and_exit_codes(model, monkeypatch, capsys, arguments, code, message):
    given, out, err = call(monkeypatch, capsys, "-m", str(model), "--device", "reference", "-p", "fox", *arguments)
    assert (given, out) == (code, "")
    assert message in err and ("usage:" in err if code == 2 else err.count("\n") == 1)


def test_empty_input_is_an_error(model, monkeypatch, capsys):
    assert call(monkeypatch, capsys, "-m", str(model), stdin=b"\n") == (1, "", "error: standard input is empty\n")


def test_a_traceback_is_shown_on_request(model, monkeypatch, capsys):
    monkeypatch.setenv("RGPU_DEBUG", "1")
    code, _, err = call(monkeypatch, capsys, "-m", str(model), "-p", "fox", "--kv", "f64")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("error: kv")


# ---- options ----


def test_options_are_few_and_mirror_the_configuration():
    options = [action for action in chat.parser()._actions if action.dest != "help"]
    fields = set(EngineConfig.__dataclass_fields__) | set(SamplingParams.__dataclass_fields__)
    assert len(options) <= 19  # 16 to talk, and three that the memory asks for: --ram, --policy, --trace
    assert {o.dest for o in options} - fields == {"model", "prompt", "system", "no_think", "json"}
    told = chat.parser().format_help()
    assert all(name in told for name in KV_TYPES) and f"{EngineConfig('').kv} (default)" in told


def test_arguments_are_read_without_compiler_and_engine():
    code = (
        "import sys, rgpu.chat; rgpu.chat.parser().format_help();"
        "print([m for m in ('numba', 'cupy', 'tokenizers', 'jinja2', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_what_the_model_recommends_is_the_default(tmp_path):
    keys = {"general.sampling.temp": 0.0, "general.sampling.top_k": 7, "general.sampling.penalty_repeat": 1.25}
    path = tiny.stock_gguf(tmp_path / "m.gguf", "qwen3moe", metadata=keys)
    for arguments, wanted in (
        ([], SamplingParams(temperature=0.0, top_k=7, repeat_penalty=1.25)),
        (["--temp", "0.5", "--top-k", "0", "--seed", "3"], SamplingParams(temperature=0.5, top_k=0, repeat_penalty=1.25, seed=3)),
    ):
        args = chat.parser().parse_args(["-m", str(path), "--device", "reference", *arguments])
        engine, params = chat.open_engine(args, Terminal())
        engine.close()
        assert params == wanted


# ---- saved conversations ----


def test_a_conversation_is_saved_whole_and_replaces_only_its_like(engine, tmp_path):
    conversation = Conversation(engine, SamplingParams(), Terminal())
    answer = {"role": "assistant", "content": "Ja", "reasoning_content": "Hm"}
    conversation.messages = [{"role": "user", "content": "東京?"}, answer]
    path = tmp_path / "c.json"
    conversation.save(path)
    conversation.save(path)
    other = Conversation(engine, SamplingParams(), Terminal())
    other.load(path)
    assert other.messages == conversation.messages
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(RgpuError, match="not a saved conversation"):
        conversation.save(notes)
    with pytest.raises(RgpuError, match="there is no folder"):
        conversation.save(tmp_path / "nowhere" / "c.json")
    assert notes.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "notes.txt"]


NO_CONVERSATIONS = ["", "{", "3", "{}", '[{"role": "user"}]', '[{"role": "boss", "content": "x"}]', "\xff", "[" * 99999]


@pytest.mark.parametrize("text", NO_CONVERSATIONS)
def test_what_is_no_conversation_is_not_loaded(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RgpuError):
        read_messages(path)


def test_files_that_are_no_conversation_are_refused_at_once(tmp_path):
    for path, text in ((Path("/dev/zero"), "is no file"), (tmp_path, "is no file")):
        with pytest.raises(RgpuError, match=text):
            read_messages(path)
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(RgpuError, match="bytes"):
        read_messages(large)


def test_what_a_template_refuses_is_not_loaded(engine, tmp_path, monkeypatch):
    conversation = Conversation(engine, SamplingParams(), Terminal())
    conversation.messages = [{"role": "user", "content": "kept"}]
    saved = tmp_path / "c.json"
    saved.write_text('[{"role": "user", "content": "x"}]')

    def refuse(messages, **variables):
        raise RgpuError("refused")

    monkeypatch.setattr(engine.template, "render", refuse)
    with pytest.raises(RgpuError, match="refused"):
        conversation.load(saved)
    assert conversation.messages == [{"role": "user", "content": "kept"}]


def test_empty_and_hub_paths_are_explained(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name, words in (("", "-m is empty"), (str(tmp_path), "convert it first")):
        code, out, err = call(monkeypatch, capsys, "-m", name, "-p", "hi")
        assert (code, out) == (1, "") and err.startswith("error: ") and words in err
