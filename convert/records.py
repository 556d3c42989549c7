"""The two forms of one model: stock (experts stacked, as llama.cpp writes) and per-expert (one record each).

Owns which tensor of one form lies where in the other, the order of a per-expert file, and the `rgpu.*` keys that lead
back from it to the stock form. Reads and writes no file.
"""

import hashlib
from typing import NamedTuple

from rgpu.gguf import names
from rgpu.gguf.layout import ALIGNMENT, KINDS, VERSION, VERSION_KEY

from .writer import Entry, Pairs, encode

ALIGNMENT_KEY = "general.alignment"
SOURCE_ALIGNMENT = "rgpu.source.alignment"  # u32, there if the source had general.alignment
SOURCE_TENSORS = "rgpu.source.tensors"  # names of the stock form's tensors in its order
SOURCE_DIGEST = "rgpu.source.digest"  # sha256 over the stock form's metadata and tensor directory
OWN = "rgpu."
SPLIT = "split."


class Piece(NamedTuple):
    """One tensor of the per-expert form, and where its bytes lie in the stock form."""

    entry: Entry
    source: str  # the stock tensor
    start: int  # bytes from that tensor's beginning


def per_expert(stock: list[Entry]) -> list[Piece]:
    """The per-expert form: tensors without experts in their order, then records by layer and expert."""
    dense, stacks = [], {}
    for entry in stock:
        layer, kinds = _experts_in(entry.name)
        if layer is None:
            dense.append(Piece(entry, entry.name, 0))
            continue
        n_expert, rows, columns = entry.shape
        nbytes = entry.nbytes // n_expert // len(kinds)
        for i, kind in enumerate(kinds):
            stacks[layer, kind] = (entry, i * nbytes, (rows // len(kinds), columns), nbytes)
    records = []
    for layer in sorted({layer for layer, _ in stacks}):
        matrices = [(kind, *stacks[layer, kind]) for kind in KINDS]
        for expert in range(matrices[0][1].shape[0]):
            for kind, entry, start, shape, nbytes in matrices:
                stride = entry.nbytes // entry.shape[0]
                own = Entry(names.expert(layer, kind, expert), entry.quant, shape, nbytes)
                records.append(Piece(own, entry.name, expert * stride + start))
    return dense + records


def _experts_in(name: str) -> tuple[int | None, tuple[str, ...]]:
    """The layer of a stacked tensor and which matrices it holds; (None, ()) for any other tensor."""
    if parsed := names.parse_stacked(name):
        return parsed[0], (parsed[1],)
    layer = names.parse_fused(name)
    return (None, ()) if layer is None else (layer, ("gate", "up"))


def is_stack(name: str) -> bool:
    return _experts_in(name)[0] is not None


def per_expert_pairs(pairs: Pairs, stock: list[Entry]) -> Pairs:
    """Metadata of the per-expert form: the stock form's in its order, alignment 4096, no `split.*`, and our keys."""
    kept = stock_pairs(pairs, None)
    raised = encode(ALIGNMENT)
    own = [(VERSION_KEY, encode(VERSION)), (SOURCE_DIGEST, encode(digest(kept, stock)))]
    if ALIGNMENT_KEY in dict(kept):
        own.append((SOURCE_ALIGNMENT, dict(kept)[ALIGNMENT_KEY]))
        kept = [(key, raised if key == ALIGNMENT_KEY else value) for key, value in kept]
    else:
        kept = [*kept, (ALIGNMENT_KEY, raised)]
    return [*kept, *own, (SOURCE_TENSORS, encode([entry.name for entry in stock]))]


def stock_pairs(pairs: Pairs, alignment: bytes | None) -> Pairs:
    """Metadata without `split.*` and our keys; if it has ours, general.alignment becomes `alignment` or goes (None)."""
    ours = VERSION_KEY in dict(pairs)
    kept = []
    for key, value in pairs:
        if key.startswith((OWN, SPLIT)) or (ours and key == ALIGNMENT_KEY and alignment is None):
            continue
        kept.append((key, alignment if ours and key == ALIGNMENT_KEY else value))
    return kept


def digest(pairs: Pairs, stock: list[Entry]) -> str:
    """sha256 in hexadecimal over metadata and tensor directory of the stock form; tensor data is not read."""
    sha = hashlib.sha256()
    for key, value in pairs:
        sha.update(key.encode() + b"\0" + value)
    for entry in stock:
        sha.update(f"{entry.name}\0{entry.quant}\0{entry.shape}\0".encode())
    return sha.hexdigest()
