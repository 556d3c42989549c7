"""Tiny random models that show mistakes: a GGUF of any architecture and any type, rebuilt from a seed wherever needed.

Every parameter is drawn (norms are not 1, gates not 1/2, decays spread, routers decided), each tensor from its own stream,
so neither the order of a table nor a new tensor changes another's values. The tensors come from rgpu.models. Checkpoints in
a hub's layouts, with tensor tables of their own, are in tiny_hub.py.
"""

import hashlib
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np

from rgpu.models import architectures
from rgpu.models.base import T

VOCAB = 520  # padded beyond the tokeniser's tokens, as the real ones are
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added tokens that are text
WORDS = (
    "the quick brown fox jumps over lazy dog It 's isn 't def return user assistant system What capital The you and with "
    "café déjà naïve 東京 tion ing ed er th he"
)
QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = QWEN35_SPLIT.replace(r"[\p{L}\p{M}]+", r"\p{L}+").replace(r"[^\s\p{L}\p{M}\p{N}]", r"[^\s\p{L}\p{N}]")
TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- else %}{{- '<think>\n' }}{%- endif %}{%- endif %}"
)

# ---- weights ----


def draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One float32 tensor by the meaning of its checkpoint name or GGUF name, from a stream of its own."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith(("A_log", "ssm_a")):
        log = rng.uniform(-3, 2.1, shape).astype(np.float32)  # decays from 0.05 to 8: one head forgets, another remembers
        return log if name.endswith("A_log") else -np.exp(log)
    x = rng.standard_normal(shape, np.float32)
    if name.endswith(("dt_bias", "ssm_dt.bias")):
        return np.float32(0.5) * x
    if "conv1d" in name:
        return np.float32(0.4) * x
    if len(shape) == 1 and "norm" in name:
        return np.float32(0.2) * x + np.float32(1)
    if name.endswith(".bias"):
        return np.float32(0.2) * x
    return np.float32(deviation(name, shape[-1])) * x


def deviation(name: str, n_in: int) -> float:
    """Standard deviation of a matrix: activations keep their size and the router has preferences."""
    if name.startswith(("token_embd", "embed_tokens")):
        return 1.0  # logits then have a standard deviation of about 1.4
    return (2.0 if name.endswith(("mlp.gate.weight", "ffn_gate_inp.weight")) else 1.4) / n_in**0.5


