"""What a GPU lacks is said on one line, with what mends it: tried with a CuPy that is only as whole as a case says."""

import builtins
import sys
from inspect import signature
from types import SimpleNamespace

import pytest

from rgpu.errors import DeviceError
from rgpu.ops import cupy_device, device
from rgpu.ops.cupy_device import CupyDevice
from tests import cuda_sim


@pytest.mark.parametrize("part", ["Device", "Stream", "Event", "Module"])
def test_the_interface_is_kept(part):
    """The two devices have every method of the interface, with its parameters."""
    wanted = getattr(device, part)
    for found in (getattr(cupy_device, f"Cupy{part}"), getattr(cuda_sim.device, f"Sim{part}")):
        for name in (name for name in vars(wanted) if not name.startswith("_")):
            ours, theirs = ([*signature(getattr(which, name)).parameters] for which in (found, wanted))
            assert ours == theirs, f"{found.__name__}.{name}"


class CudaError(RuntimeError):
    def __init__(self, status):
        super().__init__(f"cudaError{status}")
        self.status = status


def raising(error):
    def call(*arguments):
        raise error

    return call


def cupy(monkeypatch, **changes):
    """Install a CuPy of which `changes` are different from a good one, but which ends before there is a device."""
    runtime = {
        "is_hip": False, "runtimeGetVersion": lambda: 12090, "driverGetVersion": lambda: 12040, "getDeviceCount": lambda: 1,
        "free": lambda address: None,
        "getDeviceProperties": lambda i: {
            "name": b"GPU", "major": 8, "minor": 9, "multiProcessorCount": 24, "sharedMemPerBlockOptin": 101376
        },
    }  # fmt: skip
    nvrtc = {"getVersion": lambda: (12, 9), "getSupportedArchs": lambda: (61, 75, 89, 120)}
    for name, change in changes.items():
        next(part for part in (runtime, nvrtc) if name in part)[name] = change
    cuda = SimpleNamespace(runtime=SimpleNamespace(**runtime), nvrtc=SimpleNamespace(**nvrtc))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, __version__="14.2.0"))


def of(major, minor):
    properties = {"name": b"GPU", "major": major, "minor": minor, "multiProcessorCount": 24, "sharedMemPerBlockOptin": 49152}
    return lambda i: properties


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"is_hip": True}, "built for ROCm: pip uninstall it, then pip install 'cupy-cuda12x[ctk]'"),
        ({"runtimeGetVersion": lambda: 11080}, "CuPy 14.2.0 for CUDA 11.8 is too old: pip uninstall it, then pip install"),
        ({"driverGetVersion": lambda: 0}, "no NVIDIA driver: install it"),
        ({"driverGetVersion": lambda: 11040}, "driver is for CUDA 11.4, CuPy for CUDA 12.9: install a newer driver"),
        (
            {"runtimeGetVersion": lambda: 13000},
            "CUDA 12.4, CuPy for CUDA 13.0: install a newer driver, or pip uninstall cupy-cuda13x and pip install 'cupy-cuda12x",
        ),
        ({"getDeviceCount": raising(CudaError(100))}, "shows no GPU: try nvidia-smi, and unset CUDA_VISIBLE_DEVICES"),
        ({"getDeviceCount": lambda: 0}, "shows no GPU"),
        ({"getDeviceCount": raising(CudaError(999))}, "CUDA does not start (cudaError999): try nvidia-smi, then restart"),
        ({"getVersion": raising(RuntimeError("libnvrtc.so.12"))}, "NVRTC, is missing: pip install -U 'cupy-cuda12x[ctk]'"),
        ({"getDeviceProperties": of(5, 2)}, "compute capability 5.2, 6.1 is needed: use --device cpu"),
        ({"getDeviceProperties": of(13, 0)}, "not compile for this GPU, sm_130: pip uninstall cupy-cuda12x, then pip install -U"),
        ({"getSupportedArchs": lambda: (90, 100)}, "for this GPU, sm_89: pip install -U 'cupy-cuda12x[ctk]'"),
        ({"free": raising(CudaError(2))}, "CUDA does not start: cudaError2"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, changes, said):
    cupy(monkeypatch, **changes)
    with pytest.raises(Exception) as error:
        CupyDevice()
    assert error.type.__module__ == "rgpu.errors"
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "raised, said",
    [
        (ModuleNotFoundError(name="cupy"), "the Python package cupy is not installed: pip install 'cupy-cuda12x[ctk]'"),
        (ModuleNotFoundError(name="fastrlock"), "the Python package fastrlock is not installed: pip install fastrlock"),
        (ImportError("\n====\nCuPy failed.\n\nlibcudart: no such file\n====\n"), "does not start (libcudart: no such file): pip"),
    ],
)
def test_a_cupy_that_cannot_be_imported(monkeypatch, raised, said):
    real = builtins.__import__

    def broken(name, *arguments, **more):
        if name == "cupy":
            raise raised
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(DeviceError) as error:
        CupyDevice()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_good_one_is_taken(monkeypatch):
    cupy(monkeypatch)
    device = CupyDevice()
    assert device.capability == (8, 9) and device.name == "GPU" and device.shared_per_block == 99 << 10
