"""From logits to a token id: the parameters a user may set, the chain of llama.cpp, and stop strings.

The order is llama.cpp's: bias, penalties, top-k, top-p, min-p, temperature, draw. Owns nothing of the model; NumPy only.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .errors import RgpuError

MOST_SHORT = 1024  # tokens that a device sorts out of the vocabulary
LEAST = np.finfo(np.float32).min  # below it there is only -inf: a forbidden token

@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Defaults are llama.cpp's. RgpuError names the field that is out of range."""

    max_tokens: int | None = None  # None: until the model ends or the context is full
    temperature: float = 0.8  # 0 or less: the likeliest token, always
    top_k: int = 40  # keep the k likeliest; 0 or less: all
    top_p: float = 0.95  # keep the smallest set of the likeliest with at least this probability; 1: all
    min_p: float = 0.05  # keep what is at least this times as likely as the likeliest; 0: all
    repeat_penalty: float = 1.0  # divides positive logits of recent tokens, multiplies negative ones; 1: off
    repeat_last_n: int = 64  # how many recent tokens the three penalties look at; 0: none, -1: all
    presence_penalty: float = 0.0  # taken from the logit of a token that is among them
    frequency_penalty: float = 0.0  # taken once for each time that it is
    seed: int | None = None  # None: a different one each time
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit; -inf forbids it
    stop: tuple[str, ...] = ()  # texts at which to stop; they are not part of the answer
    logprobs: int | None = None  # how many alternatives to report beside the chosen token's own log-probability

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        whole = {"max_tokens": 0, "top_k": None, "repeat_last_n": -1, "seed": 0, "logprobs": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "seed", "logprobs"):
                continue
            _check(name, value, _is(value, numbers.Integral) and (least is None or value >= least), _wanted("an integer", least))
        for name in ("temperature", "repeat_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, _is(value, numbers.Real) and math.isfinite(value), "a finite number")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            _check(name, value, _is(value, numbers.Real) and 0 <= value <= 1, "a number from 0 to 1")
        _check("repeat_penalty", self.repeat_penalty, self.repeat_penalty > 0, "greater than 0")
        for id, bias in self.logit_bias.items():
            _check("logit_bias", id, _is(id, numbers.Integral) and id >= 0, "a token id as key")
            _check("logit_bias", bias, _is(bias, numbers.Real) and bias < math.inf, "a number below infinity")
        _check("stop", stop, all(isinstance(text, str) and text for text in stop), "texts that are not empty")


class Sample(NamedTuple):
    """A chosen token. `logprob` and `top` (the likeliest tokens, best first) are of the softmax of the logits as the model
    gave them, and None and empty unless SamplingParams.logprobs asks for them."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws tokens by one set of parameters; holds the random generator, so equal seeds give equal answers."""

    def __init__(self, params: SamplingParams, n_vocab: int):
        """Raises RgpuError if `logit_bias` or `logprobs` exceed the vocabulary."""
        beyond = [id for id in params.logit_bias if id >= n_vocab]
        _check("logit_bias", beyond, not beyond, f"token ids below {n_vocab}")
        _check("logprobs", params.logprobs, (params.logprobs or 0) <= n_vocab, f"at most {n_vocab}")
        self.params = params
        self._random = np.random.default_rng(params.seed)
        self._room = np.empty(n_vocab, np.float32)  # the model's own logits stay as they are
        self._logits = self._room
        self._bias_ids = np.array([*params.logit_bias], np.int64)
        self._bias = np.array([*params.logit_bias.values()], np.float32)

    @property
    def shortlist(self) -> int:
        """How many of the likeliest tokens are all that a choice looks at; 0: the whole vocabulary."""
        p = self.params
        plain = p.repeat_penalty == 1 and p.presence_penalty == p.frequency_penalty == 0 and not p.logit_bias
        if not plain or p.logprobs is not None:
            return 0
        if p.temperature <= 0:
            return 1
        return p.top_k if 0 < p.top_k <= min(MOST_SHORT, len(self._room) - 1) else 0

    def choose(self, ids: np.ndarray, logits: np.ndarray) -> Sample:
        """Chooses among the `shortlist` likeliest tokens: ids [n], largest logit first, of equals the lowest id first."""
        self._logits = self._room[: len(ids)]
        np.copyto(self._logits, logits)
        try:
            return Sample(int(ids[self._chosen()]), None, ())
        finally:
            self._logits = self._room

    def sample(self, logits: np.ndarray, history: Sequence[int] = ()) -> Sample:
        """Chooses a token from float32 logits [n_vocab], which are not changed.

        `history`: the tokens so far, prompt included, oldest first. Raises RgpuError if no token is left to choose from:
        logits that are not numbers, or every token forbidden.
        """
        assert logits.shape == self._logits.shape, (logits.shape, self._logits.shape)
        np.copyto(self._logits, logits)
        self._logits[self._bias_ids] += self._bias
        self._penalize(history)
        chosen = self._chosen()
        if self.params.logprobs is None:
            return Sample(chosen, None, ())
        return Sample(chosen, *_logprobs(logits, chosen, self.params.logprobs))

    def _chosen(self) -> int:
        """The place of the choice in `_logits`."""
        best = int(self._logits.argmax())  # the lowest id of equals; the first NaN if there is one
        if not math.isfinite(self._logits[best]):
            raise RgpuError(f"no token can be chosen: the largest logit is {self._logits[best]}")
        return best if self.params.temperature <= 0 else self._draw(best)

    def _penalize(self, history: Sequence[int]) -> None:
        """llama.cpp's penalties: each recent token once, however often it occurs, but for frequency_penalty."""
        params = self.params
        idle = params.repeat_penalty == 1 and params.presence_penalty == 0 and params.frequency_penalty == 0
        if idle or params.repeat_last_n == 0:
            return
        recent = history if params.repeat_last_n < 0 else history[-params.repeat_last_n :]
        ids, counts = np.unique(np.asarray(recent, np.int64), return_counts=True)
        values = self._logits[ids]
        values = np.where(values <= 0, values * params.repeat_penalty, values / params.repeat_penalty)
        self._logits[ids] = values - counts * params.frequency_penalty - params.presence_penalty

    def _draw(self, best: int) -> int:
        """A random token of those that the filters leave."""
        ids, logits = self._kept(best)
        with np.errstate(over="ignore"):  # a temperature next to 0: all but the largest become -inf, as they should
            edges = np.cumsum(np.exp(logits / self.params.temperature))
        place = np.searchsorted(edges, self._random.random() * edges[-1], side="right")
        return int(ids[min(place, len(ids) - 1)])

    def _kept(self, best: int) -> tuple[np.ndarray, np.ndarray]:
        """What top-k, top-p and min-p leave: ids, and float64 logits less the largest.

        Each filter keeps a beginning of the list sorted by likelihood, so the shortest beginning is the answer, and the whole
        vocabulary is never sorted. top-p's share is of all that top-k leaves.
        """
        params, largest = self.params, self._logits[best]
        floor = largest + math.log(params.min_p) if params.min_p > 0 else LEAST
        limited = 0 < params.top_k < len(self._logits)
        if limited:
            ids = _likeliest(self._logits, params.top_k)
        elif params.top_p < 1:
            ids = self._with_share(largest)
        else:
            ids = np.flatnonzero(self._logits >= floor)
        logits = self._logits[ids].astype(np.float64) - largest
        count = len(ids)
        if params.top_p < 1:
            shares = np.cumsum(np.exp(logits))
            whole = shares[-1] if limited else self._total(largest)
            count = int(np.searchsorted(shares, params.top_p * whole)) + 1  # the first with which the share is reached
        if params.min_p > 0:
            count = min(count, int(np.count_nonzero(self._logits[ids] >= floor)))
        count = max(1, count)
        return ids[:count], logits[:count]

    def _with_share(self, largest: np.float32) -> np.ndarray:
        """The likeliest tokens, as many as surely hold top_p of the whole vocabulary's probability."""
        wanted, size = self.params.top_p * self._total(largest), 512
        while True:
            ids = _likeliest(self._logits, size)
            if size >= len(self._logits) or np.exp(self._logits[ids] - largest).sum(dtype=np.float64) >= wanted:
                return ids
            size *= 8

    def _total(self, largest: np.float32) -> float:
        """The sum of exp(logit - largest) over the vocabulary."""
        return float(np.exp(self._logits - largest).sum(dtype=np.float64))


class StopStrings:
    """Passes text through as it arrives, up to the stop string that is complete first; never lets out a part of it.

    The rule looks at where a stop string ends, so that the answer does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""  # may become a stop string
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is now certain to be part of the answer, and whether a stop string has been met."""
        if self.stopped:
            return "", True
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found:
            self.stopped, self._held = True, ""
            _, start = min(found)
            return text[:start], True
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        first = max(0, len(text) - longest)
        start = next((i for i in range(first, len(text)) if any(stop.startswith(text[i:]) for stop in self._stop)), len(text))
        self._held = text[start:]
        return text[:start], False

    def flush(self) -> str:
        """What was held back, when the answer ends without a stop string."""
        text, self._held = self._held, ""
        return text


def _likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """The ids of the `count` largest logits above -inf, largest first; of equals the lowest ids, in their order."""
    count = min(count, len(logits))
    threshold = max(np.partition(logits, -count)[-count], LEAST)
    ids = np.flatnonzero(logits >= threshold)
    return ids[np.argsort(-logits[ids], kind="stable")][:count]


def _logprobs(logits: np.ndarray, chosen: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log-softmax of raw logits: the chosen token's, and the `count` largest with their ids."""
    largest = logits.max()
    log_total = float(largest) + math.log(np.exp(logits - largest).sum(dtype=np.float64))
    ids = _likeliest(logits, count) if count else ()
    return float(logits[chosen]) - log_total, tuple((int(id), float(logits[id]) - log_total) for id in ids)


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value == value


def _wanted(kind: str, least: int | None) -> str:
    return kind if least is None else f"{kind}, at least {least}"


def _check(name: str, value: object, valid: bool, wanted: str) -> None:
    if not valid:
        raise RgpuError(f"{name} is {value!r}: it must be {wanted}")
