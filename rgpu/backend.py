"""Which backend runs a model: the one that was asked for, or for "auto" a GPU that it fits, else the CPU; and why."""

import os
import shutil

from .cache import cache_dir
from .errors import DeviceError, OutOfMemory, RgpuError
from .gguf.reader import GGUFFile
from .ops import Ops
from .shapes import from_gguf
from .sizes import text

SPARE = 1 << 29  # bytes of VRAM beside weights and cache: activations of a chunk of a prompt, and what others take later


def choose(device: str, threads: int | None, file: GGUFFile, kv: tuple[str, int], capped: bool) -> tuple[Ops, str]:
    """The backend for "auto", "cuda", "cpu" or "reference", and in a few words why.

    `kv`: type and tokens of the cache; `capped`: experts are to be kept in RAM. Raises DeviceError, OutOfMemory, RgpuError.
    """
    if device == "reference":
        from .ops.reference import ReferenceOps

        return ReferenceOps(threads), "asked for"
    if device == "cuda" and capped:
        raise RgpuError("ram is a cap for the CPU's memory, where experts are kept in slots: leave it out, or take device cpu")
    why = "asked for" if device == "cpu" else "experts are kept in RAM"
    if device == "cuda" or (device == "auto" and not capped):
        try:
            return _cuda(file, kv)
        except (DeviceError, OutOfMemory) as error:
            if device == "cuda":
                raise
            why = str(error)
    from .ops.cpu import CpuOps

    return CpuOps(threads), why


def _cuda(file: GGUFFile, kv: tuple[str, int]) -> tuple[Ops, str]:
    from .ops.cuda import CudaOps
    from .ops.cupy_device import CupyDevice

    gpu = CupyDevice(cache_dir() / "cuda")
    shape, (free, _) = from_gguf(file), gpu.memory()
    needed = sum(info.nbytes for info in file.tensors.values()) + shape.kv(kv[1], kv[0]) + shape.state + SPARE
    if needed > free:
        gpu.close()
        found = f"the model needs {text(needed)} of VRAM, and {text(free)} are free on the {gpu.name}"
        raise OutOfMemory(f"{found}: use --device cpu")
    return CudaOps(gpu), gpu.name


def has_gpu() -> bool:
    """Whether there seems to be an NVIDIA GPU, so that not using it is worth a word."""
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None
