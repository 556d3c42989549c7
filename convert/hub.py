"""A checkpoint's tensors and configuration, matched with an architecture's table: what becomes which GGUF tensor, and how.

Owns names, prefixes and both layouts of experts in checkpoints, and the report of all that does not fit. The table itself
is in rgpu/models, reading safetensors in checkpoint.py.
"""

import math
import sys
from pathlib import Path

import numpy as np

from rgpu.errors import ConvertError
from rgpu.gguf.mix import Mix, file_type
from rgpu.models import for_hub
from rgpu.models.base import HParams, T

from .checkpoint import Checkpoint
from .general import QUANTIZATION_VERSION, general_pairs
from .values import Values, entry, write_records
from .vocab import metadata_from_hub
from .writer import Pairs, Target, encode, size_text

PREFIXES = ("model.language_model.", "model.", "language_model.model.", "")
UNPREFIXED = ("mtp.", "lm_head")
VISION = ("visual.", "vision_tower.", "vision_model.")
IGNORED = ("rotary_emb.inv_freq",)  # computed from the configuration
PROBLEMS = 8  # told by name; the rest as a number


def to_per_expert(folder: Path, out: Path, mix: str, *, force: bool, threads: int, mtp: bool = True) -> None:
    """Converts a hub folder to `out`, quantised by the rules of `mix`; raises RgpuError."""
    checkpoint = Checkpoint(folder)
    config, notes = text_config(checkpoint, mtp)
    hp, metadata, table = _architecture(checkpoint, config)
    values = match(checkpoint, hp, table, bool(config["tie_word_embeddings"]))
    choose = Mix(mix, hp.n_layer + hp.n_layer_nextn, hp.n_expert, hp.n_head, hp.n_head_kv, list(values)).choose
    stock = [entry(name, found.shape, choose(name, found.shape)) for name, found in values.items()]
    pairs = [
        *general_pairs(folder, hp.arch, stock),
        *_encoded(metadata),
        ("general.file_type", encode(np.uint32(file_type(mix)))),
        ("general.quantization_version", encode(np.uint32(QUANTIZATION_VERSION))),
        *_encoded(metadata_from_hub(folder, hp.n_vocab)),
    ]
    for note in notes:
        print(note, file=sys.stderr)
    with Target(out, force=force, sources=checkpoint.paths) as target:
        write_records(target, pairs, stock, values, threads)


def _encoded(metadata: dict) -> Pairs:
    return [(key, encode(value)) for key, value in metadata.items()]


def text_config(checkpoint: Checkpoint, mtp: bool) -> tuple[dict, list[str]]:
    """The text model's configuration, without an MTP block that is not wanted or not there; and what is left out, in words."""
    outer = checkpoint.config
    inner = outer.get("text_config") or {}
    if not isinstance(inner, dict):
        raise ConvertError(f"{checkpoint.folder / 'config.json'}: text_config should be an object, found {type(inner).__name__}")
    config = {"tie_word_embeddings": False, **outer, **inner}
    notes = []
    vision = [t for t in checkpoint.tensors.values() if _is_vision(t.name)]
    if vision:
        size = size_text(sum(t.nbytes for t in vision))
        notes.append(f"skipped the vision tower: {len(vision)} tensors, {size} (the GGUF holds the text model)")
    n_mtp = sum(name.startswith("mtp.") for name in checkpoint.tensors)
    wanted = config.get("mtp_num_hidden_layers") or 0
    if not (mtp and n_mtp and wanted):
        config["mtp_num_hidden_layers"] = 0
        if n_mtp:
            notes.append(f"skipped the multi-token-prediction block: {n_mtp} tensors")
        elif wanted and mtp:
            notes.append("the configuration has a multi-token-prediction block, the checkpoint does not: converted without")
    return config, notes


def _is_vision(name: str) -> bool:
    return any(name.startswith(part) or f".{part}" in name for part in VISION)


def _architecture(checkpoint: Checkpoint, config: dict) -> tuple[HParams, dict, list[T]]:
    """Hyperparameters, GGUF metadata and tensor table that config.json asks for."""
    path = checkpoint.folder / "config.json"
    model_type = checkpoint.config.get("model_type")
    model = for_hub(str(model_type))
    try:
        n_blocks = config["num_hidden_layers"] + config["mtp_num_hidden_layers"]
        if not 0 < n_blocks <= len(checkpoint.tensors):
            raise ConvertError(f"{path}: {n_blocks} layers can't be in a checkpoint of {len(checkpoint.tensors)} tensors")
        metadata = model.metadata_from_hub(config)
        hp = model.hparams(metadata, config["vocab_size"])
        return hp, metadata, model.tensors(hp)
    except KeyError as error:
        raise ConvertError(f"{path} has no {error.args[0]}, which {model_type} needs") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise ConvertError(f"{path} has an unusable value: {error}") from error


