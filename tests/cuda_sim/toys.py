"""Toy kernels, and a bench to run them on: arrays go in, what a kernel wrote comes out."""

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
COMMON = (HERE.parents[1] / "rgpu" / "kernels" / "common.cuh").read_text()


def text(name: str) -> str:
    """The text of a file of toys, behind common.cuh."""
    return f'{COMMON}\n#line 1 "{name}"\n{(HERE / name).read_text()}'


class Bench:
    """A device, a stream and the kernels of a text."""

    def __init__(self, device, source: str):
        self.device, self.stream = device, device.stream()
        self.module = device.load(source)

    def put(self, array: np.ndarray) -> int:
        """The address of a copy of an array."""
        array = np.ascontiguousarray(array)
        address = self.device.allocate(array.nbytes)
        self.stream.upload(address, array)
        return address

    def get(self, address: int, shape, dtype) -> np.ndarray:
        array = np.empty(shape, dtype)
        self.stream.download(array, address)
        return array

    def launch(self, name: str, grid: int, block: int, *arguments, shared: int = 0) -> None:
        self.stream.launch(self.module.kernel(name), (grid,), (block,), arguments, shared)

    def run(self, name: str, out: tuple, *arguments, grid=(1,), block=(32,), shared=0) -> np.ndarray:
        """What a kernel writes to its first parameter, `out` = (shape, dtype). Arrays among the others are uploaded."""
        address = self.device.allocate(np.empty(*out).nbytes)
        arguments = [self.put(a) if isinstance(a, np.ndarray) else a for a in arguments]
        self.stream.launch(self.module.kernel(name), grid, block, [address, *arguments], shared)
        return self.get(address, *out)
