"""A model that fits, whole: decode and prompts at several contexts, with and without the recorded step. A part of bench.gpu.

A step's bound are the bytes it reads at the rate of a copy, a prompt's the multiply-adds at the rate of a matrix product.
"""

import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from unittest import mock

from rgpu import EngineConfig, SamplingParams
from rgpu.engine import Engine
from rgpu.ops import Weight
from rgpu.terminal import Terminal

from . import shapes
from .compare import file_type, tokens
from .decode import state_bytes, weight_bytes
from .engines import Rgpu
from .gpu_rates import Sizes, figure

ROUNDS = 3
LIKELIEST = 40  # tokens that a sampler asks for, unless told otherwise


def made(path: Path | None) -> Path:
    """The model to measure: the one that was asked for, or bench.shapes' fifth of Qwen3.6-35B-A3B, written once."""
    if path:
        return path
    path = Path(tempfile.gettempdir()) / "rgpu-shapes-8x256.gguf"
    if not path.exists():
        print(f"writing {path} (4.2 GB)", file=sys.stderr)
        unfinished = path.with_suffix(".part")
        with contextlib.redirect_stdout(sys.stderr):
            shapes.main([str(unfinished)])
        unfinished.rename(path)
    return path


class OnGpu(Rgpu):
    """The engine on the GPU, with a timer around each step on the device."""

    def __init__(self, path: Path, n_ctx: int, n_batch: int):
        self.engine = Engine(EngineConfig(path, device="cuda", n_ctx=n_ctx, n_batch=n_batch), Terminal().progress)
        self.session = self.engine.session()
        self.ops = self.engine.executor.ops
        self.begin, self.end = (self.ops.device.event(timed=True) for _ in range(2))
        self.keep()

    @contextlib.contextmanager
    def timed(self, recorded: bool = True):
        """Steps lie between the events `begin` and `end`; unless `recorded`, each kernel is launched anew."""
        replay = self.ops.replay

        def between(key, step):
            self.ops.stream.record(self.begin)
            replay(key if recorded else None, step)
            self.ops.stream.record(self.end)

        with mock.patch.object(self.ops, "replay", between):
            yield

    def step(self, tokens: list[int]) -> None:
        """Tokens one by one as an answer has them: what comes back are the likeliest."""
        for token in tokens:
            self.engine.executor.forward(self.session.state, [token], best=LIKELIEST)

    def times(self, tokens: list[int]) -> tuple[float, float]:
        """(median seconds per token, and how much of that lies beside the step on the device) of tokens one by one."""
        whole, beside = [], []
        for token in tokens:
            began = time.perf_counter()
            self.step([token])
            whole.append(time.perf_counter() - began)
            beside.append(whole[-1] - self.end.elapsed(self.begin))
        return median(whole), median(beside)

    def launches(self, token: int) -> int:
        """Kernels of a step."""
        stream = self.ops.stream
        with self.timed(recorded=False), mock.patch.object(stream, "launch", wraps=stream.launch) as launch:
            self.step([token])
        return launch.call_count


def multiply_adds(engine: Engine, n: int, context: int) -> int:
    """… of a prompt of n tokens behind `context` others, with logits of the last: products and attention."""
    hp, model = engine.hparams, engine.executor.model
    weights = [w for layer in model.layers for w in layer.tensors.values() if isinstance(w, Weight)]
    token = sum(math.prod(w.shape) for w in weights) + 3 * hp.n_layer * hp.n_expert_used * hp.n_ff_exp * hp.n_embd
    seen = n * context + n * (n + 1) // 2  # positions that all tokens see together
    heads = sum(layer.kind == "attention" for layer in model.layers) * hp.n_head * (hp.n_embd_head_k + hp.n_embd_head_v)
    return n * token + math.prod(model.output.shape) + seen * heads


def model(path: Path, sizes: Sizes) -> Iterator[dict]:
    """Rows at every context, ascending."""
    most = max(sizes.prompts)
    began = time.perf_counter()
    gpu = OnGpu(path, max(sizes.contexts) + most + sizes.steps + 2, most)
    try:
        kind, hp = file_type(path), gpu.engine.hparams
        more = {"type": kind, "shape": f"{hp.n_layer} layers"}
        yield figure("open", time.perf_counter() - began, path.stat().st_size, **more)
        context_tokens = tokens(max(sizes.contexts), hp.n_vocab)
        for context in sizes.contexts:
            gpu.back()
            if context > gpu.n_past:
                gpu.eval(context_tokens[gpu.n_past : context])
            gpu.keep()
            yield from prompts(gpu, sizes, context, more)
            yield from decode(gpu, sizes, context, more)
        yield from generate(gpu, sizes, more)
    finally:
        gpu.close()


def prompts(gpu: OnGpu, sizes: Sizes, context: int, more: dict) -> Iterator[dict]:
    for n in sizes.prompts:
        given, times = tokens(n, gpu.engine.hparams.n_vocab, seed=1), []
        for _ in range(ROUNDS + 1):
            gpu.back()
            began = time.perf_counter()
            gpu.eval(given)
            times.append(time.perf_counter() - began)
        took = median(times[1:])
        flops = 2 * multiply_adds(gpu.engine, n, context)
        yield figure("prefill", took, flops=flops, tokens=n, context=context, tok_s=round(n / took, 1), **more)


def decode(gpu: OnGpu, sizes: Sizes, context: int, more: dict) -> Iterator[dict]:
    given = tokens(sizes.steps + 2, gpu.engine.hparams.n_vocab, seed=2)
    for recorded in (True, False):
        gpu.back()
        with gpu.timed(recorded):
            gpu.step(given[:2])  # the second is recorded
            took, beside = gpu.times(given[2:])
        nbytes = weight_bytes(gpu.engine.file, gpu.engine.hparams) + state_bytes(gpu.session.state, context + 2 + sizes.steps / 2)
        row = figure("decode", took, nbytes, tokens=1, context=context, tok_s=round(1 / took, 1), **more)
        if recorded:
            row |= {"host_us": round(beside * 1e6, 1), "note": "one graph"}
        else:
            gpu.back()
            row |= {"launches": gpu.launches(given[0]), "note": "kernel by kernel"}
        yield row


def generate(gpu: OnGpu, sizes: Sizes, more: dict) -> Iterator[dict]:
    """An answer as chat makes it: sampled, with its text."""
    session = gpu.engine.session()
    for _ in session.generate(tokens(16, gpu.engine.hparams.n_vocab, seed=3), SamplingParams(max_tokens=sizes.steps, seed=1)):
        pass
    if rate := session.stats.decode_tok_s:
        yield figure("generate", 1 / rate, tokens=1, context=0, tok_s=round(rate, 1), note="sampled", **more)
