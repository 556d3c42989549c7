"""Device memory seen as an array: NumPy's shapes, slices and reshapes, and none of its arithmetic."""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .device import Device


class Heap:
    """A device's memory. What is given back while it is `held` is freed afterwards: garbage may be found at any time, and a
    device must not free during a capture."""

    def __init__(self, device: Device):
        self.device, self.holding = device, False
        self.late: list[int] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
            while self.late:
                self.device.free(self.late.pop())

    def free(self, address: int) -> None:
        if self.holding:
            self.late.append(address)
        else:
            self.device.free(address)


class Memory:
    """A piece of device memory that is given back with the last array in it."""

    def __init__(self, heap: Heap, nbytes: int):
        self.address = heap.device.allocate(max(nbytes, 1))
        weakref.finalize(self, heap.free, self.address)


class DeviceArray:
    """`shape` and `strides` (bytes) as of a NumPy array whose first element lies at `address`; keeps its memory alive."""

    __slots__ = ("address", "dtype", "memory", "shape", "strides")

    def __init__(self, memory: Memory, address: int, shape: tuple[int, ...], dtype, strides: tuple[int, ...] | None = None):
        self.memory, self.address, self.shape, self.dtype = memory, address, tuple(shape), np.dtype(dtype)
        self.strides = strides or _strides(self.shape, self.dtype.itemsize)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def contiguous(self) -> bool:
        wanted = _strides(self.shape, self.itemsize)
        return all(n == 1 or have == want for n, have, want in zip(self.shape, self.strides, wanted, strict=True))

    @property
    def span(self) -> tuple[int, int]:
        """The first byte of the elements and the one behind the last, with the gaps between them."""
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return self.address, self.address + last + self.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> "DeviceArray":
        """A view, for integers and for slices without a step."""
        index = index if isinstance(index, tuple) else (index,)
        address, shape, strides = self.address, [], []
        for axis, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            part = index[axis] if axis < len(index) else slice(None)
            if isinstance(part, slice):
                first, end, step = part.indices(n)
                assert step == 1
                shape.append(max(end - first, 0))
                strides.append(stride)
            else:
                first = range(n)[part]
            address += first * stride
        return DeviceArray(self.memory, address, tuple(shape), self.dtype, tuple(strides))

    def reshape(self, *shape) -> "DeviceArray":
        """The same elements, which must be contiguous, as another shape; one axis may be -1."""
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        if -1 in shape:
            shape = tuple(self.size // -math.prod(shape) if n == -1 else n for n in shape)
        assert self.contiguous and math.prod(shape) == self.size
        return DeviceArray(self.memory, self.address, shape, self.dtype)


def _strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
