"""What a plan needs to know of a model: how large its tensors are, and what for. Of a file, or of a model known by name.

A file is read by its directory alone, whether or not this engine runs its architecture. Models by name are in catalogue.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from .errors import UnsupportedModel
from .gguf import names
from .gguf.mix import FILE_TYPES, Mix
from .gguf.reader import GGUFFile

KV_TYPES = {"f16": (1, 2), "f32": (1, 4), "q8_0": (32, 34)}  # values of a block, bytes of a block
MIX_OF = {number: mix for mix, number in FILE_TYPES.items()}
ALTERNATING = ("gpt-oss",)  # architectures whose layers 0, 2, 4 … see a window of tokens only; their files don't say which


class Tensor(NamedTuple):
    """One tensor as a stock GGUF has it: experts stacked."""

    name: str
    shape: tuple[int, ...]  # slowest axis first
    quant: str  # ggml type name, "Q4_K"
    nbytes: int


def tensor(name: str, shape: tuple[int, ...], quant: str) -> Tensor:
    """A tensor that is in no file, with the bytes that its type needs."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # here, because importing gguf takes a while

    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[quant]]
    return Tensor(name, shape, quant, math.prod(shape) // block * nbytes)


@dataclass(frozen=True)
class ModelShape:
    """A Mixture-of-Experts model without its weights. Sizes are bytes; those of layers leave multi-token prediction out."""

    name: str
    arch: str
    mix: str  # of types: "Q4_K_M"
    n_layer: int  # without the blocks of multi-token prediction
    n_head: int
    n_head_kv: int
    n_expert: int
    n_expert_used: int
    n_ctx_train: int
    tensors: tuple[Tensor, ...] = field(repr=False)
    state_size: int = 0  # floats that a recurrent layer remembers for each of its values
    n_swa: int = 0  # tokens that every second layer sees, from the first on; 0: all layers see all

    def as_type(self, mix: str) -> "ModelShape":
        """The same model with the types that another mix gives it."""
        blocks = 1 + max(block[0] for t in self.tensors if (block := names.parse_block(t.name)))
        choose = Mix(mix, blocks, self.n_expert, self.n_head, self.n_head_kv, [t.name for t in self.tensors]).choose
        return replace(self, mix=mix, tensors=tuple(tensor(t.name, t.shape, choose(t.name, t.shape)) for t in self.tensors))

    # ---- bytes by class ----

    @cached_property
    def file(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def records(self) -> tuple[int, ...]:
        """Of one expert, by layer; 0 for a layer without experts."""
        of_layer = [0] * self.n_layer
        for layer, t in self._of_layers():
            if names.is_expert(t.name):
                of_layer[layer] += t.nbytes // self.n_expert
        return tuple(of_layer)

    @property
    def experts(self) -> int:
        return self.n_expert * sum(self.records)

    @property
    def routed(self) -> int:
        """Of the experts that one token uses."""
        return self.n_expert_used * sum(self.records)

    @cached_property
    def dense(self) -> int:
        """Of what every token reads: the layers without their routed experts, the output matrix and its norm."""
        layers = sum(t.nbytes for _, t in self._of_layers() if not names.is_expert(t.name))
        output = sum(t.nbytes for t in self.tensors if t.name.startswith("output"))
        return layers + output + (self._embedding.nbytes if self.tied else 0)

    @property
    def embedding(self) -> int:
        """Of the embedding, one row of which a token reads; 0 where it is the output matrix too, and counted there."""
        return 0 if self.tied else self._embedding.nbytes

    @cached_property
    def tied(self) -> bool:
        return all(t.name != "output.weight" for t in self.tensors)

    @cached_property
    def _embedding(self) -> Tensor:
        return next(t for t in self.tensors if t.name == "token_embd.weight")

    # ---- work of one token ----

    @cached_property
    def weights(self) -> int:
        """Weights of the layers that one token is multiplied with."""
        total = 0
        for _, t in self._of_layers():
            if names.is_expert(t.name):
                total += math.prod(t.shape) // self.n_expert * self.n_expert_used
            elif len(t.shape) == 2 and t.name.endswith(".weight"):
                total += math.prod(t.shape)
        return total

    @property
    def output_weights(self) -> int:
        """Those of the output matrix, which a prompt needs once."""
        return math.prod(self._embedding.shape)

    @property
    def n_vocab(self) -> int:
        return self._embedding.shape[0]

    @cached_property
    def activations(self) -> int:
        """Floats that a token of a chunk needs at a time, about: one row of each matrix, and half as much between them."""
        rows = {names.parse_block(t.name)[1]: t.shape[-2] for _, t in self._of_layers() if len(t.shape) > 1}
        return sum(rows.values()) * 3 // 2

    @cached_property
    def attention(self) -> int:
        """Multiplications with the keys and values of one past token."""
        return sum(2 * parts["attn_output.weight"].shape[1] for parts in self._by_layer.values() if "attn_output.weight" in parts)

    # ---- memory of a session ----

    def kv(self, n_ctx: int, kind: str) -> int:
        """Bytes of the keys and values of `n_ctx` tokens."""
        block, nbytes = KV_TYPES[kind]
        total = 0
        for layer, values in self._kv_values.items():
            n = min(n_ctx, self.n_swa) if self.n_swa and layer % 2 == 0 else n_ctx
            total += n * values // block * nbytes
        return total

    @cached_property
    def state(self) -> int:
        """Bytes of the recurrent layers' float32 memory, all of which every token reads and writes."""
        total = 0
        for parts in self._by_layer.values():
            if "ssm_conv1d.weight" in parts:
                channels, taps = parts["ssm_conv1d.weight"].shape
                total += 4 * (parts["ssm_out.weight"].shape[1] * self.state_size + (taps - 1) * channels)
        return total

    @cached_property
    def _kv_values(self) -> dict[int, int]:
        """Values that a token leaves in each layer with attention."""
        values = {}
        for layer, parts in self._by_layer.items():
            if "attn_kv_a_mqa.weight" in parts:  # latent attention keeps what keys and values are made from
                values[layer] = parts["attn_kv_a_mqa.weight"].shape[0]
            elif "attn_k.weight" in parts:
                values[layer] = parts["attn_k.weight"].shape[0] + parts.get("attn_v.weight", parts["attn_k.weight"]).shape[0]
        return values

    @cached_property
    def _by_layer(self) -> dict[int, dict[str, Tensor]]:
        """The tensors of every layer under their short names."""
        by_layer: dict[int, dict[str, Tensor]] = {layer: {} for layer in range(self.n_layer)}
        for layer, t in self._of_layers():
            by_layer[layer][names.parse_block(t.name)[1]] = t
        return by_layer

    def _of_layers(self) -> Iterator[tuple[int, Tensor]]:
        for t in self.tensors:
            block = names.parse_block(t.name)
            if block and block[0] < self.n_layer:
                yield block[0], t


def from_gguf(file: GGUFFile) -> ModelShape:
    """The shape of a file, stock or per-expert. UnsupportedModel if it is no model with experts, GGUFError for senseless keys."""
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or "token_embd.weight" not in file.tensors:
        raise UnsupportedModel(f"{file.path} holds no model: no general.architecture, or no weights")
    if f"{arch}.expert_count" not in file.metadata:
        raise UnsupportedModel(f"{file.path}: {arch} has no experts, so there is nothing to place")

    def number(key: str, default: int | None = None) -> int:
        return file.integer(f"{arch}.{key}", default)

    n_block = number("block_count")
    n_head, n_head_kv = (max(file.integers(f"{arch}.attention.{key}", n_block)) for key in ("head_count", "head_count_kv"))
    tensors = _stacked(file)
    types = "+".join(sorted({t.quant for t in tensors if names.is_expert(t.name)}))
    return ModelShape(
        name=str(file.metadata.get("general.name") or file.path.stem),
        arch=arch,
        mix=MIX_OF.get(file.metadata.get("general.file_type"), types),
        n_layer=n_block - number("nextn_predict_layers", 0),
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_expert=number("expert_count"),
        n_expert_used=number("expert_used_count"),
        n_ctx_train=number("context_length"),
        tensors=tensors,
        state_size=number("ssm.state_size", 0),
        n_swa=number("attention.sliding_window", 0) if arch in ALTERNATING else 0,
    )


def _stacked(file: GGUFFile) -> tuple[Tensor, ...]:
    """The file's tensors; experts that are tensors of their own are put together again."""
    found: dict[str, Tensor] = {}
    for name, info in file.tensors.items():
        expert = names.parse_expert(name)
        if expert is None:
            found[name] = Tensor(name, info.shape, info.quant, info.nbytes)
            continue
        name = names.stacked(*expert[:2])
        before = found.get(name, Tensor(name, (0, *info.shape), info.quant, 0))
        found[name] = before._replace(shape=(before.shape[0] + 1, *info.shape), nbytes=before.nbytes + info.nbytes)
    return tuple(found.values())
