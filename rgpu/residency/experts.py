"""The contract between a model's MoE block and whatever holds its experts: `ffn(run, layer)`, lane by lane.

A lane is some ops, a bank and a table (expert → slot of the bank, or -1: another lane's). The lanes of a step are disjoint
and together cover every routed expert. `MappedExperts` is the simplest arrangement: one lane over the mapped file.
"""

from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np

from ..gguf import GGUFFile
from ..ops import Array, Bank, Ops


class Lane(NamedTuple):
    """A bank, the ops that can read it, and which expert is in which of its slots (int32 [n_expert], -1: not here)."""

    ops: Ops
    bank: Bank
    table: Array


class MappedExperts:
    """Every expert where the file has it: slot e of a layer's bank is expert e, for every layer and at all times.

    The read-ahead learns from `boxes` (int32 [n_layer, 2 + ids]) what has been routed.
    """

    learns = False  # from experts that nearly were used

    def __init__(
        self, ops: Ops, file: GGUFFile, banks: list[Bank], n_expert: int, boxes: Array, readahead: AbstractContextManager
    ):
        identity = ops.upload(np.arange(n_expert, dtype=np.int32))
        self.lanes = [Lane(ops, bank, identity) for bank in banks]
        self.file, self.boxes, self.readahead = file, boxes, readahead

    def forward(self, n_tokens: int) -> AbstractContextManager:
        """What a forward of `n_tokens` runs within. GGUFError if the file has been shortened."""
        self.file.check()
        return self.readahead

    def close(self) -> None:
        """Nothing is held here: the file is the engine's."""

    def ffn(self, run, layer) -> None:
        """Add the routed experts' output for this step to `run.ws.out`."""
        lane = self.lanes[layer.index]
        lane.ops.post(self.boxes[layer.index], run.ids)
        lane.ops.expert_ffn(run.ws.out, run.ws.h, lane.bank, lane.table, run.ids, run.weights)
