"""What every architecture has: the numbers, the table of tensors, and the binding of a file to both.

An architecture is one file beside this one. Its table (`tensors`) is read by the engine to bind and check a file, by the
converter to find and transform a checkpoint's tensors, and by the tests to write tiny random models.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from ..errors import UnsupportedModel


@dataclass(frozen=True)
class T:
    """One tensor of an architecture; shapes are in NumPy order (slowest axis first).

    `hub` is its name in a checkpoint below the checkpoint's prefix (names that start with `mtp.` or `lm_head` have none);
    `to_gguf` turns the checkpoint's values into those of a GGUF. For experts (`experts` is "gate", "up" or "down") `name` is
    the stacked name, `shape` (n_expert, rows, columns) and `hub` the prefix that both expert layouts of checkpoints share.
    """

    name: str
    shape: tuple[int, ...]
    hub: str = ""
    to_gguf: Callable[[np.ndarray], np.ndarray] | None = None
    experts: str = ""
    optional: bool = False
    mtp: bool = False  # belongs to the multi-token-prediction block: converted, not run
    matrix: bool | None = None  # multiplied in its stored type; else small, and used as float32 values
    alias: str = ""  # what other writers call it

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2 if self.matrix is None else self.matrix


@dataclass(frozen=True)
class HParams:
    """The numbers every architecture has, under llama.cpp's names; those of one architecture alone are in `extra`."""

    arch: str
    n_layer: int  # layers to run: without the MTP blocks
    n_layer_nextn: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int
    n_rot: int
    rope_freq_base: float
    norm_rms_eps: float
    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    extra: SimpleNamespace = field(default_factory=SimpleNamespace)


@dataclass
class Layer:
    """The bound tensors of one block, as attributes spelled as in GGUF (`attn_q`, `ssm_out`, `ffn_gate_inp`)."""

    index: int
    kind: str  # which mixer runs: "attention" or "recurrent"
    tensors: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name):
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None