def digest(tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 of names and values; the vectors keep it, so that a drift of the weights is told from a wrong result."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return total.hexdigest()


# ---- a small byte-level BPE ----


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in of each byte, those of printable bytes first: the order in which real vocabularies begin."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


@cache
def bpe() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """(tokens, merges): the bytes, then the prefixes of some words."""
    letter, merges = byte_alphabet(), {}
    for word in WORDS.split():
        for text in (" " + word, word):
            left, *rest = [letter[b] for b in text.encode()]
            for right in rest:
                merges[left, right] = None
                left += right
    tokens = dict.fromkeys([*letter.values(), *(left + right for left, right in merges)])
    return tuple(tokens), tuple(merges)


def tokens() -> list[str]:
    """Every token with its id as index; rows beyond the tokeniser's are padding."""
    known = [*bpe()[0], *SPECIAL, *PLAIN]
    assert len(known) <= VOCAB
    return known + [f"[PAD{i}]" for i in range(len(known), VOCAB)]


def token_id(token: str) -> int:
    return tokens().index(token)


def tokenizer_metadata(arch: str) -> dict:
    """The same tokeniser as GGUF metadata."""
    control, user, unused = 3, 4, 5
    kinds = {t: control for t in SPECIAL} | {t: user for t in PLAIN}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2" if arch == "qwen3moe" else "qwen35",
        "tokenizer.ggml.tokens": tokens(),
        "tokenizer.ggml.token_type": [unused if t.startswith("[PAD") else kinds.get(t, 1) for t in tokens()],
        "tokenizer.ggml.merges": [" ".join(m) for m in bpe()[1]],
        "tokenizer.ggml.eos_token_id": token_id("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": token_id("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
# ---- GGUF files with stacked experts, as llama.cpp writes them ----


def tiny_metadata(arch: str, k: bool = False) -> dict:
    """The metadata of a tiny model of an architecture; `k` makes every row a multiple of 256, so that K-quants apply."""
    hidden, width, d = (256, 256, 64) if k else (64, 32, 32)
    common = {
        "context_length": 4096,
        "embedding_length": hidden,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": d,
        "attention.value_length": d,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_feed_forward_length": width,
    }
    own = {
        "qwen35moe": {
            "block_count": 4,
            "rope.freq_base": 1e7,
            "rope.dimension_count": d // 4,
            "rope.dimension_sections": [3, 3, 2, 0] if k else [2, 1, 1, 0],
            "expert_shared_feed_forward_length": 512 if k else 96,
            "full_attention_interval": 4,
            "ssm.conv_kernel": 4,
            "ssm.state_size": d if k else 16,
            "ssm.group_count": 2,
            "ssm.time_step_rank": 4,
            "ssm.inner_size": 4 * (d if k else 16),
        },
        "qwen3moe": {"block_count": 3, "rope.freq_base": 1e6, "feed_forward_length": 4 * width},
    }
    keys = {f"{arch}.{key}": value for key, value in (common | own[arch]).items()}
    return {"general.type": "model", "general.name": f"tiny-{arch}"} | keys | tokenizer_metadata(arch)


def stock_gguf(
    path, arch: str, quant: str | Callable[[str], str] = "F32", *, k: bool | None = None, metadata: dict | None = None, seed=0
) -> Path:
    """Write a GGUF of random weights and return its path.

    `quant` is the type of every matrix that may be quantised, or says each one's by its name; `k` (rows of 256) follows from
    a type's block; `metadata` changes or, with None as value, removes keys (`nextn_predict_layers` adds the MTP block).
    """
    by_name = quant if callable(quant) else lambda name: quant
    k = not callable(quant) and gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quant]][0] > 32 if k is None else k
    keys = {key: value for key, value in (tiny_metadata(arch, k) | (metadata or {})).items() if value is not None}
    model = architectures()[arch]
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        add(writer, key, value)
    for t in model.tensors(model.hparams(keys, VOCAB)):
        chosen = by_name(t.name) if quantisable(t) else "F32"
        if chosen == "F32":
            writer.add_tensor(t.name, draw(t.name, t.shape, seed))
        else:
            raw = gguf.GGMLQuantizationType[chosen]
            writer.add_tensor(t.name, stored(t.name, t.shape, chosen, seed), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def add(writer: gguf.GGUFWriter, key: str, value) -> None:
    """A Python value as the GGUF type that llama.cpp's converter gives its like."""
    kind = gguf.GGUFValueType
    scalar = {bool: kind.BOOL, int: kind.UINT32, float: kind.FLOAT32, str: kind.STRING}
    if isinstance(value, list):
        element = kind.INT32 if isinstance(value[0], int) and not isinstance(value[0], bool) else scalar[type(value[0])]
        writer.add_key_value(key, value, kind.ARRAY, element)
    else:
        writer.add_key_value(key, value, scalar[type(value)])


def quantisable(t: T) -> bool:
    """llama.cpp keeps vectors, routers and convolutions in F32."""
    if t.experts:
        return True
    return len(t.shape) == 2 and min(t.shape) > 1 and t.is_matrix and not t.name.endswith("ffn_gate_inp.weight")


def stored(name: str, shape: tuple[int, ...], quant: str, seed: int, scale: float = 1.0) -> np.ndarray:
    """The tensor's bytes in a type other than F32, uint8 [..., bytes per row]; `scale` widens its values."""
    raw = gguf.GGMLQuantizationType[quant]
    if quant in ("F16", "BF16"):
        return gguf.quants.quantize(np.float32(scale) * draw(name, shape, seed), raw)
    block, nbytes = gguf.GGML_QUANT_SIZES[raw]
    assert shape[-1] % block == 0, f"{name}: rows of {shape[-1]} do not fit {quant}"
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    blocks = random_blocks(rng, quant, int(np.prod(shape)) // block, scale * deviation(name, shape[-1]))
    return blocks.reshape(*shape[:-1], shape[-1] // block * nbytes)


# Where a block keeps its float16 scale, where its float16 offset, and the offset that puts the mean near zero, in scales.
# Types that are not listed have a scale at byte 0 and no offset.
SCALES = {
    "Q4_1": (0, 2, -7.5),
    "Q5_1": (0, 2, -15.5),
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0),
}


def random_blocks(rng: np.random.Generator, quant: str, n: int, std: float) -> np.ndarray:
    """uint8 [n, bytes]: `n` blocks of random bits whose values have about this standard deviation and mean zero."""
    raw = gguf.GGMLQuantizationType[quant]
    blocks = rng.integers(0, 256, (n, gguf.GGML_QUANT_SIZES[raw][1]), np.uint8)
    if quant == "MXFP4":
        # One exponent byte; the values without it have a root mean square of 5.9 (half of which it stands for).
        blocks[:, 0] = np.round(128 + np.log2(std / 5.9) + rng.uniform(-1, 1, n))
        return blocks
    at, offset_at, offset = SCALES.get(quant, (0, None, 0))

    def scale(values):
        blocks[: len(values), at : at + 2] = values.astype("<f2")[:, None].view(np.uint8)
        if offset_at is not None:
            blocks[: len(values), offset_at : offset_at + 2] = (offset * values).astype("<f2")[:, None].view(np.uint8)

    sample = min(n, 64)
    scale(np.ones(sample))
    unit = gguf.quants.dequantize(blocks[:sample], raw).std()
    scale(std / unit * rng.uniform(0.5, 1.4, n) * rng.choice((-1, 1), n))
    return blocks
