"""Which tensor gets which type: the rules by which llama.cpp mixes types within one quantised file.

Owns names and rules only; the encoders are in convert/quantize. The rules are those of llama-quant.cpp without an importance
matrix, and for F16, BF16 and F32 those of the converter; tests hold them against llama.cpp's own choices.
"""

import re
from collections.abc import Iterable

FILE_TYPES = {  # mix -> general.file_type
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_XS": 30, "BF16": 32, "MXFP4_MOE": 38,
}  # fmt: skip
# Those that can be written: `quantize` has an encoder for every type in them.
MIXES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
)  # fmt: skip

FLOATS = ("F32", "F16", "BF16")
# Next best where a row is no multiple of 256 weights; no multiple of 32 either: F16.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL"}
# Matrices that stay F32 whatever is asked: small, and precious or not multiplied by.
FULL_PRECISION = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight", "shortconv.conv.weight")
ATTENTION_VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")


def file_type(mix: str) -> int:
    """The value of `general.file_type` for a mix."""
    return FILE_TYPES[mix]


class Mix:
    """The types of one model's tensors, under their stacked names; every expert has the type of its stack."""

    def __init__(self, mix: str, n_layer: int, n_expert: int, n_head: int, n_head_kv: int, names: Iterable[str]):
        """`n_layer` counts the MTP block too; `names` are all the model's tensors, in any order."""
        names = set(names)
        self.mix = mix
        self.base = {"MXFP4_MOE": "MXFP4"}.get(mix, re.sub("_[SM]$", "", mix))
        self.n_layer = n_layer
        self.n_expert = n_expert
        self.shared_heads = n_head // max(n_head_kv, 1) >= 4  # a wrong bit of K or V reaches many query heads
        self.head = "output.weight" if "output.weight" in names else "token_embd.weight"
        values = sorted((layer(name), name) for name in names if name.endswith(ATTENTION_VALUES))
        self.values = {name: i for i, (_, name) in enumerate(values)}

    def choose(self, name: str, shape: tuple[int, ...]) -> str:
        """The ggml type name for a tensor of `shape` (NumPy order)."""
        is_vector = len(shape) < 2 or max(shape[:-1]) == 1
        if is_vector or not name.endswith("weight") or name.endswith(FULL_PRECISION):
            return "F32"
        if self.mix in FLOATS:
            return self.mix
        quant = self._by_role(name, shape)
        if quant in FALLBACK and shape[-1] % 256:
            quant = FALLBACK[quant]
        return quant if shape[-1] % 32 == 0 else "F16"

    def _by_role(self, name: str, shape: tuple[int, ...]) -> str:
        if name == self.head:
            return "Q8_0" if self.mix in ("Q8_0", "MXFP4_MOE") else "Q6_K"
        if self.mix == "MXFP4_MOE":
            return "MXFP4" if len(shape) == 3 else "Q8_0"
        if name in self.values:
            return "Q8_0" if self.n_expert == 8 else self._of_values(self.values[name], len(self.values))
        if name.endswith("attn_k.weight") and self.n_expert == 8:
            return "Q8_0"
        if "ffn_down" in name:
            return self._of_ffn_down(layer(name), self.n_layer)
        if name.endswith("attn_output.weight"):
            return self._of_attn_output()
        return self.base

    def _of_values(self, i: int, n: int) -> str:
        match self.mix:
            case "Q4_K_M" | "Q5_K_M" if more_bits(i, n):
                return "Q6_K"
            case "Q4_K_S" if i < 4:
                return "Q5_K"
            case "Q3_K_M":
                return "Q5_K" if i < 2 else "Q4_K"
            case "Q2_K":
                return "Q4_K" if self.shared_heads else "Q3_K"
            case "IQ4_XS" if self.shared_heads:
                return "Q5_K"
        return self.base

    def _of_ffn_down(self, i: int, n: int) -> str:
        match self.mix:
            case "Q4_K_M" | "Q5_K_M" if more_bits(i, n):
                return "Q6_K"
            case "Q4_K_S" | "IQ4_XS" if i < n // 8:
                return "Q5_K"
            case "Q3_K_M":
                return "Q5_K" if i < n // 16 else "Q4_K"
            case "Q2_K":
                return "Q3_K"
        return self.base

    def _of_attn_output(self) -> str:
        if self.n_expert == 8:
            return "Q5_K" if self.base in ("Q2_K", "Q3_K", "Q4_K", "IQ4_XS") else self.base
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(self.mix, self.base)


def more_bits(i: int, n: int) -> bool:
    """Whether the i-th of n is among the first and last eighth, or every third between: there the loss hurts most."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def layer(name: str) -> int:
    """N of blk.N.x, -1 without one."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1
