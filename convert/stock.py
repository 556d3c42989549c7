"""GGUF to GGUF: a stock file becomes per-expert, a per-expert file becomes stock again; tensor bytes are only moved.

Owns checking that a file is what it is taken for and the copying. Float files that are quantised on the way go through
values.py instead.
"""

from pathlib import Path

import numpy as np

from rgpu.errors import ConvertError
from rgpu.gguf import GGUFFile, TensorInfo, names
from rgpu.gguf.layout import ALIGNMENT, VERSION, VERSION_KEY, find_experts
from rgpu.gguf.shard import DEFAULT_ALIGNMENT

from . import records
from .general import QUANTIZATION_VERSION
from .writer import Entry, Pairs, Target, encode, header


def to_per_expert(file: GGUFFile, out: Path, *, force: bool = False) -> None:
    """Writes the per-expert form of a stock GGUF (stacked or fused, single or split) to `out`; raises RgpuError."""
    stock = stock_entries(file)
    with Target(out, force=force, sources=file.paths) as target:
        _copy_records(target, pairs_of(file), stock, file)


def quantise(file: GGUFFile, out: Path, mix: str, *, force: bool = False, threads: int = 1) -> None:
    """Writes the per-expert form of a stock GGUF of floats, quantised by the rules of `mix`; raises RgpuError."""
    from rgpu.gguf.mix import Mix, file_type

    from . import values

    names = [found.name for found in stock_entries(file)]
    found = {name: values.of_gguf(file, name) for name in names}
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise ConvertError(f"{file.path} has no general.architecture")
    n_layer = file.integer(f"{arch}.block_count")
    n_head, n_head_kv = (max(file.integers(f"{arch}.attention.{key}", n_layer)) for key in ("head_count", "head_count_kv"))
    choose = Mix(mix, n_layer, file.integer(f"{arch}.expert_count"), n_head, n_head_kv, names).choose
    stock = [values.entry(name, found[name].shape, choose(name, found[name].shape)) for name in names]
    pairs = dict(pairs_of(file))
    pairs["general.file_type"] = encode(np.uint32(file_type(mix)))
    pairs["general.quantization_version"] = encode(np.uint32(QUANTIZATION_VERSION))
    with Target(out, force=force, sources=file.paths) as target:
        values.write_records(target, list(pairs.items()), stock, found, threads)


def _copy_records(target: Target, pairs: Pairs, stock: list[Entry], file: GGUFFile) -> None:
    pieces = records.per_expert(stock)
    head, offsets, size = header(records.per_expert_pairs(pairs, stock), [piece.entry for piece in pieces], ALIGNMENT)
    target.begin(head, size)
    streams: dict[str, int] = {}
    for piece, offset in zip(pieces, offsets, strict=True):
        info = file.tensors[piece.source]
        stream = streams.setdefault(_stream(piece.source), len(streams))
        target.copy(offset, file.paths[info.shard], info.offset + piece.start, piece.entry.nbytes, stream)


def _stream(name: str) -> str:
    """Tensors that are read in turn: the gate, up and down stacks, whatever their layer."""
    return name.rpartition("ffn_")[2] if records.is_stack(name) else ""


def to_stock(file: GGUFFile, out: Path, *, force: bool = False) -> bool:
    """Writes the stock form of a file that `to_per_expert` or a hub conversion made; raises RgpuError.

    Returns whether metadata and directory are those of the source: false if someone has edited them since.
    """
    stock = _restored_entries(file)
    alignment = file.integer(records.SOURCE_ALIGNMENT, DEFAULT_ALIGNMENT)
    if not 0 < alignment < 1 << 32 or alignment & (alignment - 1):
        raise ConvertError(f"{file.path}: {records.SOURCE_ALIGNMENT} should be a power of two, found {alignment}")
    stored = encode(np.uint32(alignment)) if records.SOURCE_ALIGNMENT in file.metadata else None
    pairs = records.stock_pairs(pairs_of(file), stored)
    with Target(out, force=force, sources=file.paths) as target:
        head, offsets, size = header(pairs, stock, alignment)
        target.begin(head, size)
        begins = dict(zip([entry.name for entry in stock], offsets, strict=True))
        # In the order of the stock file: scattered reads cost less than scattered writes.
        for piece in sorted(records.per_expert(stock), key=lambda piece: begins[piece.source] + piece.start):
            info = file.tensors[piece.entry.name]
            target.copy(begins[piece.source] + piece.start, file.paths[info.shard], info.offset, info.nbytes)
    return records.digest(pairs, stock) == file.metadata.get(records.SOURCE_DIGEST)


