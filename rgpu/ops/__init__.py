"""With which verbs a model is computed: the contract that every backend implements, and the weights it is given.

Verbs are coarse and destination first; activations are float32 in the backend's memory, made once by `empty` and passed as
views of the first n_tokens rows. Nothing here or in a backend looks at which model is running. A backend that lacks a verb
fails when it is imported (`check`), never in the middle of an answer.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import DeviceError

Array = Any  # NumPy or a device's array: shape, dtype, reshape, slicing

BACKENDS = ("cuda", "cpu", "reference")
L2_EPS = 1e-6  # least norm in the delta rule's x / |x|: a constant of the architecture's authors, not the norms' eps


def address_of(array: Array) -> int:
    """Where an array's first element lies, in the memory of the backend that has it."""
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.address


@dataclass(frozen=True)
class Weight:
    """A quantised matrix in the backend's memory: type tag, shape (rows, columns), bytes."""

    quant: tuple
    shape: tuple[int, int]
    data: Array  # uint8 [nbytes]

    @property
    def row_bytes(self) -> int:
        return self.shape[1] // self.quant.block * self.quant.nbytes

    @cached_property
    def address(self) -> int:
        """Where the first row lies, for a backend that reads host memory."""
        return address_of(self.data)


@dataclass(frozen=True)
class Slots:
    """Equal matrices in slots, one per resident expert: slot i is `nbytes` bytes at offset[i] of data[source[i]]."""

    quant: tuple
    shape: tuple[int, int]
    data: tuple[Array, ...]
    source: np.ndarray  # int64 [n_slots]
    offset: np.ndarray  # int64 [n_slots]

    @property
    def row_bytes(self) -> int:
        return self.shape[1] // self.quant.block * self.quant.nbytes

    @cached_property
    def addresses(self) -> np.ndarray:
        """int64 [n_slots]: where each slot lies, for a backend that reads host memory."""
        bases = np.array([address_of(part) for part in self.data], np.int64)
        return bases[self.source] + self.offset

    def place(self, slot: int, offset: int) -> None:
        """The slot's matrix begins at byte `offset` of its data from now on."""
        self.offset[slot] = offset
        self.addresses[slot] = address_of(self.data[self.source[slot]]) + offset

    def weight(self, slot: int) -> Weight:
        start = int(self.offset[slot])
        data = self.data[self.source[slot]][start : start + self.shape[0] * self.row_bytes]
        return Weight(self.quant, self.shape, data)


class Bank(NamedTuple):
    """Where the gate, up and down matrices of each slot lie."""

    gate: Slots
    up: Slots
    down: Slots


@dataclass(frozen=True)
class Needs:
    """What a model will ask of a backend: the types it must have kernels for, and the largest sizes."""

    n_tokens: int
    n_expert: int
    n_expert_used: int
    n_embd: int
    n_ff_exp: int
    matrices: frozenset[str]  # type names of the matrices that are multiplied
    embeddings: frozenset[str]  # … that rows are taken from
    experts: frozenset[str]  # … of the experts
    kv: str  # type name of the KV cache
    recurrent: int  # values of a key head of the recurrent layers, 0 without such layers
    n_embd_head: int = 0  # values of a head of attention
    gate_up: frozenset[tuple[str, str]] = frozenset()  # types of experts' (gate, up), and of down; unless given, all of `experts`
    down: frozenset[str] = frozenset()


