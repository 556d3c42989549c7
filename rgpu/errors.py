"""What can go wrong with files, devices and requests, as one family of exceptions.

A command prints the message on one line and exits 1; a message says what was found, what was needed and what to change.
Broken invariants of our own are `assert`s, never these.
"""

import os
import traceback


def line(error: BaseException) -> str:
    """What a command prints for an error: one line, behind the traceback if RGPU_DEBUG=1."""
    debug = "".join(traceback.format_exception(error)) if os.environ.get("RGPU_DEBUG") == "1" else ""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{debug}error: {' '.join(text.split())}"


class RgpuError(Exception):
    """Base of every error that a user can cause or mend."""


class GGUFError(RgpuError):
    """A GGUF file is truncated, contradicts itself or holds what the format does not allow."""


class UnsupportedModel(RgpuError):
    """A well-formed file whose architecture, tensors or types this engine does not run."""


class TokenizerError(RgpuError):
    """The vocabulary in the file is missing, inconsistent or of an unknown kind."""


class TemplateError(RgpuError):
    """The chat template is missing, broken, refuses the conversation or tries to leave its sandbox."""


class ConvertError(RgpuError):
    """A checkpoint cannot be converted: not a model folder, a shard missing, a disk full, a target that exists."""


class ContextFull(RgpuError):
    """The conversation does not fit the context that was allocated."""


class OutOfMemory(RgpuError):
    """Memory for weights, state or workspace cannot be had."""


class DeviceError(RgpuError):
    """The device is missing, unsuitable or failed."""