def pairs_of(file: GGUFFile) -> Pairs:
    return [(key, file.metadata.raw(key)) for key in file.metadata]


def stock_entries(file: GGUFFile) -> list[Entry]:
    """The tensors of a stock GGUF whose experts are complete; ConvertError or UnsupportedModel if it is anything else."""
    if VERSION_KEY in file.metadata:
        version = file.metadata[VERSION_KEY]
        raise ConvertError(f"{file.path} is a per-expert file already (rgpu layout {version}): use it as it is")
    if any(names.parse_expert(name) for name in file.tensors):
        raise ConvertError(f"{file.path} has one tensor per expert already (a layout of 2023); convert the stacked file instead")
    layers: dict[int, TensorInfo] = {}
    for info in file.tensors.values():
        if records.is_stack(info.name):
            layers.setdefault(names.parse_block(info.name)[0], info)
        if (layer := names.parse_fused(info.name)) is not None and names.stacked(layer, "gate") in file.tensors:
            raise ConvertError(f"{file.path} has both {info.name} and {names.stacked(layer, 'gate')}: which of them counts?")
    if not layers:
        arch = file.metadata.get("general.architecture", "unknown")
        raise ConvertError(f"{file.path} has no expert tensors (architecture {arch}): there is nothing to convert")
    for layer, info in sorted(layers.items()):
        find_experts(file, layer, info.shape[0])
    return [Entry(info.name, info.quant, info.shape, info.nbytes) for info in file.tensors.values()]


def _restored_entries(file: GGUFFile) -> list[Entry]:
    """The stock form's tensors, in its order, from the names that the converter left in the metadata."""
    if VERSION_KEY not in file.metadata:
        raise ConvertError(f"{file.path} is no per-expert file: it has no key {VERSION_KEY}, so there is nothing to restore")
    if (version := file.integer(VERSION_KEY)) != VERSION:
        raise ConvertError(f"{file.path} has rgpu layout {version}; this version restores layout {VERSION}")
    order = file.metadata.get(records.SOURCE_TENSORS)
    if not isinstance(order, list) or len(set(order)) != len(order):
        raise ConvertError(f"{file.path}: the key {records.SOURCE_TENSORS} is missing or damaged")
    counts: dict[int, int] = {}
    for name in file.tensors:
        if parsed := names.parse_expert(name):
            counts[parsed[0]] = max(counts.get(parsed[0], 0), parsed[2] + 1)
    found = {layer: find_experts(file, layer, n_expert) for layer, n_expert in counts.items()}
    entries = []
    for name in order:
        if records.is_stack(name):
            layer, suffix = names.parse_block(name)
            if layer not in found:
                raise ConvertError(f"{file.path}: the experts of {name} are missing")
            matrix = found[layer].down if "down" in suffix else found[layer].up if "up_exps" in suffix else found[layer].gate
            rows, columns = matrix.shape
            n = 2 if names.parse_fused(name) is not None else 1
            entries.append(Entry(name, matrix.quant, (counts[layer], n * rows, columns), n * matrix.nbytes * counts[layer]))
        elif name in file.tensors:
            info = file.tensors[name]
            entries.append(Entry(name, info.quant, info.shape, info.nbytes))
        else:
            raise ConvertError(f"{file.path}: the tensor {name} is missing")
    needed = {piece.entry.name: piece.entry for piece in records.per_expert(entries)}
    held = {info.name: Entry(info.name, info.quant, info.shape, info.nbytes) for info in file.tensors.values()}
    if needed != held:
        wrong = sorted(name for name in needed.keys() | held.keys() if needed.get(name) != held.get(name))
        raise ConvertError(f"{file.path}: {records.SOURCE_TENSORS} does not account for {wrong[0]} ({len(wrong)} such tensors)")
    return entries
