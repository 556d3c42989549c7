"""What a machine has learned about a model: each expert's score, and the rates that runs have measured. Kept in the cache.

A profile makes the next start warm and may be lost at any time: one that does not fit is ignored, with a notice to be shown.
The file is a checksum, a line of JSON and the scores.
"""

import contextlib
import hashlib
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..cache import cache_dir
from ..gguf.reader import GGUFFile

VERSION = 1


@dataclass
class Profile:
    """Of the model whose file has this `digest`, on the machine of this name."""

    model: str
    machine: str
    scores: np.ndarray  # float32 [n_layer * n_expert], what a policy keeps
    rates: dict[str, float] = field(default_factory=dict)  # by the fields of Machine


def digest(file: GGUFFile) -> str:
    """Tells models apart by what precedes their weights: metadata and tensor directory, of every shard."""
    total = hashlib.blake2b(digest_size=16)
    for shard in range(len(file.paths)):
        mapping = file.mapping(shard)
        begin = min((info.offset for info in file.tensors.values() if info.shard == shard), default=len(mapping))
        total.update(len(mapping).to_bytes(8, "little"))
        total.update(mapping[:begin])
    return total.hexdigest()


def path(model: str, machine: str) -> Path:
    """Where the profile of a model on a machine is kept."""
    return cache_dir() / "profiles" / f"{model}-{zlib.crc32(machine.encode()):08x}"


def save(profile: Profile) -> None:
    """Replace the profile that is kept, wholly or not at all. Raises OSError."""
    head = {"version": VERSION, "model": profile.model, "machine": profile.machine, "rates": profile.rates}
    content = json.dumps(head).encode() + b"\n" + profile.scores.astype("<f4").tobytes()
    target = path(profile.model, profile.machine)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(f".{os.getpid()}")
    try:
        beside.write_bytes(b"%08x\n" % zlib.crc32(content) + content)
        os.replace(beside, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()


def load(model: str, machine: str, n_keys: int) -> tuple[Profile | None, str]:
    """The profile that is kept, with `n_keys` scores; or None and the notice that says why it is ignored, "" if there is none."""
    file = path(model, machine)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, _notice(file, f"cannot be read: {error.strerror}")
    checksum, _, content = content.partition(b"\n")
    if checksum != b"%08x" % zlib.crc32(content):
        return None, _notice(file, "is damaged")
    line, _, scores = content.partition(b"\n")
    head = json.loads(line)
    if head["version"] != VERSION:
        return None, _notice(file, f"is of version {head['version']}, and this is {VERSION}")
    profile = Profile(head["model"], head["machine"], np.frombuffer(scores, "<f4").astype(np.float32), head["rates"])
    if (profile.model, profile.machine, len(profile.scores)) != (model, machine, n_keys):
        return None, _notice(file, f"is of another model or machine ({profile.machine}, {len(profile.scores)} experts)")
    return profile, ""


def _notice(file: Path, fault: str) -> str:
    return f"what was learned of this model is not used: {file} {fault}; it will be learned again"
