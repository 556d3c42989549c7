"""One timeline of tokens: extend it, generate from it, reuse what it shares with the next prompt.

Callers hand over the full token list every time; the session finds the common prefix and computes the rest. A model with
recurrent layers can't be cut back to an arbitrary position, so snapshots are kept at message boundaries.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np

from .errors import ContextFull, RgpuError
from .sampler import Sampler, SamplingParams, StopStrings
from .state import Snapshot, State

MAX_SNAPSHOTS = 4  # the first (a system prompt that survives a reset) and the latest; 66 MB each for the 35B


@dataclass(frozen=True)
class Piece:
    """A piece of an answer. One token gives one piece, whose text may be empty while a character is incomplete.

    Text that was held back at the end (it might have begun a stop string) comes as a last piece with token -1.
    `logprob` and `top_logprobs` (token id, log-probability) are given when SamplingParams.logprobs asks for them.
    """

    text: str
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass
class Stats:
    """What the last `generate` did; times in seconds."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, found in the session's memory
    generated_tokens: int = 0
    prefill_s: float = 0.0
    ttft_s: float = 0.0  # from the call to the first token
    decode_s: float = 0.0  # from the first token to the last
    read_bytes: int = 0  # that the process read from storage meanwhile; Linux only
    stop_reason: str = ""  # "eog", "length", "stop", "context", or "" while it runs or was broken off

    @property
    def prefill_tok_s(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Tokens after the first, per second of decoding."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s else 0.0


class Session:
    """A conversation with an engine. `tokens` are those in its memory; `stats` describes the last answer."""

    def __init__(self, engine, state: State):
        self.engine, self.state = engine, state
        self.tokens: list[int] = []
        self.snapshots: list[Snapshot] = []
        self.stats = Stats()
        self._answer: object | None = None  # the answer that may go on

    # ---- tokens in, logits out ----

    def forward(self, tokens: Sequence[int], all: bool = False) -> np.ndarray:
        """Append `tokens` and return float32 logits: [n_vocab] after the last, or [n_tokens, n_vocab] with `all`.

        Raises ContextFull if they do not fit, RgpuError for an id outside the vocabulary or an empty list. A forward that is
        broken off (Ctrl-C, an error) leaves the session at its latest snapshot.
        """
        self._answer = None  # an answer that was under way can't go on behind other tokens
        return self._extend(_ids(tokens), all)

    def _extend(self, tokens: list[int], all: bool = False, best: int = 0):
        self._check(tokens, len(self.tokens))
        try:
            logits = self.engine.executor.forward(self.state, tokens, all, best)
            self.tokens += tokens
        except BaseException:
            # Some chunks are in the state, perhaps a part of one: what the session knows, or its latest snapshot, is whole.
            self._cut(len(self.tokens), torn=True)
            raise
        return logits

    def reset(self) -> None:
        """Forget everything, also the snapshots."""
        self._answer = None
        self.snapshots.clear()
        self._cut(0)

    def _check(self, tokens: list[int], kept: int = 0) -> None:
        """Raise what is wrong with computing `tokens` after `kept` others."""
        if self.engine.executor is None:
            raise RgpuError("the engine is closed")
        if not tokens:
            raise RgpuError("there is no token to compute")
        n_vocab = self.engine.hparams.n_vocab
        for token in tokens:
            if not 0 <= token < n_vocab:
                raise RgpuError(f"token id {token} is outside the vocabulary of {n_vocab}")
        needed = kept + len(tokens)
        if needed > self.state.n_ctx:
            trained, larger = self.engine.hparams.n_ctx_train, ""
            if self.state.n_ctx < trained:
                larger = f", or open the model with a larger context (n_ctx, --ctx: up to {trained}, as trained)"
            raise ContextFull(
                f"{needed} tokens do not fit the context of {self.state.n_ctx}: shorten or reset the conversation{larger}"
            )

    # ---- prefix reuse ----

    def _cut(self, n: int, torn: bool = False) -> None:
        """Go back to at most `n` tokens: exactly n if the layers can rewind, else the latest snapshot before."""
        self.snapshots = [s for s in self.snapshots if s.n_past <= n]
        recurrent = bool(self.state.recurrent)
        if (torn and recurrent) or not self.state.rewind(n):
            if self.snapshots:
                self.state.restore(self.snapshots[-1])
            else:
                self.state.rewind(0)
        del self.tokens[self.state.n_past :]

    def sync(self, tokens: Sequence[int]) -> list[int]:
        """Keep the longest reusable common prefix with `tokens`; returns the rest, at least one token, still to be computed."""
        shared = 0
        for mine, wanted in zip(self.tokens, tokens[:-1], strict=False):
            if mine != wanted:
                break
            shared += 1
        if shared < len(self.tokens):
            self._cut(shared)
        return list(tokens[len(self.tokens) :])

    def _prefill(self, tokens: list[int], best: int = 0):
        """Compute a prompt's remainder; snapshot after the first and the last of its messages."""
        start, eog = len(self.tokens), self.engine.tokenizer.eog
        ends = [start + i + 1 for i, token in enumerate(tokens[:-1]) if token in eog]
        for end in sorted({*ends[:1], *ends[-1:]}):
            self._extend(tokens[len(self.tokens) - start : end - start])
            self._remember()
        return self._extend(tokens[len(self.tokens) - start :], best=best)

    def _remember(self) -> None:
        if self.state.recurrent and all(s.n_past != self.state.n_past for s in self.snapshots):
            self.snapshots.append(self.state.snapshot())
            if len(self.snapshots) > MAX_SNAPSHOTS:
                del self.snapshots[1]

    # ---- text in, text out ----

    def encode(
        self, prompt: Sequence[int] | str | Sequence[Mapping[str, Any]], tools=None, enable_thinking: bool = True
    ) -> list[int]:
        """Token ids of a prompt: ids as they are, a text, or messages through the model's chat template."""
        if isinstance(prompt, str):
            return self.engine.tokenizer.encode(prompt, bos=True)
        if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
            # What people wrote must not end their turn and begin another.
            messages = self.engine.tokenizer.guard(prompt)
            text = self.engine.template.render(messages, tools=tools, enable_thinking=enable_thinking)
            return self.engine.tokenizer.encode(text, bos=True)
        return _ids(prompt)

    def generate(
        self,
        prompt: Sequence[int] | str | Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools=None,
        enable_thinking: bool = True,
    ) -> Iterator[Piece]:
        """Continue `prompt` (the whole timeline: ids, a text, or messages) and yield the answer piece by piece.

        The model's end token, `params.stop`, `params.max_tokens` and the context's end each stop it (`stats.stop_reason`).
        Closing the iterator early is fine: what was generated stays in memory for the next prompt to share.
        """
        params = params or SamplingParams()
        if not isinstance(params, SamplingParams):
            raise RgpuError(f"params is {params!r}, but must be SamplingParams(...)")
        tokens = self.encode(prompt, tools, enable_thinking)
        return self._generate(tokens, params, Sampler(params, self.engine.hparams.n_vocab))

    def _generate(self, tokens: list[int], params: SamplingParams, sampler: Sampler) -> Iterator[Piece]:
        began, read = time.perf_counter(), _read_bytes()
        tokenizer = self.engine.tokenizer
        stats = self.stats = Stats(prompt_tokens=len(tokens))
        self._check(tokens)  # before anything in memory is given up
        answer = self._answer = object()
        rest = self.sync(tokens)
        stats.reused_tokens = len(tokens) - len(rest)
        short = sampler.shortlist
        logits = self._prefill(rest, short)
        stats.prefill_s, stats.read_bytes = time.perf_counter() - began, _read_bytes() - read
        decoder, stops = tokenizer.stream(), StopStrings(params.stop)
        first = None
        while True:
            if params.max_tokens == 0:
                stats.stop_reason = "length"
                break
            sample = sampler.choose(*logits) if short else sampler.sample(logits, self.tokens)
            now = time.perf_counter()
            first = first or now
            stats.ttft_s, stats.decode_s, stats.read_bytes = first - began, now - first, _read_bytes() - read
            stats.generated_tokens += 1
            if sample.id in tokenizer.eog:
                stats.stop_reason = "eog"
                break
            text, stopped = stops.push(decoder.push(sample.id))
            yield Piece(text, sample.id, sample.logprob, sample.top)
            if stopped:
                stats.stop_reason = "stop"
                return
            if self._answer is not answer:
                raise RgpuError("another answer was started in this session: this one can't go on")
            if stats.generated_tokens == params.max_tokens or len(self.tokens) >= self.state.n_ctx:
                stats.stop_reason = "length" if stats.generated_tokens == params.max_tokens else "context"
                break
            logits = self._extend([sample.id], best=short)
        # Text held back: the start of a stop string that did not come, or half a character.
        text, stopped = stops.push(decoder.flush())
        held = text + ("" if stopped else stops.flush())
        if held:
            yield Piece(held, -1)


def _read_bytes() -> int:
    """Bytes that this process has had read from storage so far, pages of mapped files included."""
    if sys.platform != "linux":
        return 0  # others count operations, or nothing
    import resource

    return 512 * resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def _ids(tokens) -> list[int]:
    """Token ids as plain integers; RgpuError for what is no list of them."""
    try:
        if isinstance(tokens, str | bytes | Mapping):
            raise TypeError
        return [index(token) for token in tokens]
    except TypeError:
        found = repr(tokens)
        found = found if len(found) <= 60 else found[:60] + "…"
        raise RgpuError(f"{found} is no list of token ids (generate also takes a text or a list of messages)") from None
