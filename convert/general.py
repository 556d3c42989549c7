"""The `general.*` keys of a converted checkpoint, as llama.cpp's converter writes them.

The `gguf` package finds name, size, licence and the like in the folder and its model card; here they become pairs.
"""

import math
import sys
from pathlib import Path

import numpy as np

from rgpu.gguf.metadata import ARRAY, DTYPES, STRING

from .writer import Entry, Pairs, encode

QUANTIZATION_VERSION = 2


def general_pairs(folder: Path, arch: str, stock: list[Entry]) -> Pairs:
    """Architecture, type, recommended sampling, name, size and what the model card says, in llama.cpp's order."""
    import gguf

    total, shared, expert, n_expert = _parameters(stock)
    folder = folder.resolve()
    try:
        found = gguf.Metadata.load(None, folder, None, total)
    except Exception as error:  # a model card is free text with YAML on top, and nothing in it is needed
        print(f"the model card is ignored: {error!r:.200}", file=sys.stderr)
        found = gguf.Metadata()
    found.name = found.name or folder.name or arch
    found.size_label = found.size_label or gguf.size_label(total, shared, expert, n_expert)
    writer = gguf.GGUFWriter(None, arch)
    writer.add_type("model")
    found.set_gguf_meta_model(writer)
    return [(key, encode(_typed(value))) for key, value in writer.kv_data[0].items()]


def _typed(value):
    """A value recorded by gguf's writer, as what its type says: a model card may give a number for a name."""
    if value.type == STRING:
        return str(value.value)
    if value.type == ARRAY:
        return [str(text) for text in value.value]
    return np.dtype(DTYPES[int(value.type)]).type(value.value)


def _parameters(stock: list[Entry]) -> tuple[int, int, int, int]:
    """Parameters in all, outside the experts, of one expert of every layer; and experts per layer."""
    total = shared = expert = n_expert = 0
    for entry in stock:
        n = math.prod(entry.shape)
        total += n
        if "_exps." in entry.name and len(entry.shape) == 3:
            n_expert = entry.shape[0]
            expert += n // n_expert
        else:
            shared += n
    return total, shared, expert, n_expert