class Ops(Protocol):
    """A backend. Shapes: n = tokens of this call; every `out` is written whole unless a verb says that it adds."""

    name: str
    reads_host_memory: bool  # weights may stay where a file is mapped

    def prepare(self, needs: Needs, progress: Callable[[int, int, str], None] | None) -> Callable[[], None]:
        """Compile or load the kernels for `needs` and allocate scratch; `progress(done, total, what)`.

        That may still go on while weights are handed over: what is returned waits for its end, and raises its errors.
        """

    def close(self) -> None:
        """The end: give back what is not given back by itself."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Zeroed memory of the backend. (Zeroed, so that no run depends on what lay there.)"""

    def upload(self, array: np.ndarray) -> Array:
        """Host values in the backend's memory; may be the same memory."""

    def write(self, out: Array, values: np.ndarray) -> None:
        """out = host values of the same shape and dtype; they may be changed as soon as this returns."""

    def to_host(self, x: Array) -> np.ndarray:
        """A copy on the host; waits for what computes it."""

    def copy(self, out: Array, x: Array) -> None:
        """out = x, same shape and dtype of 4 bytes."""

    def replay(self, key: Hashable | None, step: Callable[[], None]) -> None:
        """Run the verbs that `step` calls. What it does may be recorded and repeated without calling it when the key comes back.

        So a key stands for the same verbs on the same arrays; only what the arrays hold may differ, and `step` reads none of it.
        The key None comes back never: `step` is called every time.
        """

    def embed(self, out: Array, weight: Weight, tokens: Array) -> None:
        """out [n, n_embd] = rows `tokens` (int32 [n]) of the table."""

    def matmul(self, out: Array, weight: Weight, x: Array) -> None:
        """out [n, rows] = x [n, columns] · Wᵀ. Where W is stored in blocks, x is first rounded to int8 blocks of 32."""

    def rms_norm(self, out: Array, x: Array, weight: Array, eps: float) -> None:
        """out = x / sqrt(mean(x²) + eps) · weight over the last axis; x may be a view of part of each row."""

    def swiglu(self, out: Array, gate: Array, up: Array) -> None:
        """out = gate · sigmoid(gate) · up."""

    def gate(self, out: Array, x: Array, g: Array) -> None:
        """out = x · sigmoid(g); g has x's shape (or is a view of part of each row), or one value per row."""

    def add(self, out: Array, x: Array) -> None:
        """out += x."""

    def zero(self, out: Array) -> None:
        """out = 0."""

    def rope(self, x: Array, pos: Array, freqs: Array) -> None:
        """Rotate x [n, n_head, d] in place: pairs (i, i + n_rot/2), i < n_rot/2 = len(freqs), by (pos[0] + t)·freqs[i]."""

    def store_kv(self, cache: Any, k: Array, v: Array, pos: Array) -> None:
        """Quantise k, v [n, n_head_kv, d] into the cache's rows pos[0] … pos[0] + n - 1."""

    def attention(self, out: Array, q: Array, cache: Any, pos: Array, scale: float) -> None:
        """out [n, n_head, d_v]: softmax(scale · q · K)·V; token t sees positions 0 … pos[0] + t."""

    def short_conv(self, out: Array, x: Array, weight: Array, tail: Array) -> None:
        """out [n, c] = silu(causal convolution of x [n, c] with weight [c, taps]); tail [taps - 1, c] is read and moved on."""

    def delta_rule(self, out: Array, qkv: Array, alpha: Array, beta: Array, a: Array, dt_bias: Array, state: Array) -> None:
        """Gated delta rule: out [n, n_v_head, d_v], state [n_v_head, d_k, d_v] read and written (kernels/recurrent.py)."""

    def route(self, ids: Array, weights: Array, logits: Array, near: Array | None = None) -> None:
        """ids int32, weights [n, k]: the k largest of softmax(logits [n, n_expert]), renormalised; may spend the logits.

        `near` (int32 [n, m]): the m next in rank, for those who guess which will be used soon.
        """

    def post(self, box: Array, ids: Array, table: Array | None = None, after: Array | None = None) -> None:
        """box[2:] = ids (int32 of any shape), box[1] = their number, last box[0] += 1: for a thread that watches box[0].

        With a `table` (int32 [n_expert]): only the ids that have no slot there, and nothing at all if there are none. `after`:
        what the verbs before have written is there when the count is. Nothing is computed from a box.
        """

    def wait(self, box: Array, answer: Array, table: Array) -> None:
        """Go on when answer[0] has reached box[0] (int32): whoever answers has brought what was asked for into `table`."""

    def publish(self, answer: Array, count: int) -> None:
        """answer[0] = count, after all that the calling thread has written; at once, from any thread."""

    def top_k(self, ids: Array, values: Array, logits: Array) -> None:
        """ids int32, values float32 [n, k]: the k <= 1,024 largest of each row of logits [n, n_vocab], best first.

        Of equals the lowest id comes first, NaN before all.
        """

    def expert_ffn(self, out: Array, x: Array, bank: Bank, table: Array, ids: Array, weights: Array) -> None:
        """out[t] += Σ_k weights[t, k] · down(silu(gate x[t]) · up x[t]) of slot table[ids[t, k]], skipping slot -1."""


VERBS = tuple(name for name, member in vars(Ops).items() if callable(member) and not name.startswith("_"))


def check(backend: type) -> type:
    """Class decorator: the backend has every verb with the protocol's parameters, or the import fails."""
    for verb in VERBS:
        found = getattr(backend, verb, None)
        wanted = [*signature(getattr(Ops, verb)).parameters]
        if found is None or [*signature(found).parameters] != wanted:
            raise DeviceError(f"backend '{backend.name}' lacks the verb {verb}({', '.join(wanted[1:])})")
    return backend
