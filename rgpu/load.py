"""A file becomes a bound model on a backend: every tensor found, checked and handed over; every problem reported at once."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from .errors import UnsupportedModel
from .gguf import names
from .gguf.direct import DirectFiles
from .gguf.layout import ExpertMatrix, ExpertTensors, find_experts
from .gguf.reader import GGUFFile
from .models import for_gguf
from .models.base import HParams, Layer, Model, T, misfits
from .ops import Array, Bank, Needs, Ops, Slots, Weight
from .quants import TYPES
from .residency.arena import SlotArena
from .residency.budget import slots_within
from .residency.cached import CachedExperts
from .residency.experts import MappedExperts
from .residency.policy import POLICIES
from .residency.readahead import PageCache, ReadAhead, supported
from .residency.store import Store, size_classes

MB = 10**6


@dataclass
class Found:
    """What a file holds of its architecture, checked, before anything is read."""

    model: type[Model]
    hp: HParams
    dense: list[T]
    names: dict[str, str]  # of the dense tensors in the table -> in the file
    experts: list[ExpertTensors]
    types: dict[str, frozenset[str]]  # names of the types in use, by the fields of Needs

    def needs(self, n_tokens: int, kv: str) -> Needs:
        """What a backend must be prepared for, with chunks of `n_tokens` and a KV cache of type `kv`."""
        hp = self.hp
        recurrent = any(self.model.layer_kind(hp, i) == "recurrent" for i in range(hp.n_layer))
        heads = {"recurrent": self.model.recurrent_shapes(hp)["delta"][1] if recurrent else 0, "n_embd_head": hp.n_embd_head_k}
        sizes = dict(n_expert=hp.n_expert, n_expert_used=hp.n_expert_used, n_embd=hp.n_embd, n_ff_exp=hp.n_ff_exp)
        return Needs(n_tokens=n_tokens, kv=kv, **heads, **sizes, **self.types)


@dataclass
class Bound:
    """A model but for its experts' arrangement, and where these lie: in the mapped file, or in the backend's memory."""

    model: Model
    banks: list[Bank]


def inspect(file: GGUFFile) -> Found:
    """Find all that an architecture needs. UnsupportedModel names what is missing, misshapen, unknown or of an unknown type."""
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise UnsupportedModel("no general.architecture: this is not a model (a vocabulary or projector file?)")
    cls = for_gguf(arch)
    if "token_embd.weight" not in file.tensors:
        raise UnsupportedModel("no token_embd.weight: the file holds no weights (only a vocabulary?)")
    hp = cls.hparams(file.metadata, file.tensors["token_embd.weight"].shape[0])
    if hp.n_layer > len(file.tensors):
        raise UnsupportedModel(f"the file claims {hp.n_layer} layers, but holds {len(file.tensors)} tensors")
    table = [t for t in cls.tensors(hp) if not t.mtp]
    dense = [t for t in table if not t.experts]
    problems = [*_settings(file, arch), *misfits(dense, {name: info.shape for name, info in file.tensors.items()})]
    experts = _experts(file, hp, problems)
    problems += _strangers(file, table, hp)
    stored = {t.name: t.name if t.name in file.tensors else t.alias for t in dense}
    dense = [t for t in dense if stored[t.name] in file.tensors]  # without the optional ones that are absent
    types = {stored[t.name]: file.tensors[stored[t.name]].quant for t in dense}
    parts = [(f"{kind} of the experts of layer {i}", m.quant) for i, e in enumerate(experts) for kind, m in e._asdict().items()]
    problems += _types_beyond(types | dict(parts))
    if problems:
        more = f" … and {len(problems) - 8} more" if len(problems) > 8 else ""
        plural = "problem" if len(problems) == 1 else "problems"
        raise UnsupportedModel(f"does not fit {arch}, {len(problems)} {plural}: " + "; ".join(problems[:8]) + more)

    embeddings = "token_embd.weight"
    tied = "output.weight" not in {t.name for t in dense}
    used = {
        "matrices": frozenset(types[stored[t.name]] for t in dense if t.is_matrix and (tied or t.name != embeddings)),
        "embeddings": frozenset([types[embeddings]]),
        "experts": frozenset(quant for _, quant in parts),
        "gate_up": frozenset((e.gate.quant, e.up.quant) for e in experts),
        "down": frozenset(e.down.quant for e in experts),
    }
    return Found(cls, hp, dense, stored, experts, used)


def bind(file: GGUFFile, found: Found, ops: Ops, direct: DirectFiles | None = None, progress: Callable | None = None) -> Bound:
    """Hand the weights to a backend: as they are mapped where it reads host memory, else copied, with `progress` in MB.

    Dense weights may be read through `direct` into memory instead.
    """
    total = sum(info.nbytes for info in file.tensors.values())
    moved = _Moved(progress if not ops.reads_host_memory else None, total)
    tensors = {}
    for t in found.dense:
        tensors[t.name] = _tensor(file, found.names[t.name], ops, t, direct)
        moved.add(file.tensors[found.names[t.name]].nbytes)
    layers = [Layer(i, found.model.layer_kind(found.hp, i), _own(tensors, i)) for i in range(found.hp.n_layer)]
    banks = []
    for experts in found.experts:
        banks.append(_bank(file, ops, experts))
        moved.add(sum(m.nbytes * len(m.offset) for m in experts))
    moved.add(total)
    return Bound(found.model(found.hp, tensors, layers), banks)


class _Moved:
    """Tells how much has been copied, in MB."""

    def __init__(self, progress: Callable[[int, int, str], None] | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def add(self, nbytes: int) -> None:
        self.done = min(self.done + nbytes, self.total)
        if self.progress:
            self.progress(self.done // MB, self.total // MB, "loading weights, MB")


def mapped(file: GGUFFile, ops: Ops, bound: Bound, n_batch: int) -> MappedExperts:
    """The experts where the file has them, for chunks of up to `n_batch` tokens."""
    hp = bound.model.hp
    boxes = ops.empty((hp.n_layer, 2 + n_batch * hp.n_expert_used), np.int32)
    return MappedExperts(ops, file, bound.banks, hp.n_expert, boxes, _readahead(file, ops, boxes, bound.banks, bound.model))


def cached(ops: Ops, bound: Bound, n_batch: int, direct: DirectFiles, policy: str, available: int, cap: int) -> CachedExperts:
    """Some experts in `available` bytes of slots, for chunks of up to `n_batch` tokens, with the whole process below `cap`.

    OutOfMemory if these are too few.
    """
    hp = bound.model.hp
    class_of, nbytes = size_classes(bound.banks)
    counts, spare = slots_within(available, class_of, nbytes, hp.n_expert, hp.n_expert_used)
    arena = SlotArena(hp.n_layer, hp.n_expert, class_of, counts, hp.n_expert_used + 2, spare)
    store = Store(direct, bound.banks, class_of, nbytes, counts)
    return CachedExperts(ops, store, arena, POLICIES[policy](hp.n_layer, hp.n_expert), n_batch, hp.n_expert_used, cap)


def _own(bound: dict, index: int) -> dict:
    """The tensors of one block under their short names: blk.3.attn_q.weight -> attn_q, blk.0.ssm_dt.bias -> ssm_dt_bias."""
    prefix = f"blk.{index}."
    mine = {name.removeprefix(prefix): value for name, value in bound.items() if name.startswith(prefix)}
    return {name.removesuffix(".weight").replace(".", "_"): value for name, value in mine.items()}


def _tensor(file: GGUFFile, name: str, ops: Ops, t: T, direct: DirectFiles | None):
    """A matrix stays in its stored type; everything else becomes float32 values of the table's shape."""
    info = file.tensors[name]
    quant = TYPES[info.quant]
    stored = direct.bytes(info) if direct else file.bytes(name)
    if t.is_matrix:
        return Weight(quant, t.shape, ops.upload(stored))
    return ops.upload(quant.dequantize(stored.reshape(-1, quant.nbytes)).reshape(t.shape).astype(np.float32))


