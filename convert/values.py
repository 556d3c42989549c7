"""Float values on their way into blocks: read in slices, quantised, written to where the per-expert form wants them.

Owns slicing and with it the memory bound; whence values come is the caller's (`Values.read`), how they become blocks
quantize's, what type a tensor gets mix's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rgpu.errors import ConvertError
from rgpu.gguf import GGUFFile
from rgpu.gguf.layout import ALIGNMENT

from . import records
from .writer import Entry, Pairs, Target, header

# Stored types of float tensors, in safetensors' names and as NumPy reads them (BF16 as its bits).
DTYPES = {"F32": "<f4", "BF16": "<u2", "F16": "<f2", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}
FLOATS = ("F32", "F16", "BF16")  # what a GGUF may hold and still be quantised: anything else has lost digits already
SLICE = 64 << 20  # bytes of float32 worked on at once; a tensor that is transformed as a whole may be larger


def float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    """A contiguous float32 copy of stored values of any of DTYPES (BF16 as uint16)."""
    if dtype != "BF16":
        return np.array(stored, np.float32, order="C")
    bits = np.array(stored, np.uint32, order="C")
    bits <<= 16
    return bits.view(np.float32)


@dataclass(frozen=True)
class Values:
    """Where a stock tensor's values come from."""

    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]  # (first, last) along axis 0 -> float32 [last - first, ...]
    release: Callable[[], None] = lambda: None  # called after each slice: pages read so far may go
    whole: bool = False  # can only be read all at once

    def slices(self):
        """(first, values as float32) of slices along axis 0, until all has been seen."""
        step = self.shape[0]
        if not self.whole:
            step = max(1, SLICE // (4 * math.prod(self.shape[1:])))
        for first in range(0, self.shape[0], step):
            yield first, self.read(first, min(first + step, self.shape[0]))
            self.release()


def entry(name: str, shape: tuple[int, ...], quant: str) -> Entry:
    """A tensor to be written, with the bytes it takes; ConvertError if its rows are no whole number of blocks."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[quant]]
    if shape[-1] % block:
        raise ConvertError(f"{name} {list(shape)} can't be {quant}: rows must be a multiple of {block}")
    return Entry(name, quant, tuple(shape), math.prod(shape) // block * nbytes)


def of_gguf(file: GGUFFile, name: str) -> Values:
    """The values of a float tensor of a GGUF; ConvertError if it is quantised."""
    info = file.tensors[name]
    if info.quant not in FLOATS:
        raise ConvertError(
            f"{file.path} is quantised already ({name} is {info.quant}): leave --type out to keep its blocks, "
            f"or start from a file in {', '.join(FLOATS)}"
        )
    view = file.bytes(name).view(DTYPES[info.quant]).reshape(info.shape)
    return Values(info.shape, lambda first, last: float32(view[first:last], info.quant))


def write_records(target: Target, pairs: Pairs, stock: list[Entry], values: dict[str, Values], threads: int) -> None:
    """Writes the per-expert form of a model whose stock form is `stock`, its values quantised on the way."""
    from .quantize import quantize

    pieces = records.per_expert(stock)
    head, offsets, size = header(records.per_expert_pairs(pairs, stock), [piece.entry for piece in pieces], ALIGNMENT)
    target.begin(head, size)
    places: dict[str, list[tuple[int, int, int]]] = {}
    for piece, offset in zip(pieces, offsets, strict=True):
        places.setdefault(piece.source, []).append((piece.start, piece.start + piece.entry.nbytes, offset))
    for tensor in stock:
        stride = tensor.nbytes // tensor.shape[0]  # bytes per step of axis 0
        for first, x in values[tensor.name].slices():
            if not np.isfinite(x).all():
                raise ConvertError(f"{tensor.name} has values that are infinite or not a number")
            blocks = quantize(x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x[None], tensor.quant, threads=threads)
            _put(target, blocks.reshape(-1), first * stride, places[tensor.name])


def _put(target: Target, data: np.ndarray, start: int, places: list[tuple[int, int, int]]) -> None:
    """Writes bytes `start` on of a stock tensor to the places (first byte, end, absolute offset) that hold them."""
    stop = start + data.size
    for begin, end, offset in places:
        low, high = max(begin, start), min(end, stop)
        if low < high:
            target.write(offset + low - begin, data[low - start : high - start])
