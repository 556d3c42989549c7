"""Open a model once, run any number of sessions on it.

Owns the user's wish (`EngineConfig`) and what follows from it: backend, types, sizes, the plan that is printed. A session's
timeline is in session.py; what runs is in executor.py; nothing here computes.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from . import load
from .errors import OutOfMemory, RgpuError, UnsupportedModel
from .executor import Executor
from .gguf import names
from .gguf.reader import GGUFFile
from .ops import BACKENDS, Ops
from .quants import TYPES
from .session import Session
from .state import State
from .template import ChatTemplate
from .tokenizer import Tokenizer

KV_TYPES = ("f16", "f32", "q8_0")
N_CTX = 32768  # the default context, where the model was trained for as much; pages of it are taken only when used


@dataclass(frozen=True)
class EngineConfig:
    """What the user wants. `None` means: chosen when the engine opens, and printed."""

    path: str | os.PathLike
    device: str = "auto"  # auto, cpu, reference
    kv: str = "f16"  # type of the KV cache: f16, f32, q8_0
    n_ctx: int | None = None  # tokens a session can hold; None: 32,768 or the trained context if that is smaller
    threads: int | None = None  # None: physical cores
    n_batch: int = 512  # tokens of a prompt that are computed together

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise RgpuError(f"path is {self.path!r}, but must name a file")
        devices = ("auto", *BACKENDS)
        if self.device not in devices:
            raise RgpuError(f"device is '{self.device}', but there are: {', '.join(devices)}")
        if self.kv not in KV_TYPES:
            raise RgpuError(f"kv is '{self.kv}', but there are: {', '.join(KV_TYPES)}")
        for name, value in (("n_ctx", self.n_ctx), ("threads", self.threads), ("n_batch", self.n_batch)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise RgpuError(f"{name} is {value!r}, but must be a whole number of at least 1")


def builtin_model() -> Path:
    """The small model that ships with the package."""
    return Path(__file__).parent / "demo.gguf"


class Engine:
    """A model that is open: `session()` starts a conversation, `tokenizer` and `template` turn text into tokens."""

    def __init__(self, config: EngineConfig, progress: Callable[[int, int, str], None] | None = None):
        """Map the file, bind and check it, compile what it needs. `progress(done, total, name)` while kernels compile."""
        self.config = config
        self.file = GGUFFile(config.path)
        try:
            self._open(config, progress)
        except UnsupportedModel as error:
            self.file.close()
            raise UnsupportedModel(f"{config.path}: {error}") from error
        except BaseException:
            self.file.close()
            raise

    def _open(self, config: EngineConfig, progress) -> None:
        ops = _backend(config)
        bound = load.bind(self.file, ops, config.n_batch)
        hp = self.hparams = bound.model.hp
        self.n_ctx = config.n_ctx or min(N_CTX, hp.n_ctx_train)
        if self.n_ctx > hp.n_ctx_train:
            raise RgpuError(f"n_ctx is {self.n_ctx}, but the model was trained for {hp.n_ctx_train} tokens")
        self.kv = TYPES[config.kv.upper()]
        for width in (hp.n_embd_head_k, hp.n_embd_head_v):
            if width % self.kv.block:
                raise UnsupportedModel(f"heads of {width} values don't divide into blocks of {self.kv.block}: use --kv f16")
        n_batch = min(config.n_batch, self.n_ctx)
        ops.prepare(load.needs(bound, n_batch, config.kv.upper()), progress)
        self.types = bound.types
        self.executor = Executor(bound.model, ops, bound.experts, n_batch)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        device: str = "auto",
        kv: str = "f16",
        n_ctx: int | None = None,
        threads: int | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> "Engine":
        """Open a GGUF: per-expert or stock, single or split. Raises GGUFError, UnsupportedModel, RgpuError."""
        return cls(EngineConfig(path, device, kv, n_ctx, threads), progress)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; sessions of this engine can't be used any more."""
        self.executor = None
        self.file.close()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built at first use: a vocabulary of 248,320 tokens takes about a second."""
        return Tokenizer.from_gguf(self.file)

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate.from_gguf(self.file)

    def session(self) -> Session:
        """A new, empty timeline; sessions share the engine and don't disturb each other."""
        executor = self._opened()
        try:
            state = State(executor.model, executor.ops, self.kv, self.n_ctx)
        except MemoryError:
            raise OutOfMemory(f"no memory for a context of {self.n_ctx} tokens: open the model with a smaller one") from None
        return Session(self, state)

    def _opened(self) -> Executor:
        if self.executor is None:
            raise RgpuError("the engine is closed")
        return self.executor

    @property
    def name(self) -> str:
        """What the file calls the model, else the file's name."""
        return self.file.metadata.get("general.name") or Path(self.config.path).stem

    @property
    def device(self) -> str:
        """The backend that was chosen."""
        return self._opened().ops.name

    @property
    def plan(self) -> list[str]:
        """What was decided, line by line: model, where each class of bytes lives, context."""
        hp, ops, model = self.hparams, self._opened().ops, self._opened().model
        sizes = {"experts": 0, "dense": 0}
        for tensor, info in self.file.tensors.items():
            block = names.parse_block(tensor)
            if block is None or block[0] < hp.n_layer:  # the block of multi-token prediction is not read
                sizes["experts" if names.is_expert(tensor) else "dense"] += info.nbytes
        attention = sum(layer.kind == "attention" for layer in model.layers)
        row = hp.n_embd_head_k // self.kv.block * self.kv.nbytes + hp.n_embd_head_v // self.kv.block * self.kv.nbytes
        types = ", ".join(sorted(self.types["experts"] | self.types["matrices"]))
        threads = f", {ops.threads} threads" if hasattr(ops, "threads") else ""
        return [
            f"model    {self.name}: {hp.arch}, {hp.n_layer} layers ({attention} with attention), {types}",
            f"device   {ops.name}{threads}",
            f"experts  {_size(sizes['experts'])} read in place from the mapped file: {hp.n_layer} layers x {hp.n_expert}, "
            f"{hp.n_expert_used} used per token",
            f"dense    {_size(sizes['dense'])} read in place from the mapped file",
            f"context  {self.n_ctx} tokens of {hp.n_ctx_train}; KV cache {self.config.kv}, "
            f"{_size(attention * self.n_ctx * hp.n_head_kv * row)} when full",
        ]


def _backend(config: EngineConfig) -> Ops:
    if config.device == "reference":
        from .ops.reference import ReferenceOps

        return ReferenceOps(config.threads)
    from .ops.cpu import CpuOps

    return CpuOps(config.threads)


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"
