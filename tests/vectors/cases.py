"""The models whose types mix_llamacpp.json holds: shapes only, read by the maker of that file and by its test."""

from rgpu.models import architectures
from tests.tiny import VOCAB, tiny_metadata

LETTERS = {
    **{".": "F32", "h": "F16", "b": "BF16", "8": "Q8_0", "6": "Q6_K", "5": "Q5_K", "4": "Q4_K", "3": "Q3_K", "2": "Q2_K"},
    **{"p": "Q4_0", "q": "Q4_1", "r": "Q5_0", "s": "Q5_1", "x": "IQ4_XS", "n": "IQ4_NL", "m": "MXFP4"},
}
CASES = [
    # Many query heads to one of K and V; n // 8 = 2.
    {"arch": "qwen35moe", "k": True, "block_count": 16, "expert_count": 16, "attention.head_count": 8},
    # The MTP block is one of the layers that the rules count.
    {"arch": "qwen35moe", "k": True, "block_count": 13, "expert_count": 16, "nextn_predict_layers": 1},
    # Mixtral's number of experts has rules of its own.
    {"arch": "qwen35moe", "k": True, "block_count": 8, "expert_count": 8},
    # Rows of 16, 32, 64, 96 weights.
    {"arch": "qwen35moe", "k": False, "block_count": 8, "expert_count": 16, "expert_feed_forward_length": 16},
    # A tied head; long rows that are no multiple of 256.
    {"arch": "qwen3moe", "k": True, "block_count": 24, "expert_count": 16, "tied": True},
    {"arch": "qwen3moe", "k": True, "block_count": 4, "expert_count": 16, "tied": True, "embedding_length": 2880},
]


def tensors(case: dict) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """Metadata and {name: shape} of a case."""
    arch = case["arch"]
    changed = {f"{arch}.{key}": value for key, value in case.items() if key not in ("arch", "k", "tied")}
    keys = tiny_metadata(arch, case["k"]) | changed
    model = architectures()[arch]
    table = model.tensors(model.hparams(keys, VOCAB))
    return keys, {t.name: t.shape for t in table if not (case.get("tied") and t.name == "output.weight")}