def _bank(file: GGUFFile, ops: Ops, experts: ExpertTensors) -> Bank:
    """A layer's experts where the mapped shards have them, or in memory of the backend."""
    if not ops.reads_host_memory:
        return Bank(*(_uploaded(file, ops, m) for m in experts))
    shards = tuple(ops.upload(file.mapping(i)) for i in range(len(file.paths)))
    return Bank(*(Slots(TYPES[m.quant], m.shape, shards, m.shard, m.offset) for m in experts))


def _uploaded(file: GGUFFile, ops: Ops, matrices: ExpertMatrix) -> Slots:
    """Matrices of all experts, one behind the other in memory of the backend."""
    n, size = len(matrices.offset), matrices.nbytes
    offset = np.arange(n, dtype=np.int64) * (-(-size // 16) * 16)
    memory = ops.empty((int(offset[-1]) + size,), np.uint8)
    for place, shard, start in zip(offset.tolist(), matrices.shard.tolist(), matrices.offset.tolist(), strict=True):
        ops.write(memory[place : place + size], file.mapping(shard)[start : start + size])
    return Slots(TYPES[matrices.quant], matrices.shape, (memory,), np.zeros(n, np.int64), offset)


def _readahead(file: GGUFFile, ops: Ops, boxes: Array, banks: list[Bank], model: Model) -> AbstractContextManager:
    """Requests for what a forward will read; none where the system takes none, or all is in another memory."""
    if not (supported() and ops.reads_host_memory):
        return nullcontext()
    matrices = [[w for w in layer.tensors.values() if isinstance(w, Weight)] for layer in model.layers]
    dense = [[(w.address, w.data.nbytes) for w in each] for each in (*matrices, [model.output])]
    return ReadAhead(PageCache(file.paths), boxes, banks, dense)


# ---- what can be wrong with a file: each of these adds texts to one list ----


def _experts(file: GGUFFile, hp: HParams, problems: list[str]) -> list[ExpertTensors]:
    """Where every layer's experts lie, checked against the model's sizes."""
    found = []
    for layer in range(hp.n_layer):
        try:
            found.append(find_experts(file, layer, hp.n_expert))
        except UnsupportedModel as error:
            problems.append(str(error))
            continue
        shape, needed = found[-1].gate.shape, (hp.n_ff_exp, hp.n_embd)
        if shape != needed:
            problems.append(f"experts of layer {layer} are {list(shape)}, needs {list(needed)}")
    return found


def _types_beyond(types: dict[str, str]) -> list[str]:
    """`types`: what is to be computed with -> its type's name."""
    unknown = [what for what, quant in types.items() if quant not in TYPES]
    if not unknown:
        return []
    found = ", ".join(sorted({types[what] for what in unknown}))
    return [f"{len(unknown)} tensors are of type {found} (first: {unknown[0]}); supported: {', '.join(TYPES)}"]


def _settings(file: GGUFFile, arch: str) -> list[str]:
    """Keys that would change the result and are not computed."""
    plain = {
        "rope.scaling.type": ("none",), "rope.scaling.factor": (0, 1), "rope.scale_linear": (0, 1),
        "expert_weights_scale": (0, 1), "expert_weights_norm": (True,),
    }  # fmt: skip
    found = {f"{arch}.{key}": values for key, values in plain.items() if f"{arch}.{key}" in file.metadata}
    return [f"{key} = {file.metadata[key]!r} is not computed" for key, ok in found.items() if file.metadata[key] not in ok]


def _strangers(file: GGUFFile, table: list[T], hp: HParams) -> list[str]:
    """Tensors that the architecture does not know: a bias left out gives wrong answers without an error.

    Parts of other models in the same file (vision, a projector) and the blocks of multi-token prediction are left alone.
    """
    known = {name for t in table for name in (t.name, t.alias)}
    strangers = []
    for name in file.tensors:
        block = names.parse_block(name)
        beyond = name.startswith(("v.", "mm.", "mtp.")) or (block and hp.n_layer <= block[0] < hp.n_layer + hp.n_layer_nextn)
        if name not in known and not beyond and not names.is_expert(name):
            strangers.append(name)
    return [f"{name} is not known" for name in strangers]
