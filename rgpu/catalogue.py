"""Models known by name: their published hyperparameters, and the tensors that follow from them.

For planning before a download. Tables that bind and convert a file are in models/; a test holds both against each other.
"""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace

from .errors import RgpuError
from .gguf import names
from .gguf.mix import FILE_TYPES, Mix
from .shapes import ModelShape, tensor


@dataclass(frozen=True)
class Params:
    """Hyperparameters under llama.cpp's names. Small vectors (norms, most biases) are left out: they decide nothing."""

    n_layer: int
    n_embd: int
    n_vocab: int
    n_head: int
    n_head_kv: int
    n_embd_head: int
    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    n_ctx_train: int = 131072
    n_ff_shexp: int = 0  # width of the shared experts together
    n_layer_dense_lead: int = 0  # layers before the first with experts …
    n_ff: int = 0  # … and the width of their feed-forward block
    n_swa: int = 0  # tokens that every second layer sees; 0: all
    interval: int = 1  # every interval-th layer has attention, the others a delta net of …
    n_k_head: int = 0
    n_v_head: int = 0
    n_embd_state: int = 0  # … heads of this size
    gated: int = 0  # 1: every head of the query has a gate of its size
    biased: int = 0  # 1: experts have biases
    arch: str = ""
    mix: str = "Q4_K_M"


MODELS = {
    "qwen3.6-35b-a3b": Params(
        n_layer=40, n_embd=2048, n_vocab=248320, n_head=16, n_head_kv=2, n_embd_head=256, n_expert=256, n_expert_used=8,
        n_ff_exp=512, n_ff_shexp=512, n_ctx_train=262144, interval=4, n_k_head=16, n_v_head=32, n_embd_state=128, gated=1,
        arch="qwen35moe",
    ),
    "qwen3-30b-a3b": Params(
        n_layer=48, n_embd=2048, n_vocab=151936, n_head=32, n_head_kv=4, n_embd_head=128, n_expert=128, n_expert_used=8,
        n_ff_exp=768, n_ctx_train=40960, arch="qwen3moe",
    ),
    "gpt-oss-20b": Params(
        n_layer=24, n_embd=2880, n_vocab=201088, n_head=64, n_head_kv=8, n_embd_head=64, n_expert=32, n_expert_used=4,
        n_ff_exp=2880, n_swa=128, biased=1, arch="gpt-oss", mix="MXFP4_MOE",
    ),
    "gpt-oss-120b": Params(
        n_layer=36, n_embd=2880, n_vocab=201088, n_head=64, n_head_kv=8, n_embd_head=64, n_expert=128, n_expert_used=4,
        n_ff_exp=2880, n_swa=128, biased=1, arch="gpt-oss", mix="MXFP4_MOE",
    ),
    "qwen3.5-397b-a17b": Params(
        n_layer=60, n_embd=4096, n_vocab=248320, n_head=32, n_head_kv=2, n_embd_head=256, n_expert=512, n_expert_used=10,
        n_ff_exp=1024, n_ff_shexp=1024, n_ctx_train=262144, interval=4, n_k_head=16, n_v_head=64, n_embd_state=128, gated=1,
        arch="qwen35moe",
    ),
    "glm-4.5-air": Params(
        n_layer=46, n_embd=4096, n_vocab=151552, n_head=96, n_head_kv=8, n_embd_head=128, n_expert=128, n_expert_used=8,
        n_ff_exp=1408, n_ff_shexp=1408, n_layer_dense_lead=1, n_ff=10944, arch="glm4moe",
    ),
}  # fmt: skip
N_CONV = 4  # taps of a delta net's convolution


def parse(text: str, base: Params | None) -> Params:
    """`n_layer=48,n_embd=2048,…`: changes to `base`, else all that has no default. RgpuError for what makes no sense."""
    kinds = {field.name: field.type for field in fields(Params)}
    given = {}
    for item in text.split(","):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in kinds:
            raise RgpuError(f"there is no hyperparameter '{key}' (there are: {', '.join(kinds)})")
        try:
            given[key] = kinds[key](value)
        except ValueError:
            raise RgpuError(f"{key} is '{value}', but must be a whole number") from None
    try:
        params = replace(base, **given) if base else Params(**given)
    except TypeError:
        missing = [f.name for f in fields(Params) if f.default is MISSING and f.name not in given]
        raise RgpuError(f"--params lacks {', '.join(missing)}; or name a model whose numbers they change") from None
    _check(params)
    return params


