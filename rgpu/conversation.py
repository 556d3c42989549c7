"""A conversation with an engine: its messages, how a question becomes an answer on the terminal, its file, its figures.

Owns neither options nor commands (chat.py), nor the screen (terminal.py); tokens and their memory are the session's.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

from .errors import RgpuError
from .terminal import Answer, Interrupt, Terminal

MAX_SAVED = 64 << 20  # bytes: no conversation is as long
ROLES = ("system", "developer", "user", "assistant", "tool")


class Conversation:
    """`messages` are as chat templates read them; the session remembers the tokens of those that it has seen."""

    def __init__(self, engine, params, terminal: Terminal, thinking: bool = True):
        """`params`: SamplingParams of every answer; `thinking`: ask for thoughts, and show them."""
        self.engine, self.params, self.terminal, self.thinking = engine, params, terminal, thinking
        self.session = engine.session()
        self.messages: list[dict] = []
        self.interrupted = False  # was the last answer stopped by Ctrl-C?

    def set_system(self, text: str) -> None:
        """Replace the system prompt, or remove it if `text` is empty; the conversation stays."""
        kept = [message for message in self.messages if message["role"] != "system"]
        self.messages = ([{"role": "system", "content": text}] if text else []) + kept

    def reset(self) -> None:
        """Forget all but the system prompt. The session finds out by itself, and keeps what it has computed of that prompt."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def ask(self, text: str) -> None:
        """Answer a message. After an error, or if Ctrl-C came before the first word, it is as if never asked."""
        from .template import ThinkingSplitter, starts_in_thinking

        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._render(asked)
        splitter = ThinkingSplitter(starts_in_thinking(prompt))
        answer = self._generate(prompt, Answer(self.terminal, splitter, self.thinking))
        if self.interrupted and not answer.text:
            return
        thought = answer.thought.strip()
        if thought and not answer.text:
            cut = self.session.stats.stop_reason == "length"
            why = "was still thinking at --max-tokens: raise it, or use --no-think" if cut else "thought, but gave no answer"
            self.terminal.note(f"note: the model {why}")
        reasoning = {"reasoning_content": thought} if thought else {}
        self.messages = [*asked, {"role": "assistant", "content": answer.text, **reasoning}]

    def complete(self, text: str) -> None:
        """Continue a text, for a model without chat template."""
        self._generate(text, Answer(self.terminal))

    def _generate(self, prompt: str, answer: Answer) -> Answer:
        tokens = self.engine.tokenizer.encode(prompt, bos=True)
        self.interrupted = False
        try:
            with Interrupt() as interrupt, contextlib.closing(self.session.generate(tokens, self.params)) as pieces:
                for piece in pieces:
                    interrupt.waits = True  # from now on a step is short
                    answer.push(piece.text)
                    if interrupt.requested:
                        self.interrupted = True
                        break
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            answer.end()
        if self.session.stats.stop_reason == "context":
            size = self.engine.n_ctx
            self.terminal.note(f"note: the context of {size} tokens is full, and the answer is cut")
        return answer

    def statistics(self) -> dict:
        """The last answer in numbers, as --json prints them. Times in seconds; the memory's peak includes mapped pages."""
        stats = self.session.stats
        return {
            "prompt_tokens": stats.prompt_tokens,
            "reused_tokens": stats.reused_tokens,
            "generated_tokens": stats.generated_tokens,
            "ttft_s": round(stats.ttft_s, 4),
            "prefill_tok_s": round(stats.prefill_tok_s, 2),
            "decode_tok_s": round(stats.decode_tok_s, 2),
            "peak_memory_bytes": peak_memory(),
            "stop_reason": "interrupt" if self.interrupted else stats.stop_reason,
            "model": self.engine.name,
            "device": self.engine.device,
        }

    def summary(self) -> str:
        """The same in one line for a reader."""
        s, read_bytes = self.statistics(), self.session.stats.read_bytes
        why = {"length": ", cut by --max-tokens", "context": ", context full", "interrupt": ", stopped"}
        read = f"; {read_bytes / 1e9:.2f} GB read from storage" if read_bytes else ""
        return (
            f"{s['generated_tokens']} tokens, {s['decode_tok_s']:.1f}/s{why.get(s['stop_reason'], '')}; prompt "
            f"{s['prompt_tokens']} tokens, {s['reused_tokens']} reused; first token after {s['ttft_s']:.2f} s{read}"
        )

    # ---- files ----

    def save(self, path: Path) -> None:
        """Write the messages as JSON, whole or not at all. Never replaces a file that is no conversation: RgpuError, OSError."""
        if path.exists():
            try:
                read_messages(path)
            except RgpuError as error:
                raise RgpuError(f"{path} exists and is not a saved conversation: choose another name") from error
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n"
        if not path.parent.is_dir():
            raise RgpuError(f"{path}: there is no folder {path.parent}")
        handle, partial = tempfile.mkstemp(prefix=f"{path.name}.partial-", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise

    def load(self, path: Path) -> None:
        """Continue the conversation in a file. RgpuError or OSError if there is none; then nothing has changed."""
        messages = read_messages(path)
        self._render(messages)  # what the template refuses would block every question after it
        self.messages = messages

    def _render(self, messages: list[dict]) -> str:
        return self.engine.template.render(self.engine.tokenizer.guard(messages), enable_thinking=self.thinking)


def read_messages(path: Path) -> list[dict]:
    """The messages of a saved conversation, or of any JSON with a list of messages in OpenAI's form."""
    if path.exists() and not path.is_file():
        raise RgpuError(f"{path} is no file")
    if path.exists() and path.stat().st_size > MAX_SAVED:
        raise RgpuError(f"{path} is no saved conversation: it has {path.stat().st_size} bytes")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RgpuError(f"{path} is no saved conversation: {error}") from error
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list):
        raise RgpuError(f"{path} is no saved conversation: there is no list of messages in it")
    for index, message in enumerate(messages):
        valid = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        if not valid:
            raise RgpuError(f"{path}: message {index} must have a role ({', '.join(ROLES)}) and a text as content")
    return messages


def peak_memory() -> int | None:
    """The largest resident set of this process so far, in bytes; None where the system doesn't say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
