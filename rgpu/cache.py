"""Where rgpu keeps what it makes on this machine: compiled kernels, the chat's history."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`RGPU_CACHE_DIR`, or `rgpu` in the user's cache directory (XDG_CACHE_HOME, else ~/.cache). Not created here."""
    if root := os.environ.get("RGPU_CACHE_DIR"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rgpu"
