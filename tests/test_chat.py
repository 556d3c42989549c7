"""The terminal chat as users and scripts meet it: the real program in a pipe and at a terminal.

The model is random: its words mean nothing, but they are the engine's own words, and every stream, exit code and key counts.
"""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from rgpu import chat
from rgpu.conversation import Conversation, read_messages
from rgpu.engine import KV_TYPES, Engine, EngineConfig
from rgpu.errors import RgpuError
from rgpu.gguf.reader import GGUFFile
from rgpu.sampler import SamplingParams
from rgpu.template import ThinkingSplitter
from rgpu.terminal import Answer, Interrupt, Terminal
from tests import tiny

ROOT = Path(__file__).parent.parent
PLAIN = ["--device", "reference", "--no-think", "--seed", "1"]  # the reference backend compiles nothing; a text without thought
STATISTICS = [
    "prompt_tokens", "reused_tokens", "generated_tokens", "ttft_s", "prefill_tok_s", "decode_tok_s", "peak_memory_bytes",
    "stop_reason", "model", "device",
]  # fmt: skip


def never_ending(path: Path, **metadata) -> Path:
    """A tiny model whose end tokens have a logit of 0, which top-k of 520 random ones never keeps: it talks until stopped."""
    tiny.stock_gguf(path, "qwen35moe", metadata=metadata)
    with GGUFFile(path) as file:
        output = file.tensors["output.weight"]
        rows = [output.offset + tiny.token_id(token) * output.nbytes // output.shape[0] for token in tiny.SPECIAL]
        width = output.nbytes // output.shape[0]
    with open(path, "r+b") as stored:
        for row in rows:
            stored.seek(row)
            stored.write(bytes(width))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return never_ending(tmp_path_factory.mktemp("chat") / "tiny.gguf")


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    return never_ending(tmp_path_factory.mktemp("chat") / "base.gguf", **{"tokenizer.chat_template": None})


@pytest.fixture(scope="module")
def engine(model):
    with Engine.open(model, device="reference") as engine:
        yield engine


def command(model: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "rgpu.chat", "-m", str(model), *PLAIN, *arguments]


def run(model: Path, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    """The program in a pipe."""
    return subprocess.run(
        command(model, *arguments), input=stdin.encode(), capture_output=True, cwd=ROOT, env=os.environ | environment, timeout=120
    )


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


def expected_answer(engine, text: str, n: int) -> str:
    params = SamplingParams(max_tokens=n, seed=1)
    messages = [{"role": "user", "content": text}]
    return "".join(piece.text for piece in engine.session().generate(messages, params, enable_thinking=False))


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
    assert err == "note: the model was still thinking when it was stopped: raise -n, or use --no-think\n"


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
    assert (code, out) == (1, "") and re.fullmatch(r"error: \d+ tokens do not fit the context of 9: .*--ctx N.*\n", err)
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
    assert len(options) <= 16
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


# ---- parts ----


class Screen:
    """Stands for a Terminal and keeps what it is told: answers as they are, the rest in brackets."""

    def __init__(self, stderr_tty: bool = True, colour: bool = True):
        self.stderr_tty, self.colour, self.shown = stderr_tty, colour, ""

    def write(self, text: str) -> None:
        self.shown += text

    def note(self, text: str = "", end: str = "\n", dim: bool = False) -> None:
        self.shown += f"[{text}{end}]"


def shown(screen: Screen, text: str, inside: bool = True, thoughts: bool = True) -> Answer:
    answer = Answer(screen, ThinkingSplitter(inside), thoughts)
    for letter in text:
        answer.push(letter)
    answer.end()
    screen.shown = screen.shown.replace("][", "")
    return answer


def test_thoughts_and_text_go_their_ways():
    screen = Screen()
    answer = shown(screen, "\nI see.\n\nYes.\n\n</think>\n\nIt is <think>, a tag.")
    assert screen.shown == "[I see.\n\nYes.\n\n]It is <think>, a tag.\n"
    assert (answer.text, answer.thought.strip()) == ("It is <think>, a tag.", "I see.\n\nYes.")
    for stderr_tty, wanted in ((True, True), (True, False), (False, True)):
        screen = Screen(stderr_tty, colour=False)
        assert shown(screen, "<think>\nI see.</think>\n\nYes.\n", False, wanted).text == "Yes.\n"
        assert screen.shown == ("[<think>\nI see.\n</think>\n\n]" if stderr_tty and wanted else "") + "Yes.\n"


def test_an_empty_thought_is_not_shown_and_a_stopped_one_is_closed():
    screen = Screen()
    assert shown(screen, "<think>\n\n</think>\n\n\nParis", inside=False).text == "Paris"
    assert screen.shown == "Paris\n"
    screen = Screen()
    assert shown(screen, "Hm, ", inside=True).text == ""
    assert screen.shown == "[Hm,\n]"


def test_a_text_is_kept_as_it_is():
    screen = Screen()
    assert shown(screen, "\n  indented <thin", inside=False).text == "\n  indented <thin"
    assert screen.shown == "\n  indented <thin\n"


def test_the_first_ctrl_c_asks_and_the_second_breaks_off():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_in_a_log_is_one_line(capsys):
    terminal = Terminal()
    for done in range(3):
        terminal.progress(done, 3, "matmul Q4_K")
    terminal.progress(3, 3, "")
    terminal.progress(3, 3, "")  # from the cache, it is all that the engine reports
    assert capsys.readouterr() == ("", "compiling kernels for this machine (once)\n")


def test_a_model_cannot_drive_the_terminal(capsys):
    terminal = Terminal()
    terminal.stdout_tty = True
    terminal.write("a\x1b]52;c;ZXZpbA==\x07b\r\n\tc\x9b1m")
    assert capsys.readouterr().out == "a\ufffd]52;c;ZXZpbA==\ufffdb\n\tc\ufffd1m"


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
    with pytest.raises(OSError):
        conversation.save(tmp_path / "nowhere" / "c.json")
    assert notes.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "notes.txt"]


NO_CONVERSATIONS = ["", "{", "3", "{}", '[{"role": "user"}]', '[{"role": "boss", "content": "x"}]', "\xff", "[" * 99999]


@pytest.mark.parametrize("text", NO_CONVERSATIONS)
def test_what_is_no_conversation_is_not_loaded(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RgpuError):
        read_messages(path)


# ---- at a terminal ----

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
# A session of its own does not yet have this terminal as the one whose Ctrl-C it hears.
START = "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); runpy.run_module('rgpu.chat', run_name='__main__')"


class Keyboard:
    """The program at a terminal of its own; `stdout` may be a pipe instead."""

    def __init__(self, model: Path, *arguments: str, stdout=None, **environment: str):
        self.screen, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, np.array([50, 200, 0, 0], np.uint16).tobytes())
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, "-m", str(model), "--device", "reference", "--seed", "1", *arguments],
            stdin=inner, stdout=stdout or inner, stderr=inner, cwd=ROOT, start_new_session=True,
            env=os.environ | {"TERM": "xterm", "INPUTRC": os.devnull} | environment,
        )  # fmt: skip
        os.close(inner)
        self.raw = ""

    def __enter__(self) -> "Keyboard":
        return self

    def __exit__(self, *exception) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def until(self, text: str, timeout: float = 60) -> str:
        """Wait until the screen shows this, and return all up to it, without escapes."""
        end = time.monotonic() + timeout
        while text not in ESCAPES.sub("", self.raw):
            if not select.select([self.screen], [], [], max(0, end - time.monotonic()))[0] or not self._read():
                raise AssertionError(f"{text!r} does not appear: {self.raw!r}")
        before, found, self.raw = ESCAPES.sub("", self.raw).partition(text)
        return before + found

    def _read(self) -> bool:
        try:
            data = os.read(self.screen, 65536)
        except OSError:  # EIO: the program has closed it
            return False
        self.raw += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)

    def press(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def enter(self, line: str, prompt: str = "\n> ") -> str:
        """Type a line at the prompt; what the screen shows until the next prompt."""
        self.press(line + "\n")
        self.until(line + "\n")
        return self.until(prompt)

    def left(self) -> int:
        while self._read():
            pass
        return self.process.wait(60)


def test_a_conversation_at_the_terminal(model, engine, tmp_path):
    saved = tmp_path / "saved.json"
    cache = tmp_path / "cache"
    with Keyboard(model, "--no-think", "-n", "8", RGPU_CACHE_DIR=str(cache), HOME=str(tmp_path)) as keyboard:
        start = keyboard.until("\n> ")
        assert "tiny-qwen35moe" in start and "device   reference" in start and "/help" in start

        assert "8 tokens, " in keyboard.enter("the quick fox")
        second = keyboard.enter("over the dog")
        known = engine.tokenizer.encode("<|im_start|>user\nthe quick fox<|im_end|>")  # then comes what only a prompt's end has
        assert f", {len(known)} reused;" in second, "the second turn does not read the first message again"
        assert "4 messages" in keyboard.enter("/stats")

        keyboard.enter('"""', "... ")
        keyboard.enter("def", "... ")
        keyboard.enter('return"""')
        keyboard.enter("user \\", "... ")
        keyboard.enter("system")
        assert "prompt is set" in keyboard.enter("/system naïve")
        assert "saved 9 messages" in keyboard.enter("/save ~/saved.json")
        messages = json.loads(saved.read_text("utf-8"))["messages"]
        assert [m["content"] for m in messages if m["role"] != "assistant"] == [
            "naïve", "the quick fox", "over the dog", "def\nreturn", "user \nsystem",
        ]  # fmt: skip

        assert "forgotten" in keyboard.enter("/reset")
        assert "1 messages" in keyboard.enter("/stats")
        assert "loaded 9 messages" in keyboard.enter("/load ~/saved.json")
        assert "error: there is no command /stat:" in keyboard.enter("/stat")
        assert "error: /load needs the name" in keyboard.enter("/load")
        assert "error: /nowhere/x: No such file" in keyboard.enter("/load /nowhere/x")
        assert "8 tokens, " in keyboard.enter("/etc/hosts is a file"), "a path is no command"
        assert "/system TEXT" in keyboard.enter("/help")
        assert "removed" in keyboard.enter("/system")

        keyboard.press("half a li\x03")
        keyboard.until("\n> ")
        keyboard.press("\x1b[A")  # the line before it
        keyboard.until("/system")
        keyboard.press("\x03")
        keyboard.until("\n> ")
        assert "10 messages" in keyboard.enter("/stats"), "what Ctrl-C cleared was never asked"
        keyboard.press("\x04")
        assert keyboard.left() == 0
    history = cache / "history"
    assert "the quick fox\n" in history.read_text("utf-8") and history.stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_an_answer_and_keeps_the_session(model, tmp_path):
    with Keyboard(model, "--no-think", RGPU_CACHE_DIR=str(tmp_path)) as keyboard:
        keyboard.until("\n> ")
        for asked, messages in (("the fox", 2), ("the dog", 4)):
            keyboard.press(f"{asked}\n")
            keyboard.until(f"{asked}\n")
            while not ESCAPES.sub("", keyboard.raw).strip():  # until it has begun to speak
                assert keyboard._read()
            keyboard.press("\x03")
            assert ", stopped; prompt" in keyboard.until("\n> ")
            assert f"\n{messages} messages" in keyboard.enter("/stats")
        keyboard.press("/exit\n")
        assert keyboard.left() == 0


@pytest.mark.parametrize("plain", ["", "1"])
def test_thoughts_are_dimmed_unless_colours_are_unwanted(model, tmp_path, plain):
    with Keyboard(model, "-p", "fox", "-n", "9", NO_COLOR=plain, RGPU_CACHE_DIR=str(tmp_path)) as keyboard:
        assert keyboard.left() == 0
        assert ("\x1b[2m" in keyboard.raw) is not bool(plain)
        assert ("<think>\n" in keyboard.raw) is bool(plain)
        assert "\n9 tokens, " in ESCAPES.sub("", keyboard.raw), "a terminal gets the figures"


def test_standard_output_carries_the_answers_only(model, engine, tmp_path):
    with Keyboard(model, "--no-think", "-n", "7", stdout=subprocess.PIPE, RGPU_CACHE_DIR=str(tmp_path)) as keyboard:
        keyboard.until("\n> ")
        assert "7 tokens" in keyboard.enter("the fox")
        keyboard.enter("/stats")
        keyboard.press("\x04")
        assert keyboard.left() == 0
        assert keyboard.process.stdout.read().decode() == expected_answer(engine, "the fox", 7) + "\n"
        keyboard.process.stdout.close()


def test_a_model_without_template_cannot_converse(base_model, tmp_path):
    with Keyboard(base_model, RGPU_CACHE_DIR=str(tmp_path)) as keyboard:
        assert keyboard.left() == 1
        assert re.search(r"^error: .*no chat template", keyboard.raw, re.MULTILINE)
