"""A CUDA device on the host: kernels' own text compiled with g++ and run thread by thread, with faults and missing order shown.

`SimDevice` (device.py) implements rgpu/ops/device.py. build.py compiles a text behind cuda_sim.h; processor.cpp runs it and
faults.cpp reports; streams.py keeps what depends on what, schedule.py decides when it is done; memory.py owns the addresses.
Needs Linux and g++.
"""

from .device import SimDevice

__all__ = ["SimDevice"]
