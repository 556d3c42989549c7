"""rgpu: a GGUF-native engine that runs large Mixture-of-Experts language models on small GPUs, in Python.

`from rgpu import Engine, SamplingParams`. Importing this touches no device and loads nothing heavy.
"""

from importlib import import_module

__version__ = "0.1.0"
_HOMES = {
    "Engine": "engine",
    "EngineConfig": "engine",
    "Piece": "session",
    "RgpuError": "errors",
    "SamplingParams": "sampler",
    "Session": "session",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'rgpu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
