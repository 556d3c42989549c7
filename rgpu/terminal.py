"""What the user sees and types: the answer on stdout, everything else on stderr, lines from the keyboard, Ctrl-C.

Knows nothing of models or conversations.
"""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

from .errors import line

DIM, RESET = "\x1b[2m", "\x1b[0m"
HISTORY_LINES = 1000
# A model or a file must not drive the terminal: no control character but tab and newline reaches it.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(0x7F, 0xA0))} | {0x09: "\t", 0x0A: "\n", 0x0D: ""}


class Terminal:
    """The two output streams and the keyboard. Where a stream is no terminal, it gets no colours and no decoration."""

    def __init__(self):
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # closed, as some services have it
                setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open as long as the process)
            stream = getattr(sys, name)
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        self.stdin_tty = sys.stdin.isatty()
        self.stdout_tty, self.stderr_tty = sys.stdout.isatty(), sys.stderr.isatty()
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.colour = self.stderr_tty and not plain
        self.readline = None  # the module, once a prompt needs it
        self._bar = None

    # ---- out ----

    def write(self, text: str) -> None:
        """A piece of the answer, to stdout, at once."""
        sys.stdout.write(text.translate(CONTROLS) if self.stdout_tty else text)
        sys.stdout.flush()

    def note(self, text: str = "", end: str = "\n", dim: bool = False) -> None:
        """Anything else, to stderr."""
        text = text.translate(CONTROLS)
        sys.stderr.write(f"{DIM}{text}{RESET}{end}" if dim and self.colour else text + end)
        sys.stderr.flush()

    def error(self, error: BaseException) -> None:
        """One line, after the traceback if RGPU_DEBUG=1."""
        self.note(line(error))

    def progress(self, done: int, total: int, what: str) -> None:
        """What opening a model takes time for, "kind" or "kind: this one"; done = total ends it, however often that is said."""
        if done == total:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
            return
        if self._bar is None:
            from tqdm import tqdm

            if not self.stderr_tty:
                self.note(what.split(": ")[0])  # one line in a log, no bar
            self._bar = tqdm(total=total, bar_format="{desc} [{elapsed}]", leave=False, disable=not self.stderr_tty)
        self._bar.set_description_str(f"{what} {done}/{total}")

    # ---- in ----

    def read_piped(self) -> str:
        """All of standard input, which is no terminal; without the line ends at its end."""
        # A pipe that nobody closes would hold us for ever without a word.
        notice = threading.Timer(2, self.note, ["reading standard input until it ends (not wanted? add < /dev/null)"])
        notice.daemon = True
        notice.start()
        try:
            return sys.stdin.read().rstrip("\n")
        finally:
            notice.cancel()

    def remember_lines(self, history: Path) -> None:
        """Line editing for the prompt, with a history kept in a file. A folder that can't be written to: no history."""
        try:
            import readline
        except ImportError:  # Windows: the console has its own
            return
        self.readline, self._history = readline, history
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)
            readline.read_history_file(history)
        readline.set_history_length(HISTORY_LINES)

    def read_message(self) -> str:
        """What the user enters: a line; lines that end in a backslash and the next; or all between two \"\"\".

        Raises EOFError for Ctrl-D (inside \"\"\" it only drops the message) and KeyboardInterrupt for Ctrl-C.
        """
        text = self._read_line("> ")
        if text.startswith('"""'):
            text = text[3:]
            try:
                while not text.rstrip().endswith('"""'):
                    text += "\n" + self._read_line("... ")
            except EOFError:  # Ctrl-D inside a message: never mind the message
                self.note()
                return ""
            return text.rstrip()[:-3].strip("\n")
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self._read_line("... ")
        return text

    def _read_line(self, prompt: str) -> str:
        if not self.stdout_tty:  # input() would write the prompt there
            self.note(prompt, end="")
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\n")
        line = input(prompt)
        if self.readline and line:
            with contextlib.suppress(OSError, AttributeError):  # at once: a killed program forgets nothing
                self.readline.append_history_file(1, self._history)
        return line


class Answer:
    """Shows an answer while it arrives: thoughts dimmed on stderr, if that is a terminal; the text on stdout.

    `text` and `thought` are what was received. Blank lines around a thought are left out.
    """

    def __init__(self, terminal: Terminal, splitter=None, show_thoughts: bool = True):
        """`splitter`: divides the answer into thought and text; None: all of it is text."""
        self._terminal, self._splitter = terminal, splitter
        self._show = show_thoughts and terminal.stderr_tty
        self._blank = ""  # white space of a thought, shown when more follows
        self.text = self.thought = ""

    def push(self, text: str) -> None:
        if self._splitter is None:
            self._say(text)
            return
        for kind, piece in self._splitter.push(text):
            if kind == "text":
                self._say(piece)
            else:
                self._think(piece)
        if self.text.strip():  # only a beginning can be a thought: later tags are what the answer talks about
            self._flush()
            self._splitter = None

    def end(self) -> None:
        """All has arrived, or the answer was stopped."""
        if self._splitter is not None:
            self._flush()
        if self.text and not self.text.endswith("\n"):
            self._terminal.write("\n")
        elif not self.text and self.thought.strip():
            self._close_thought(blank_lines=1)

    def _flush(self) -> None:
        for kind, piece in self._splitter.flush():
            (self._say if kind == "text" else self._think)(piece)

    def _say(self, text: str) -> None:
        if self.thought and not self.text:
            text = text.lstrip("\n")
            if text and self.thought.strip():
                self._close_thought(blank_lines=2)
        self.text += text
        self._terminal.write(text)

    def _think(self, text: str) -> None:
        first = not self.thought.strip()
        self.thought += text
        if not self._show or not self.thought.strip():
            return
        if first:
            text = self.thought.lstrip()
            if not self._terminal.colour:
                self._terminal.note("<think>")
        text = self._blank + text
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        if shown:
            self._terminal.note(shown, end="", dim=True)

    def _close_thought(self, blank_lines: int) -> None:
        if self._show:
            self._terminal.note(("" if self._terminal.colour else "\n</think>") + "\n" * blank_lines, end="")


class Interrupt:
    """While it is entered, Ctrl-C raises; once `waits` is set, the first only sets `requested`, so that no step is torn.

    A prompt may take minutes, and breaking it off costs no more than computing it again from the last message on.
    """

    def __init__(self):
        self.requested = self.waits = False

    def __enter__(self) -> "Interrupt":
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exception) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number, frame) -> None:
        if self.requested or not self.waits:
            raise KeyboardInterrupt
        self.requested = True
