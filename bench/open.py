"""How long opening takes: a sparse stand-in for a per-expert file of the 35B model, opened again and again.

`python -m bench.open` writes it to a temporary folder (12 MB on disk, 22.6 GB long) and prints one JSON line.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from rgpu.gguf import GGUFFile, names

N_LAYER, N_EXPERT, N_EMBD, N_FF, N_OTHER, N_VOCAB, N_MERGES = 40, 256, 2048, 512, 733, 248320, 247587
FIRST_OPEN = """
import sys, time
start = time.perf_counter()
from rgpu.gguf import GGUFFile
GGUFFile(sys.argv[1])
print(time.perf_counter() - start)
"""


def write_stand_in(path: Path) -> None:
    """The directory and vocabulary of a 35B per-expert file over a hole instead of tensor data."""
    writer = GGUFWriter(path, "qwen35moe")
    writer.add_custom_alignment(4096)
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzĠé", k=draw.randint(1, 12))) for _ in range(N_VOCAB)]
    writer.add_token_list(words)
    writer.add_token_types([1] * N_VOCAB)
    writer.add_token_merges([f"{draw.choice(words)} {draw.choice(words)}" for _ in range(N_MERGES)])

    def add(name, shape, quant):
        block, nbytes = GGML_QUANT_SIZES[quant]
        row = shape[-1] // block * nbytes
        stored = (*shape[:-1], row)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=quant)

    for i in range(N_OTHER):
        add(names.block(i % N_LAYER, f"dense_{i // N_LAYER}.weight"), (N_EMBD, N_EMBD), GGMLQuantizationType.Q4_K)
    for layer in range(N_LAYER):
        for index in range(N_EXPERT):
            add(names.expert(layer, "gate", index), (N_FF, N_EMBD), GGMLQuantizationType.Q4_K)
            add(names.expert(layer, "up", index), (N_FF, N_EMBD), GGMLQuantizationType.Q4_K)
            add(names.expert(layer, "down", index), (N_EMBD, N_FF), GGMLQuantizationType.Q6_K)
    n_data = sum(-(-info.nbytes // 4096) * 4096 for info in writer.tensors[0].values())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 4096) * 4096 + n_data)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.open", description=__doc__)
    parser.add_argument("--repeat", type=int, default=15)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stand-in.gguf"
        write_stand_in(path)
        first = float(subprocess.run([sys.executable, "-c", FIRST_OPEN, path], capture_output=True, check=True, text=True).stdout)
        seconds = []
        for _ in range(repeat):
            start = time.perf_counter()
            file = GGUFFile(path)
            seconds.append(time.perf_counter() - start)
            n_tensors = len(file.tensors)
            file.close()
        with GGUFFile(path) as file:
            start = time.perf_counter()
            n_tokens = len(file.metadata["tokenizer.ggml.tokens"])
            tokens = time.perf_counter() - start
    figures = {
        "n_tensors": n_tensors,
        "n_tokens": n_tokens,
        "open_s": statistics.median(seconds),
        "open_s_min": min(seconds),
        "open_s_max": max(seconds),
        "first_open_with_imports_s": first,
        "decode_tokens_s": tokens,
    }
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
