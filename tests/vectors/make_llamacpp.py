"""Writes quantize_llamacpp.json and mix_llamacpp.json: errors of llama.cpp's encoders, and the types it chooses.

    pip install llama-cpp-python               # extra `bench`
    python -m tests.vectors.make_llamacpp      # from the repository root, seconds

Errors: {type: {distribution: relative rms error}} for `bench.quantize.samples()`, without an importance matrix.
Types: `cases` of architecture, metadata that differs from the tiny model's, whether the head is tied, and per mix one letter
(`letters`) for each tensor in the order of names, from a dry run of llama_model_quantize over a file with holes for weights.
"""

import ctypes
import json
import re
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from bench.quantize import QUANTS, error, llama_encoder, samples
from rgpu.gguf.mix import FILE_TYPES
from tests.tiny import add
from tests.vectors.cases import CASES, LETTERS, tensors

FOLDER = Path(__file__).parent
LINE = re.compile(r"^\[ *\d+/ *\d+\] (\S+) .* type = +(\w+), size = +\S+ MiB(?: -> +\S+ MiB \((\w+)\))?", re.MULTILINE)


def write_holes(path: Path, case: dict) -> None:
    """An F32 model of the case's shapes; its weights are never read."""
    keys, shapes = tensors(case)
    writer = gguf.GGUFWriter(path, case["arch"])
    for key, value in keys.items():
        add(writer, key, value)
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = sum(-(-4 * int(np.prod(shape)) // 32) * 32 for shape in shapes.values())
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + 32 + size)


def chosen(path: Path, mix: str, log: list[str]) -> dict[str, str]:
    """What llama.cpp would make of each tensor."""
    log.clear()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.dry_run, params.nthread = FILE_TYPES[mix], True, 1
    status = llama_cpp.llama_model_quantize(str(path).encode(), b"unused", ctypes.byref(params))
    assert status == 0, log[-3:]
    names = {known.upper(): known for known in LETTERS.values()}
    return {name: names[(to or same).upper()] for name, same, to in LINE.findall("".join(log))}


def main() -> None:
    encode = llama_encoder()
    errors = {quant: {name: error(x, encode(x, quant), quant) for name, x in samples().items()} for quant in QUANTS}
    (FOLDER / "quantize_llamacpp.json").write_text(json.dumps(errors, indent=1) + "\n")

    log: list[str] = []
    keep = llama_cpp.llama_log_callback(lambda level, text, data: log.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(keep, None)
    letter = {quant: letter for letter, quant in LETTERS.items()}
    types = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "holes.gguf"
            write_holes(path, case)
            found = {mix: chosen(path, mix, log) for mix in FILE_TYPES}
        names = sorted(tensors(case)[1])
        assert all(sorted(of_mix) == names for of_mix in found.values())
        types.append({mix: "".join(letter[of_mix[name]] for name in names) for mix, of_mix in found.items()})
    (FOLDER / "mix_llamacpp.json").write_text(json.dumps(types, indent=1) + "\n")


if __name__ == "__main__":
    main()
