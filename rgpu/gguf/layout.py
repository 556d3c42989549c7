"""Where each expert's gate, up and down matrix lies in a file, whichever of the three forms the file stores them in.

Forms: one tensor per expert (what our converter writes), stacked [n_expert, rows, columns], or gate and up fused in one
stack. Owns the record layout's constants; reads the tensor directory only, never data.
"""

from typing import NamedTuple

import numpy as np

from ..errors import UnsupportedModel
from . import names
from .reader import GGUFFile
from .shard import TensorInfo

VERSION = 1  # of `rgpu.layout.version`
VERSION_KEY = "rgpu.layout.version"
ALIGNMENT = 4096  # a record is gate, up and down of one expert, each page-aligned, one behind the other
KINDS = ("gate", "up", "down")  # in the order of a record


class ExpertMatrix(NamedTuple):
    """One matrix (gate, up or down) of every expert of a layer: all of one type and shape."""

    quant: str
    shape: tuple[int, int]  # rows, columns of one expert
    nbytes: int  # of one expert
    shard: np.ndarray  # int64 [n_expert], index into GGUFFile.paths
    offset: np.ndarray  # int64 [n_expert], bytes from the start of that shard's file


class ExpertTensors(NamedTuple):
    """The experts of one layer."""

    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix


def find_experts(file: GGUFFile, layer: int, n_expert: int) -> ExpertTensors:
    """Locates the experts of one layer; UnsupportedModel names a tensor that is missing, misshapen or of another type."""
    fused = file.tensors.get(names.fused(layer))
    if fused is not None:
        gate, up = _fused(fused, n_expert)
    else:
        gate, up = (_matrix(file, layer, kind, n_expert) for kind in ("gate", "up"))
    down = _matrix(file, layer, "down", n_expert)
    for kind, matrix, needed in (("up", up, gate.shape), ("down", down, gate.shape[::-1])):
        if matrix.shape != needed:
            raise UnsupportedModel(
                f"experts of layer {layer}: {kind} is {list(matrix.shape)}, but gate {list(gate.shape)} needs {list(needed)}"
            )
    return ExpertTensors(gate, up, down)


def _matrix(file: GGUFFile, layer: int, kind: str, n_expert: int) -> ExpertMatrix:
    stacked = file.tensors.get(names.stacked(layer, kind))
    return _per_expert(file, layer, kind, n_expert) if stacked is None else _stacked(stacked, n_expert)


def _stacked(info: TensorInfo, n_expert: int) -> ExpertMatrix:
    if len(info.shape) != 3 or info.shape[0] != n_expert:
        raise UnsupportedModel(f"{info.name} is {list(info.shape)}, needs [{n_expert}, rows, columns]")
    nbytes = info.nbytes // n_expert
    offset = info.offset + nbytes * np.arange(n_expert, dtype=np.int64)
    return ExpertMatrix(info.quant, info.shape[1:], nbytes, np.full(n_expert, info.shard, np.int64), offset)


def _fused(info: TensorInfo, n_expert: int) -> tuple[ExpertMatrix, ExpertMatrix]:
    """Gate and up of a fused stack: each expert's gate rows come first, then as many up rows."""
    both = _stacked(info, n_expert)
    if both.shape[0] % 2:
        raise UnsupportedModel(f"{info.name} is {list(info.shape)}: an odd number of rows can't be gate and up")
    gate = both._replace(shape=(both.shape[0] // 2, both.shape[1]), nbytes=both.nbytes // 2)
    return gate, gate._replace(offset=gate.offset + gate.nbytes)


def _per_expert(file: GGUFFile, layer: int, kind: str, n_expert: int) -> ExpertMatrix:
    first = file.tensors.get(names.expert(layer, kind, 0))
    if first is None:
        either = " or " + names.fused(layer) if kind != "down" else ""
        raise UnsupportedModel(f"{names.stacked(layer, kind)}{either} is missing, and so is {names.expert(layer, kind, 0)}")
    if len(first.shape) != 2:
        raise UnsupportedModel(f"{first.name} is {list(first.shape)}, needs [rows, columns]")
    shard, offset = [], []
    for index in range(n_expert):
        info = file.tensors.get(names.expert(layer, kind, index))
        if info is None:
            raise UnsupportedModel(f"{names.expert(layer, kind, index)} is missing (the model has {n_expert} experts)")
        if info.shape != first.shape or info.quant != first.quant:
            raise UnsupportedModel(
                f"{info.name} is {info.quant} {list(info.shape)}, but {first.name} is {first.quant} {list(first.shape)}: "
                "all experts of a layer need one type and shape"
            )
        shard.append(info.shard)
        offset.append(info.offset)
    if names.expert(layer, kind, n_expert) in file.tensors:
        raise UnsupportedModel(f"{names.expert(layer, kind, n_expert)} is one too many: the model has {n_expert} experts")
    return ExpertMatrix(first.quant, first.shape, first.nbytes, np.array(shard, np.int64), np.array(offset, np.int64))
