"""The two engines that are compared, behind one small interface: evaluate tokens, keep a position, go back to it.

llama.cpp runs through its C API: llama-cpp-python's class Llama adds work of its own to every token. Each engine's package
is imported where it is opened, because bench.first_token times a process that has only one of them.
"""

import ctypes
from pathlib import Path

from rgpu.errors import RgpuError


class Rgpu:
    """This engine. `n_past` tokens are in its memory."""

    name = "rgpu"
    note = ""

    def __init__(self, path: Path, threads: int, n_ctx: int):
        from rgpu import Engine, EngineConfig
        from rgpu.terminal import Terminal

        self.engine = Engine(EngineConfig(path, threads=threads, n_ctx=n_ctx), Terminal().progress)
        self.session = self.engine.session()
        self.keep()

    @property
    def n_past(self) -> int:
        return len(self.session.tokens)

    def eval(self, tokens: list[int]) -> None:
        """Append tokens in one go; logits after the last."""
        self._logits = self.session.forward(tokens)

    def step(self, tokens: list[int]) -> None:
        """Append tokens one by one; logits after each."""
        for token in tokens:
            self._logits = self.session.forward([token])

    def logits(self):
        """float32 [n_vocab] after the last token."""
        return self._logits

    def keep(self) -> None:
        """Remember this position, the only one that `back` goes to."""
        self._kept = self.session.state.snapshot()

    def back(self) -> None:
        self.session.state.restore(self._kept)
        del self.session.tokens[self._kept.n_past :]

    def close(self) -> None:
        self.engine.close()


class LlamaCpp:
    """llama.cpp with its defaults (flash attention: auto, KV cache: f16, batches of 512); reads stock GGUFs only."""

    name = "llama.cpp"

    def __init__(self, path: Path, threads: int, n_ctx: int, repack: bool = True):
        try:
            import llama_cpp
            from llama_cpp import llama_cpp as api
        except ImportError:
            raise RgpuError("llama_cpp is not installed: pip install '.[bench]'") from None
        self.api = api
        self.note = f"{llama_cpp.__version__}, {'repacked' if repack else 'not repacked'}"
        self._quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._quiet, None)
        api.llama_backend_init()
        model = api.llama_model_default_params()
        model.use_extra_bufts = repack  # copies weights into layouts that its kernels prefer
        self.model = api.llama_model_load_from_file(str(path).encode(), model)
        if not self.model:
            raise RgpuError(f"{path}: llama.cpp does not open it; python -m convert --stock joins separate experts")
        context = api.llama_context_default_params()
        context.n_ctx, context.n_threads, context.n_threads_batch = n_ctx, threads, threads
        self.context = api.llama_init_from_model(self.model, context)
        if not self.context:
            raise RgpuError(f"{path}: llama.cpp has no memory for a context of {n_ctx} tokens")
        self.memory = api.llama_get_memory(self.context)
        self.n_batch = api.llama_n_batch(self.context)
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.n_past = 0
        self.keep()

    def eval(self, tokens: list[int]) -> None:
        for begin in range(0, len(tokens), self.n_batch):
            chunk = tokens[begin : begin + self.n_batch]
            self._decode((ctypes.c_int32 * len(chunk))(*chunk), len(chunk))
        self._wait()

    def step(self, tokens: list[int]) -> None:
        for token in tokens:
            self._decode((ctypes.c_int32 * 1)(token), 1)
            self._wait()

    def _decode(self, tokens: ctypes.Array, n: int) -> None:
        # Such a batch goes to the end of sequence 0 and asks for the logits of its last token only.
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, n)):
            raise RgpuError(f"llama.cpp could not evaluate {n} tokens behind {self.n_past}")
        self.n_past += n

    def _wait(self) -> None:
        """Until the logits are there."""
        self._logits = self.api.llama_get_logits_ith(self.context, -1)

    def logits(self):
        import numpy as np

        return np.ctypeslib.as_array(self._logits, (self.n_vocab,)).copy()

    def keep(self) -> None:
        self._kept, self._kept_past = None, self.n_past
        if self.n_past:
            size = self.api.llama_state_seq_get_size(self.context, 0)
            self._kept = (ctypes.c_uint8 * size)()
            self.api.llama_state_seq_get_data(self.context, self._kept, size, 0)

    def back(self) -> None:
        # Recurrent layers can't go back by themselves, so all of the memory is written anew.
        self.api.llama_memory_clear(self.memory, False)
        if self._kept:
            read = self.api.llama_state_seq_set_data(self.context, self._kept, len(self._kept), 0)
            assert read == len(self._kept), "llama.cpp did not take its own state back"
        self.n_past = self._kept_past

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)
        self.api.llama_log_set(ctypes.cast(None, self.api.llama_log_callback), None)  # ours goes with this object
