"""Open a model once, run any number of sessions on it.

Owns the user's wish (`EngineConfig`) and what follows from it: backend, types, sizes, the plan that is printed. A session's
timeline is in session.py; what runs is in executor.py; nothing here computes.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from . import backend, load, machine, shapes, sizes
from .errors import OutOfMemory, RgpuError, TokenizerError, UnsupportedModel
from .executor import Executor
from .gguf.direct import DirectFiles
from .gguf.reader import GGUFFile
from .ops import BACKENDS, Ops
from .quants import TYPES
from .residency import budget, profile, report
from .residency.cached import CachedExperts, Residency
from .residency.memory import resident, trim
from .residency.policy import POLICIES
from .residency.routing import TracedExperts
from .residency.trace import RoutingTrace
from .session import MAX_SNAPSHOTS, Session
from .state import State
from .template import ChatTemplate
from .tokenizer import Tokenizer

KV_TYPES = ("f16", "f32", "q8_0")
COMPILING = "compiling kernels for this machine (once)"
LEARNED = 32  # decode steps after which it is worth remembering which experts were used
N_CTX = 32768  # the default context, where the model was trained for as much; pages of it are taken only when used


@dataclass(frozen=True)
class EngineConfig:
    """What the user wants. `None` means: chosen when the engine opens, and printed."""

    path: str | os.PathLike
    device: str = "auto"  # auto (a GPU that the model fits, else the CPU), cuda, cpu, reference
    kv: str = "f16"  # type of the KV cache: f16, f32, q8_0
    n_ctx: int | None = None  # tokens a session can hold; None: 32,768 or the trained context if that is smaller
    threads: int | None = None  # None: physical cores
    n_batch: int = 512  # tokens of a prompt that are computed together
    ram: str | int | None = None  # "6G": the most that the process may have in memory; None: the file is mapped
    policy: str = next(iter(POLICIES))  # which experts stay in memory under `ram`: rotary, lru, lfru, static
    trace: str | os.PathLike | None = None  # where `close` saves which experts were used, as .npz
    replay_trace: str | os.PathLike | None = None  # a trace whose experts are used instead of the router's choice

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise RgpuError(f"path is {self.path!r}, but must name a file")
        devices = ("auto", *BACKENDS)
        if self.device not in devices:
            raise RgpuError(f"device is '{self.device}', but there are: {', '.join(devices)}")
        if self.kv not in KV_TYPES:
            raise RgpuError(f"kv is '{self.kv}', but there are: {', '.join(KV_TYPES)}")
        if self.policy not in POLICIES:
            raise RgpuError(f"policy is '{self.policy}', but there are: {', '.join(POLICIES)}")
        if self.ram is not None:
            sizes.nbytes(self.ram, "ram")
        elif self.policy != next(iter(POLICIES)):
            raise RgpuError(f"policy '{self.policy}' says which experts stay in memory under a cap: give one (ram, --ram) too")
        if self.trace is not None and not Path(self.trace).parent.is_dir():
            raise RgpuError(f"the trace is to be {self.trace}, but there is no folder {Path(self.trace).parent}")
        for name, value in (("n_ctx", self.n_ctx), ("threads", self.threads), ("n_batch", self.n_batch)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise RgpuError(f"{name} is {value!r}, but must be a whole number of at least 1")


def builtin_model() -> Path:
    """The small model that ships with the package."""
    return Path(__file__).parent / "demo.gguf"


class Engine:
    """A model that is open: `session()` starts a conversation, `tokenizer` and `template` turn text into tokens."""

    def __init__(self, config: EngineConfig, progress: Callable[[int, int, str], None] | None = None):
        """Map the file, bind and check it, compile what it needs. `progress(done, total, what)` during what takes long."""
        self.config = config
        self.ops: Ops | None = None
        self.executor: Executor | None = None
        self.cached: CachedExperts | None = None
        self.direct: DirectFiles | None = None
        self.caps: dict[str, int] = {}  # bytes: `ram` of the process, `experts` of their slots
        self.file = GGUFFile(config.path)
        try:
            self._open(config, progress)
        except UnsupportedModel as error:
            self._release()
            raise UnsupportedModel(f"{config.path}: {error}") from error
        except BaseException:
            self._release()
            raise

    def _open(self, config: EngineConfig, progress) -> None:
        self.ops, self.why = self._backend()
        ops = self.ops
        forced = RoutingTrace.load(Path(config.replay_trace)) if config.replay_trace else None
        self.direct = DirectFiles(self.file.paths) if config.ram else None
        found = load.inspect(self.file)
        hp = self.hparams = found.hp
        self.n_ctx = config.n_ctx or min(N_CTX, hp.n_ctx_train)
        if self.n_ctx > hp.n_ctx_train:
            raise RgpuError(f"n_ctx is {self.n_ctx}, but the model was trained for {hp.n_ctx_train} tokens")
        self.kv = TYPES[config.kv.upper()]
        for width in (hp.n_embd_head_k, hp.n_embd_head_v):
            if width % self.kv.block:
                raise UnsupportedModel(f"heads of {width} values don't divide into blocks of {self.kv.block}: use --kv f16")
        n_batch = min(config.n_batch, self.n_ctx)
        compiling = progress and (lambda done, total, name: progress(done, total, f"{COMPILING}: {name}"))
        finish = ops.prepare(found.needs(n_batch, config.kv.upper()), compiling)
        bound = load.bind(self.file, found, ops, self.direct, progress)
        finish()
        self.types = found.types
        self.executor = Executor(bound.model, ops, None, n_batch)
        self.cached = self._cached(bound, n_batch, progress) if self.direct else None
        experts = self.cached or load.mapped(self.file, ops, bound, n_batch)
        if config.trace or forced:
            experts = TracedExperts(ops, experts, (hp.n_layer, hp.n_expert, hp.n_expert_used), n_batch, forced)
        self.executor.experts = experts

    def _backend(self) -> tuple[Ops, str]:
        """The backend and why; "auto" names what keeps it from a GPU that seems to be there."""
        config = self.config
        kv = config.kv, config.n_ctx or N_CTX
        ops, why = backend.choose(config.device, config.threads, self.file, kv, config.ram is not None)
        if config.device == "auto" and ops.name == "cpu" and backend.has_gpu():
            warnings.warn(f"the GPU is not used: {why}", stacklevel=3)
        return ops, why

    def _cached(self, bound: load.Bound, n_batch: int, progress) -> CachedExperts:
        """The experts under the cap `ram`: in what is left of it beside all that is there, and all that is still to come."""
        with suppress(TokenizerError):  # a model without one can be run, too
            _ = self.tokenizer
        trim()
        cap = sizes.nbytes(self.config.ram, "ram")
        kv, recurrent = State.nbytes(bound.model, self.kv, self.n_ctx)
        to_come = self.executor.workspace.nbytes + kv + (1 + MAX_SNAPSHOTS) * recurrent + budget.RAM_RESERVE
        self.caps = {"ram": cap, "experts": cap - resident() - to_come}
        experts = load.cached(self.executor.ops, bound, n_batch, self.direct, self.config.policy, self.caps["experts"], cap)
        self.digest = profile.digest(self.file)
        learned, notice = profile.load(self.digest, machine.name(), experts.arena.table.size)
        if notice:
            warnings.warn(notice, stacklevel=2)
        hottest = []
        if learned:
            experts.policy.restore(learned.scores)
            hottest = np.argsort(-learned.scores, kind="stable")[: np.count_nonzero(learned.scores)].tolist()
        experts.start(hottest, progress)
        return experts

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
        """Let go of the file; sessions of this engine can't be used any more. Saves the trace, if one was asked for."""
        executor, cached = self.executor, self.cached
        self.executor = self.cached = None
        try:
            if executor:
                executor.experts.close()
                if self.config.trace and executor.experts.tokens:
                    executor.experts.recorded().save(Path(self.config.trace))
            if cached and cached.step >= LEARNED and not self.config.replay_trace:
                with suppress(OSError):  # where nothing can be kept, the next start learns again
                    profile.save(profile.Profile(self.digest, machine.name(), cached.policy.state()))
        finally:
            self._release()

    def _release(self) -> None:
        if self.ops:
            self.ops.close()
        self.file.close()
        if self.direct:
            self.direct.close()

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
        except (MemoryError, OutOfMemory):
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
    def residency(self) -> Residency | None:
        """What decode steps have asked of the slots of experts so far; None where the file is mapped."""
        return self.cached and self.cached.residency

    @property
    def plan(self) -> list[str]:
        """What was decided and what it will give, line by line; the machine is measured the first time, which takes a second."""
        hp, ops, model = self.hparams, self._opened().ops, self._opened().model
        attention = sum(layer.kind == "attention" for layer in model.layers)
        types = ", ".join(sorted(self.types["experts"] | self.types["matrices"]))
        how = "in VRAM" if ops.name == "cuda" else "read in place from the mapped file"
        if self.caps:
            how = f"kept in slots within {sizes.text(self.caps['ram'])}"
        rows = [
            f"model    {self.name}: {hp.arch}, {hp.n_layer} layers ({attention} with attention), {types}",
            f"device   {ops.name} ({self.why})",
            f"experts  {hp.n_layer} layers x {hp.n_expert}, {hp.n_expert_used} used per token, {how}",
            f"context  {self.n_ctx} tokens of {hp.n_ctx_train}, KV cache {self.config.kv}",
        ]
        if ops.name != "cpu":
            return rows
        here = machine.this_machine(ops.threads, self.file.path)
        wishes = budget.Wishes(self.n_ctx, self.config.kv, self._opened().workspace.n_tokens, **self.caps)
        rates = f"{here.name}, reads {here.cpu_gb_s:.3g} GB/s, disk {here.disk_gb_s:.2g} GB/s"
        return [*rows, f"machine  {rates}", *report.lines(budget.plan(shapes.from_gguf(self.file), here, wishes))]
