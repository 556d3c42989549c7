"""`python -m bench.shapes OUT.gguf`: a stock GGUF with the layer shapes of Qwen3.6-35B-A3B and random weights, for speed.

By default a fifth of the model, 8 of 40 layers and a fifth of the vocabulary (4.2 GB at Q4_K_M), so that every cost per token
keeps its proportion and a figure for the whole is about five times this one's. Blocks repeat after some megabytes, which no
cache is large enough to notice. The text it writes is nonsense.
"""

import argparse
import json
import sys
import time

import numpy as np

from convert.writer import Entry, encode, header
from rgpu.engine import builtin_model
from rgpu.gguf.mix import MIXES, Mix, file_type
from rgpu.gguf.reader import GGUFFile
from rgpu.models import architectures
from rgpu.models.base import T
from rgpu.quants import TYPES
from tests.tiny import deviation, draw, stored

ARCH = "qwen35moe"
PATTERN = 1 << 15  # blocks that are drawn, then repeated
SHAPES = {
    "context_length": 262144,
    "embedding_length": 2048,
    "attention.head_count": 16,
    "attention.head_count_kv": 2,
    "rope.dimension_sections": np.array([11, 11, 10, 0], np.int32),
    "rope.freq_base": np.float32(1e7),
    "attention.layer_norm_rms_epsilon": np.float32(1e-6),
    "expert_used_count": 8,
    "attention.key_length": 256,
    "attention.value_length": 256,
    "expert_feed_forward_length": 512,
    "expert_shared_feed_forward_length": 512,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 128,
    "ssm.group_count": 16,
    "ssm.time_step_rank": 32,
    "ssm.inner_size": 4096,
    "full_attention_interval": 4,
    "rope.dimension_count": 64,
}


def metadata(layers: int, experts: int, vocab: int) -> dict:
    """GGUF keys: the shapes, and the built-in model's tokenizer, padded."""
    shapes = SHAPES | {"block_count": layers, "expert_count": experts}
    keys = {"general.architecture": ARCH, "general.type": "model", "general.name": f"shapes-{layers}x{experts}"}
    keys |= {f"{ARCH}.{key}": np.uint32(value) if isinstance(value, int) else value for key, value in shapes.items()}
    with GGUFFile(builtin_model()) as file:
        keys |= {key: file.metadata[key] for key in file.metadata if key.startswith("tokenizer.")}
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    missing = vocab - len(tokens)
    keys["tokenizer.ggml.tokens"] = tokens + [f"[PAD{len(tokens) + i}]" for i in range(missing)]
    keys["tokenizer.ggml.token_type"] = np.concatenate([types, np.full(missing, 5, np.int32)])
    return keys | {key: np.uint32(keys[key]) for key in keys if key.endswith("_token_id")}


def write(f, t: T, entry: Entry) -> None:
    """A tensor's random bytes: floats by their meaning, blocks as a pattern that repeats."""
    if entry.quant == "F32":
        f.write(draw(t.name, t.shape, 0).tobytes())
        return
    quant = TYPES[entry.quant]
    row = quant.block * (1 if quant.block > 1 else 256)
    n_rows = min(PATTERN, int(np.prod(t.shape)) // row)
    # The pattern's deviation follows from the real row length.
    scale = deviation(t.name, t.shape[-1]) / deviation(t.name, row)
    pattern = stored(t.name, (n_rows, row), entry.quant, 0, scale).tobytes()
    left = entry.nbytes
    while left:
        left -= f.write(pattern[:left])


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.shapes", description=__doc__.split("\n\n")[0])
    p.add_argument("out")
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--experts", type=int, default=256)
    p.add_argument("--vocab", type=int, default=49664)
    p.add_argument("--type", default="Q4_K_M", choices=MIXES)
    args = p.parse_args(argv)
    began = time.perf_counter()
    keys = metadata(args.layers, args.experts, args.vocab)
    keys |= {"general.file_type": np.uint32(file_type(args.type)), "general.quantization_version": np.uint32(2)}
    model = architectures()[ARCH]
    hp = model.hparams(keys, args.vocab)
    table = model.tensors(hp)
    choose = Mix(args.type, hp.n_layer, hp.n_expert, hp.n_head, hp.n_head_kv, [t.name for t in table]).choose
    entries = []
    for t in table:
        quant = choose(t.name, t.shape)
        nbytes = int(np.prod(t.shape)) // TYPES[quant].block * TYPES[quant].nbytes
        entries.append(Entry(t.name, quant, t.shape, nbytes))
    head, offsets, size = header([(key, encode(value)) for key, value in keys.items()], entries, 32)
    with open(args.out, "wb") as f:
        f.write(head)
        for t, entry, offset in zip(table, entries, offsets, strict=True):
            f.seek(offset)
            write(f, t, entry)
        f.truncate(size)
    print(json.dumps({"file": args.out, "bytes": size, "seconds": round(time.perf_counter() - began, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
