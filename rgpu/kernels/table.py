"""Builds the tables that a pool runs: one row per kernel call, waiting for others only where it must.

Every call names the memory that it reads and writes. A row waits for the rows before it if it touches what one of them
writes, or writes what one of them reads; projections of one input, for example, run side by side.
"""

from collections.abc import Sequence

import numpy as np

from .pool import ARGUMENTS, ROW, RUN_BITS

Span = tuple[int, int]  # first byte and the one after the last


def span(x: np.ndarray) -> Span:
    """The memory that an array's elements lie in, with the gaps between them."""
    start = x.__array_interface__["data"][0]
    return start, start + sum((n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True)) + x.itemsize


def overlap(one: Sequence[Span], other: Sequence[Span]) -> bool:
    return any(a < d and c < b for a, b in one for c, d in other)


class Table:
    """Rows in order; `reads` and `writes` of the rows since the last barrier."""

    def __init__(self):
        self.rows: list[list[int]] = []
        self.parts = 0  # of all rows
        self.reads: list[Span] = []
        self.writes: list[Span] = []

    def add(
        self, address: int, shape: int, arguments: Sequence, parts: int, reads: Sequence[Span], writes: Sequence[Span]
    ) -> None:
        """Append a call of the native code at `address`, whose Kernel.shape is `shape`, in `parts` parts."""
        wait = overlap(writes, self.reads) or overlap([*reads, *writes], self.writes)
        if wait:
            self.reads, self.writes = [], []
        self.reads += reads
        self.writes += writes
        assert parts < 1 << RUN_BITS
        words = [address, shape, parts, int(wait), self.parts, 0, *arguments]
        if shape % 2:  # the last argument is a float
            words[-1] = int(np.float64(words[-1]).view(np.int64))
        assert len(words) - ARGUMENTS == shape // 2 + shape % 2, "as many arguments as the kernel has"
        self.parts += parts
        self.rows.append(words + [0] * (ROW - len(words)))

    def array(self) -> np.ndarray:
        """int64 [rows, ROW]."""
        return np.array(self.rows, np.int64).reshape(-1, ROW)