def _check(p: Params) -> None:
    optional = {f.name for f in fields(Params) if f.default == 0}
    numbers = {key: value for key, value in vars(p).items() if isinstance(value, int)}
    wrong = [f"{key} is {value}" for key, value in numbers.items() if value < (0 if key in optional else 1)]
    if p.n_expert_used > p.n_expert:
        wrong.append(f"{p.n_expert_used} experts used of {p.n_expert}")
    if p.interval > 1 and not (p.n_k_head and p.n_v_head and p.n_embd_state):
        wrong.append(f"interval is {p.interval}, so n_k_head, n_v_head and n_embd_state of the layers between are needed")
    if p.n_layer_dense_lead >= p.n_layer or (p.n_layer_dense_lead and not p.n_ff):
        wrong.append(f"{p.n_layer_dense_lead} of {p.n_layer} layers without experts, of width n_ff {p.n_ff}")
    if p.mix not in FILE_TYPES:
        wrong.append(f"mix is '{p.mix}' (there are: {', '.join(FILE_TYPES)})")
    if wrong:
        raise RgpuError("hyperparameters make no sense: " + "; ".join(wrong))


def shape(name: str, p: Params) -> ModelShape:
    """The model of these hyperparameters."""
    shapes = dict(tensors(p))
    choose = Mix(p.mix, p.n_layer, p.n_expert, p.n_head, p.n_head_kv, shapes).choose
    return ModelShape(
        name=name,
        arch=p.arch,
        mix=p.mix,
        n_layer=p.n_layer,
        n_head=p.n_head,
        n_head_kv=p.n_head_kv,
        n_expert=p.n_expert,
        n_expert_used=p.n_expert_used,
        n_ctx_train=p.n_ctx_train,
        tensors=tuple(tensor(name, each, choose(name, each)) for name, each in shapes.items()),
        state_size=p.n_embd_state,
        n_swa=p.n_swa,
    )


def tensors(p: Params) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every matrix, in the order of a file."""
    yield "token_embd.weight", (p.n_vocab, p.n_embd)
    yield "output.weight", (p.n_vocab, p.n_embd)
    for layer in range(p.n_layer):
        mixer = _attention if (layer + 1) % p.interval == 0 else _delta_net
        block = _dense if layer < p.n_layer_dense_lead else _experts
        for suffix, each in (*mixer(p), *block(p)):
            yield names.block(layer, suffix), each


def _attention(p: Params) -> Iterator[tuple[str, tuple[int, ...]]]:
    n_q, n_kv = p.n_head * p.n_embd_head, p.n_head_kv * p.n_embd_head
    yield "attn_q.weight", (n_q * (2 if p.gated else 1), p.n_embd)
    yield "attn_k.weight", (n_kv, p.n_embd)
    yield "attn_v.weight", (n_kv, p.n_embd)
    yield "attn_output.weight", (p.n_embd, n_q)


def _delta_net(p: Params) -> Iterator[tuple[str, tuple[int, ...]]]:
    n_key, n_value = p.n_k_head * p.n_embd_state, p.n_v_head * p.n_embd_state
    channels = 2 * n_key + n_value
    yield "attn_qkv.weight", (channels, p.n_embd)
    yield "attn_gate.weight", (n_value, p.n_embd)
    yield "ssm_beta.weight", (p.n_v_head, p.n_embd)
    yield "ssm_alpha.weight", (p.n_v_head, p.n_embd)
    yield "ssm_conv1d.weight", (channels, N_CONV)
    yield "ssm_out.weight", (p.n_embd, n_value)


def _dense(p: Params) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "ffn_gate.weight", (p.n_ff, p.n_embd)
    yield "ffn_up.weight", (p.n_ff, p.n_embd)
    yield "ffn_down.weight", (p.n_embd, p.n_ff)


def _experts(p: Params) -> Iterator[tuple[str, tuple[int, ...]]]:
    wide, tall = (p.n_ff_exp, p.n_embd), (p.n_embd, p.n_ff_exp)
    yield "ffn_gate_inp.weight", (p.n_expert, p.n_embd)
    for kind, each in (("gate", wide), ("up", wide), ("down", tall)):
        yield f"ffn_{kind}_exps.weight", (p.n_expert, *each)
        if p.biased:
            yield f"ffn_{kind}_exps.bias", (p.n_expert, each[0])
    if p.n_ff_shexp:
        yield "ffn_gate_shexp.weight", (p.n_ff_shexp, p.n_embd)
        yield "ffn_up_shexp.weight", (p.n_ff_shexp, p.n_embd)
        yield "ffn_down_shexp.weight", (p.n_embd, p.n_ff_shexp)
