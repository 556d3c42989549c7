"""Tensor names of GGUF: building and taking apart "blk.N.suffix" and the three ways in which experts are named.

Owns spelling only: which tensors a model has is in models/, where experts lie in layout.py.
"""

import re

_NUMBER = "(0|[1-9][0-9]*)"
BLOCK = re.compile(rf"blk\.{_NUMBER}\.(.+)")
STACKED = re.compile(rf"blk\.{_NUMBER}\.ffn_(gate|up|down)_exps\.weight")
FUSED = re.compile(rf"blk\.{_NUMBER}\.ffn_gate_up_exps\.weight")
EXPERT = re.compile(rf"blk\.{_NUMBER}\.ffn_(gate|up|down)\.{_NUMBER}\.weight")


def block(layer: int, suffix: str) -> str:
    """Name of a layer's tensor: block(3, "attn_q.weight") is "blk.3.attn_q.weight"."""
    return f"blk.{layer}.{suffix}"


def stacked(layer: int, kind: str) -> str:
    """Name of the tensor [n_expert, n_out, n_in] of all experts of a layer; kind is gate, up or down."""
    return f"blk.{layer}.ffn_{kind}_exps.weight"


def fused(layer: int) -> str:
    """Name of the tensor [n_expert, 2 * n_ff, n_embd] that holds each expert's gate rows, then its up rows."""
    return f"blk.{layer}.ffn_gate_up_exps.weight"


def expert(layer: int, kind: str, index: int) -> str:
    """Name of one expert's own tensor [n_out, n_in]; kind is gate, up or down."""
    return f"blk.{layer}.ffn_{kind}.{index}.weight"


def parse_block(name: str) -> tuple[int, str] | None:
    """(layer, suffix) of a tensor that belongs to a layer, else None."""
    match = BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def parse_stacked(name: str) -> tuple[int, str] | None:
    """(layer, kind) of a stacked expert tensor, else None."""
    match = STACKED.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def parse_fused(name: str) -> int | None:
    """The layer of a fused gate-and-up expert tensor, else None."""
    match = FUSED.fullmatch(name)
    return int(match[1]) if match else None


def parse_expert(name: str) -> tuple[int, str, int] | None:
    """(layer, kind, expert) of one expert's own tensor, else None."""
    match = EXPERT.fullmatch(name)
    return (int(match[1]), match[2], int(match[3])) if match else None


def is_expert(name: str) -> bool:
    """Does this tensor hold weights of routed experts, in any of the three forms?"""
    return any(form.fullmatch(name) for form in (STACKED, FUSED, EXPERT))