def match(checkpoint: Checkpoint, hp: HParams, table: list[T], tied: bool) -> dict[str, Values]:
    """Values of every tensor of the table by GGUF name, in the checkpoint's order; ConvertError tells all that is wrong."""
    present = checkpoint.tensors
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in present), "model.")
    order = {name: i for i, name in enumerate(present)}
    problems, found, used = [], [], set()
    for t in table:
        if tied and t.name == "output.weight":
            used.add(t.hub)
            continue
        hub = t.hub if t.hub.startswith(UNPREFIXED) else prefix + t.hub
        names, misfits = _sources(t, hub, present)
        # An output matrix may be absent only if the configuration ties it to the embeddings.
        if not names and t.optional and t.name != "output.weight":
            continue
        problems += misfits
        used.update(names)
        if not misfits:
            found.append((max(order[name] for name in names), t, names))
    problems += [
        f"{name} {list(tensor.shape)} is not known to {hp.arch}"
        for name, tensor in present.items()
        if name not in used and not (_is_vision(name) or name.startswith("mtp.") or name.endswith(IGNORED))
    ]
    if problems:
        raise ConvertError(f"{len(problems)} tensors of {checkpoint.folder} do not fit {hp.arch}: " + _capped(problems))
    found.sort(key=lambda each: each[0])
    return {t.name: _values(checkpoint, t, names) for _, t, names in found}


def _capped(problems: list[str]) -> str:
    more = f"; … and {len(problems) - PROBLEMS} more" if len(problems) > PROBLEMS else ""
    return "; ".join(problems[:PROBLEMS]) + more


def _sources(t: T, hub: str, present: dict) -> tuple[list[str], list[str]]:
    """The checkpoint's tensors that make up one of the table, and what is wrong with them."""
    if not t.experts:
        needed = {hub: t.shape}
    else:
        n_expert, rows, columns = t.shape
        stack = f"{hub}.down_proj" if t.experts == "down" else f"{hub}.gate_up_proj"
        single = f"{hub}.0.{t.experts}_proj.weight"
        if stack in present or single not in present:
            needed = {stack: (n_expert, rows if t.experts == "down" else 2 * rows, columns)}
        elif n_expert > len(present):
            return [], [f"{single} and its like: {n_expert} experts can't be in a checkpoint of {len(present)} tensors"]
        else:
            needed = {f"{hub}.{e}.{t.experts}_proj.weight": (rows, columns) for e in range(n_expert)}
    misfits = []
    for name, shape in needed.items():
        if name not in present:
            misfits.append(f"{name} is missing (needs {list(shape)})")
        elif not _fits(present[name].shape, shape):
            misfits.append(f"{name} is {list(present[name].shape)}, needs {list(shape)}")
    return [name for name in needed if name in present], misfits


def _fits(found: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    """Equal but for axes of length 1; a transposed convolution (MLX's [channels, taps, 1]) is not the same."""
    if found == needed:
        return True
    swapped = len(found) > len(needed) and found[-1] == 1 and needed[-1] != 1
    return [n for n in found if n != 1] == [n for n in needed if n != 1] and not swapped


def _values(checkpoint: Checkpoint, t: T, names: list[str]) -> Values:
    """How the values of `t` are read from the checkpoint's tensors `names`."""

    def release():
        for name in names:
            checkpoint.release(name)

    if len(names) > 1:  # one tensor per expert

        def read(first, last):
            return np.stack([checkpoint.read(name) for name in names[first:last]])

        return Values(t.shape, read, release)
    name = names[0]
    if t.experts:
        n_rows = t.shape[1]
        rows = slice(n_rows, None) if t.experts == "up" else slice(0, n_rows)
        return Values(t.shape, lambda first, last: checkpoint.read(name, (slice(first, last), rows)), release)
    if t.to_gguf is None and checkpoint.tensors[name].shape == t.shape:
        return Values(t.shape, lambda first, last: checkpoint.read(name, slice(first, last)), release)

    def read_whole(first, last):
        x = checkpoint.read(name)
        if t.to_gguf is not None:
            # Vectors in double: NumPy's exp(A_log) in single precision is often one digit off what llama.cpp writes.
            try:
                x = t.to_gguf(x.astype(np.float64) if x.ndim == 1 else x)
            except ValueError as error:
                raise ConvertError(f"{name} {list(x.shape)} does not fit the heads that config.json tells: {error}") from error
        assert x.size == math.prod(t.shape), (t.name, x.shape)
        return x.reshape(t.shape).astype(np.float32, copy=False)

    return Values(t.shape, read_whole, release, whole=True)
