"""The same model in other files: split, with fused experts, with another alignment; written by gguf-py."""

from pathlib import Path

import gguf
import numpy as np

from rgpu.gguf import GGUFFile, names


def rewrite(source: Path, out: Path, *, fused: bool = False, per_file: int = 0, alignment: int = 0) -> Path:
    """Writes a stock GGUF again; returns its (first) path.

    `fused` joins gate and up, `per_file` splits after so many tensors, `alignment` adds general.alignment in front.
    """
    with GGUFFile(source) as file:
        writer = gguf.GGUFWriter(out, file.metadata["general.architecture"], split_max_tensors=per_file)
        if alignment:
            writer.add_custom_alignment(alignment)
        for key in file.metadata:
            kind, element = file.metadata.type_of(key)
            if key != "general.architecture":
                value = file.metadata[key]
                value = value.tolist() if isinstance(value, np.ndarray) else value
                sub = None if element is None else gguf.GGUFValueType(element)
                writer.add_key_value(key, value, gguf.GGUFValueType(kind), sub)
        for info in file.tensors.values():
            layer, suffix = names.parse_block(info.name) or (-1, "")
            if fused and suffix == "ffn_up_exps.weight":
                continue
            name, rows = info.name, stored(file, info.name)
            if fused and suffix == "ffn_gate_exps.weight":
                name, rows = names.fused(layer), np.concatenate([rows, stored(file, names.stacked(layer, "up"))], axis=1)
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[info.quant])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return sorted(out.parent.glob(f"{out.stem}-00001-of-*.gguf"))[0] if per_file else out


def stored(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor's values (F32) or bytes in the shape of its rows."""
    info = file.tensors[name]
    rows = file.bytes(name).reshape(*info.shape[:-1], -1)
    return rows.view(np.float32) if info.quant == "F32" else rows
