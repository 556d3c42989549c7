"""Weights on their way to a device: page-locked memory, from which it copies one piece while the processor fills the next.

Plain copies pass through the driver's own small buffers, at a third of the bus's speed and without anything beside them.
"""

import warnings
from itertools import cycle

import numpy as np

from ..errors import DeviceError, OutOfMemory
from .device import Device, Stream

PIECE = 1 << 23  # bytes
PIECES = 4


class Staging:
    """Uploads through the ring; where page-locked memory is refused, a warning says so and uploads are plain."""

    def __init__(self, device: Device, stream: Stream):
        self.stream = stream
        self.ring = None
        try:
            self.ring = cycle([(device.host(PIECE).array, device.event()) for _ in range(PIECES)])
        except (DeviceError, OutOfMemory) as error:
            warnings.warn(f"page-locked memory is refused ({error}): the model takes longer to load", stacklevel=2)

    def upload(self, address: int, values: np.ndarray) -> None:
        """Device bytes at `address` = those of a C-contiguous array, which may be changed as soon as this returns."""
        data = values.reshape(-1).view(np.uint8)
        if self.ring is None:
            self.stream.upload(address, data)
            return
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            room, free = next(self.ring)
            free.synchronize()
            room[: len(piece)] = piece
            self.stream.upload(address + start, room[: len(piece)])
            self.stream.record(free)
