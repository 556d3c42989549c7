"""A file becomes a bound model on a backend: every tensor found, checked and handed over; every problem reported at once."""

from dataclasses import dataclass

import numpy as np

from .errors import UnsupportedModel
from .gguf.layout import ExpertTensors, find_experts
from .gguf.reader import GGUFFile
from .models import for_gguf
from .models.base import HParams, Layer, Model, T, check
from .ops import Bank, Needs, Ops, Slots, Weight
from .quants import TYPES
from .residency.experts import MappedExperts


@dataclass
class Bound:
    """A model ready to run, and what a backend must be prepared for."""

    model: Model
    experts: MappedExperts
    types: dict[str, frozenset[str]]  # "matrices", "embeddings", "experts": names of the types in use


def bind(file: GGUFFile, ops: Ops) -> Bound:
    """Bind a GGUF to its architecture; UnsupportedModel names all that is missing, misshapen or of an unknown type."""
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise UnsupportedModel(f"{file.path} has no general.architecture: it is not a model (a vocabulary or projector file?)")
    cls = for_gguf(arch)
    if "token_embd.weight" not in file.tensors:
        raise UnsupportedModel(f"{file.path} has no token_embd.weight: it holds no weights (only a vocabulary?)")
    _check_rope(file, arch)
    hp = cls.hparams(file.metadata, file.tensors["token_embd.weight"].shape[0])
    table = [t for t in cls.tensors(hp) if not t.mtp]
    dense = [t for t in table if not t.experts]
    check(dense, {name: info.shape for name, info in file.tensors.items()}, arch)
    stored = {t.name: t.name if t.name in file.tensors else t.alias for t in dense}
    dense = [t for t in dense if stored[t.name] in file.tensors]  # without the optional ones that are absent
    experts = _experts(file, hp)
    types = {stored[t.name]: file.tensors[stored[t.name]].quant for t in dense}
    types |= {f"{kind} of the experts of layer {i}": m.quant for i, e in enumerate(experts) for kind, m in e._asdict().items()}
    _check_types(types)

    bound = {t.name: _tensor(file, stored[t.name], ops, t) for t in dense}
    layers = [Layer(i, cls.layer_kind(hp, i), _own(bound, i)) for i in range(hp.n_layer)]
    model = cls(hp, bound, layers)
    banks = [_bank(file, ops, layer) for layer in experts]
    matrices = [w for layer in layers for w in layer.tensors.values() if isinstance(w, Weight)]
    used = {
        "matrices": _types([*matrices, model.output]),
        "embeddings": _types([model.token_embd]),
        "experts": _types([part for bank in banks for part in bank]),
    }
    return Bound(model, MappedExperts(ops, banks, hp.n_expert), used)


def needs(bound: Bound, n_tokens: int, kv: str) -> Needs:
    """What a backend must be prepared for to run this model with chunks of `n_tokens` and a KV cache of type `kv`."""
    hp = bound.model.hp
    recurrent = any(layer.kind == "recurrent" for layer in bound.model.layers)
    sizes = dict(n_expert=hp.n_expert, n_expert_used=hp.n_expert_used, n_embd=hp.n_embd, n_ff_exp=hp.n_ff_exp)
    return Needs(n_tokens=n_tokens, kv=kv, recurrent=recurrent, **sizes, **bound.types)


def _types(weights) -> frozenset[str]:
    return frozenset(type(weight.quant).__name__ for weight in weights)


def _own(bound: dict, index: int) -> dict:
    """The tensors of one block under their short names: blk.3.attn_q.weight -> attn_q, blk.0.ssm_dt.bias -> ssm_dt_bias."""
    prefix = f"blk.{index}."
    names = [name for name in bound if name.startswith(prefix)]
    return {name.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): bound[name] for name in names}


def _tensor(file: GGUFFile, name: str, ops: Ops, t: T):
    """A matrix stays in its stored type; everything else becomes float32 values of the table's shape."""
    quant = TYPES[file.tensors[name].quant]
    stored = file.bytes(name)
    if t.is_matrix:
        return Weight(quant, t.shape, ops.upload(stored))
    return ops.upload(quant.dequantize(stored.reshape(-1, quant.nbytes)).reshape(t.shape).astype(np.float32))


def _experts(file: GGUFFile, hp: HParams) -> list[ExpertTensors]:
    """Where every layer's experts lie, checked against the model's sizes."""
    found, problems = [], []
    for layer in range(hp.n_layer):
        try:
            found.append(find_experts(file, layer, hp.n_expert))
        except UnsupportedModel as error:
            problems.append(str(error))
            continue
        shape, needed = found[-1].gate.shape, (hp.n_ff_exp, hp.n_embd)
        if shape != needed:
            problems.append(f"experts of layer {layer} are {list(shape)}, needs {list(needed)}")
    if problems:
        more = f" … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UnsupportedModel(f"{len(problems)} layers' experts do not fit {hp.arch}: " + "; ".join(problems[:8]) + more)
    return found


def _bank(file: GGUFFile, ops: Ops, experts: ExpertTensors) -> Bank:
    """A layer's experts where the mapped shards have them."""
    shards = tuple(ops.upload(file.mapping(i)) for i in range(len(file.paths)))
    return Bank(*(Slots(TYPES[m.quant], m.shape, shards, m.shard, m.offset) for m in experts))


def _check_types(types: dict[str, str]) -> None:
    """`types`: what is to be computed with -> its type's name."""
    unknown = [what for what, quant in types.items() if quant not in TYPES]
    if unknown:
        found = ", ".join(sorted({types[what] for what in unknown}))
        raise UnsupportedModel(
            f"{len(unknown)} tensors are of a type that is not supported ({found}; first: {unknown[0]}); "
            f"supported: {', '.join(TYPES)}"
        )


def _check_rope(file: GGUFFile, arch: str) -> None:
    scaling = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        raise UnsupportedModel(f"rope scaling '{scaling}' is not supported: convert without it (the trained context is enough)")
