"""What the terminal shows and hears: thoughts and answers, Ctrl-C, the program at a terminal of its own."""

import json
import re
import signal
import subprocess

import pytest

from rgpu.template import ThinkingSplitter
from rgpu.terminal import Answer, Interrupt, Terminal
from tests.program import ESCAPES, Keyboard, expected_answer

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
        terminal.progress(done, 3, "compiling kernels: matmul Q4_K")
    terminal.progress(3, 3, "")
    terminal.progress(3, 3, "")  # from the cache, it is all that the engine reports
    assert capsys.readouterr() == ("", "compiling kernels\n")


def test_a_model_cannot_drive_the_terminal(capsys):
    terminal = Terminal()
    terminal.stdout_tty = True
    terminal.write("a\x1b]52;c;ZXZpbA==\x07b\r\n\tc\x9b1m")
    assert capsys.readouterr().out == "a\ufffd]52;c;ZXZpbA==\ufffdb\n\tc\ufffd1m"


# ---- the program ----


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

        keyboard.press("half a li")
        keyboard.until("half a li")
        keyboard.clear()
        keyboard.press("\x1b[A")  # the line before it
        keyboard.until("/system")
        keyboard.clear()
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
                assert keyboard.read()
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
