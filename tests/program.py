"""The chat as tests run it: a model that talks until it is stopped, the program in a pipe, the program at a keyboard."""

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np

from rgpu.gguf.reader import GGUFFile
from rgpu.sampler import SamplingParams
from tests import tiny

ROOT = Path(__file__).parent.parent
PLAIN = ["--device", "reference", "--no-think", "--seed", "1"]  # the reference backend compiles nothing; a text without thought
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
# A session of its own does not yet have this terminal as the one whose Ctrl-C it hears.
START = "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); runpy.run_module('rgpu.chat', run_name='__main__')"


def never_ending(path: Path, **metadata) -> Path:
    """A tiny model whose end tokens have a logit of 0, which top-k of 520 random ones never keeps: it talks until stopped."""
    tiny.stock_gguf(path, "qwen35moe", metadata=metadata)
    with GGUFFile(path) as file:
        output = file.tensors["output.weight"]
    row = output.nbytes // output.shape[0]
    with open(path, "r+b") as stored:
        for token in tiny.SPECIAL:
            stored.seek(output.offset + tiny.token_id(token) * row)
            stored.write(bytes(row))
    return path


def command(model: Path, *arguments: str) -> list[str]:
    """The program's command line."""
    return [sys.executable, "-m", "rgpu.chat", "-m", str(model), *PLAIN, *arguments]


def run(model: Path, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    """The program in a pipe."""
    return subprocess.run(
        command(model, *arguments), input=stdin.encode(), capture_output=True, cwd=ROOT, env=os.environ | environment, timeout=300
    )


def expected_answer(engine, text: str, n: int) -> str:
    """The engine's own answer, with the settings of PLAIN."""
    params = SamplingParams(max_tokens=n, seed=1)
    messages = [{"role": "user", "content": text}]
    return "".join(piece.text for piece in engine.session().generate(messages, params, enable_thinking=False))


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
        self.raw = ""  # what it has shown and nobody has waited for, with line ends as in a file
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

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
            if not select.select([self.screen], [], [], max(0, end - time.monotonic()))[0] or not self.read():
                raise AssertionError(f"{text!r} does not appear: {self.raw!r}")
        before, found, self.raw = ESCAPES.sub("", self.raw).partition(text)
        return before + found

    def read(self) -> bool:
        """Wait for more on the screen; False: the program has ended."""
        try:
            data = os.read(self.screen, 65536)
        except OSError:  # EIO: the program has closed it
            return False
        self.raw = (self.raw + self._decoder.decode(data)).replace("\r\n", "\n")
        return bool(data)

    def press(self, keys: str) -> None:
        """Type this, without a line end."""
        os.write(self.screen, keys.encode())

    def enter(self, line: str, prompt: str = "\n> ") -> str:
        """Type a line at the prompt; what the screen shows until the next prompt."""
        self.press(line + "\n")
        self.until(line + "\n")
        return self.until(prompt)

    def clear(self) -> None:
        """Ctrl-C at the prompt, until a new one comes: Python's readline sleeps through one that hits it between two reads."""
        for _ in range(20):
            time.sleep(0.1)
            self.press("\x03")
            with contextlib.suppress(AssertionError):
                self.until("\n> ", timeout=2)
                return
        raise AssertionError(f"no new prompt: {self.raw!r}")

    def left(self) -> int:
        """Wait for its end; the exit code."""
        while self.read():
            pass
        return self.process.wait(60)