class Numbers:
    """Reads an architecture's keys from metadata; collects what is missing or senseless, so that it is reported at once."""

    def __init__(self, metadata: Mapping[str, Any], arch: str):
        self.metadata, self.arch, self.problems = metadata, arch, []

    def _read(self, key: str, default):
        key = f"{self.arch}.{key}"
        value = self.metadata.get(key)
        if value is None:
            if default is None:
                self.problems.append(f"{key} is missing")
                return 1
            return default
        if np.ndim(value):
            # A per-layer array in place of one number (Ollama writes 0 for layers that have no attention heads).
            distinct = set(np.asarray(value).tolist()) - {0}
            value = distinct.pop() if len(distinct) == 1 else value
        if not isinstance(value, int | float | np.number):
            self.problems.append(f"{key} is {value!r}, needs one number")
            return 1
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._read(key, default))

    def real(self, key: str, default: float | None = None) -> float:
        return float(self._read(key, default))

    def hparams(self, n_vocab: int, extra: dict | None = None) -> HParams:
        """The common numbers; raises UnsupportedModel that names every key that is missing or makes no sense."""
        n_head = self.integer("attention.head_count")
        n_embd = self.integer("embedding_length")
        nextn = self.integer("nextn_predict_layers", 0)
        head_k = self.integer("attention.key_length", n_embd // max(n_head, 1))
        numbers = HParams(
            arch=self.arch,
            n_layer=self.integer("block_count") - nextn,
            n_layer_nextn=nextn,
            n_embd=n_embd,
            n_vocab=n_vocab,
            n_ctx_train=self.integer("context_length"),
            n_head=n_head,
            n_head_kv=self.integer("attention.head_count_kv", n_head),
            n_embd_head_k=head_k,
            n_embd_head_v=self.integer("attention.value_length", head_k),
            n_rot=self.integer("rope.dimension_count", head_k),
            rope_freq_base=self.real("rope.freq_base", 10000.0),
            norm_rms_eps=self.real("attention.layer_norm_rms_epsilon"),
            n_expert=self.integer("expert_count"),
            n_expert_used=self.integer("expert_used_count"),
            n_ff_exp=self.integer("expert_feed_forward_length"),
            extra=SimpleNamespace(**(extra or {})),
        )
        n = numbers
        self.demand("block_count", n.n_layer >= 1, f"{n.n_layer + nextn} with {nextn} for prediction leaves no layer to run")
        self.demand("context_length", n.n_ctx_train >= 1, n.n_ctx_train)
        self.demand("attention.head_count", n_head >= 1, n_head)
        kv = n.n_head_kv
        self.demand("attention.head_count_kv", kv >= 1 and n_head % kv == 0, f"{kv} for {n_head} heads")
        self.demand("rope.dimension_count", 0 < n.n_rot <= head_k and n.n_rot % 2 == 0, f"{n.n_rot} for heads of {head_k}")
        self.demand("rope.freq_base", 0 < n.rope_freq_base < math.inf, n.rope_freq_base)
        self.demand("attention.layer_norm_rms_epsilon", 0 < n.norm_rms_eps < 1, n.norm_rms_eps)
        used, of = n.n_expert_used, n.n_expert
        self.demand("expert_used_count", 1 <= used <= of, f"{used} of {of} experts")
        if self.problems:
            raise UnsupportedModel(f"metadata does not fit {self.arch}: {'; '.join(self.problems)}")
        return numbers

    def demand(self, key: str, sensible: bool, found) -> None:
        """Note that `key` makes no sense, unless it does."""
        key = f"{self.arch}.{key}"
        if not sensible and not any(problem.startswith(f"{key} ") for problem in self.problems):
            self.problems.append(f"{key} makes no sense: {found}")


class Model:
    """A bound model: hyperparameters, global tensors (`token_embd`, `output_norm`, `output`) and layers.

    A subclass says what is computed: `mix(run, layer)` (attention or its like) and `ffn(run, layer)`, both from the
    normed residual stream to an addition to it, plus the tables that bind and convert it.
    """

    arch: ClassVar[str]
    hub_types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, hp: HParams, tensors: dict[str, Any], layers: list[Layer]):
        self.hp, self.layers = hp, layers
        self.token_embd = tensors["token_embd.weight"]
        self.output_norm = tensors["output_norm.weight"]
        self.output = tensors.get("output.weight", self.token_embd)  # tied when absent

    # ---- the tables: one per architecture ----

    @classmethod
    def metadata_from_hub(cls, config: dict) -> dict[str, Any]:
        """A checkpoint's config.json (its text part) as GGUF metadata, in llama.cpp's keys and types."""
        raise TypeError(f"{cls.arch} has no checkpoint form")

    @classmethod
    def hparams(cls, metadata: Mapping[str, Any], n_vocab: int) -> HParams:
        """Read a file's metadata; `n_vocab` is the number of rows of `token_embd`."""
        raise TypeError("an architecture says how its metadata is read")

    @classmethod
    def tensors(cls, hp: HParams) -> list[T]:
        raise TypeError("an architecture lists its tensors")

    @classmethod
    def layer_kind(cls, hp: HParams, index: int) -> str:
        """Which mixer layer `index` runs, hence which memory it has: "attention" or "recurrent"."""
        return "attention"

    @classmethod
    def workspace(cls, hp: HParams) -> dict[str, int]:
        """Float32 activations by name, with their values per token."""
        raise TypeError("an architecture lists its activations")

    @classmethod
    def recurrent_shapes(cls, hp: HParams) -> dict[str, tuple[int, ...]]:
        """Float32 memory of one recurrent layer, by name."""
        return {}

    # ---- the description: what one forward computes ----

    def mix(self, run, layer) -> None:
        raise TypeError("an architecture describes its mixer")

    def ffn(self, run, layer) -> None:
        raise TypeError("an architecture describes its feed-forward block")


def misfits(table: list[T], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing or misshapen among the tensors of `table`, one text each, given the file's shapes by name."""
    problems = []
    for t in table:
        shape = found.get(t.name, found.get(t.alias))
        if shape is None:
            if not t.optional:
                problems.append(f"{t.name} is missing (needs {list(t.shape)})")
        elif _squeezed(shape) != _squeezed(t.shape):
            problems.append(f"{t.name} is {list(shape)}, needs {list(t.shape)}")
    return problems


def _squeezed(shape):
    """Writers differ in whether a vector is {n} or {n, 1}."""
    return tuple(n for n in shape if n != 1)
