"""The kernels' source for a device: which files make up a text, which texts a model needs, sizes that launches share with it."""

from functools import cache
from pathlib import Path

from ..quants import TYPES
from . import Needs

SOURCES = Path(__file__).parents[1]


@cache
def source(path: str) -> str:
    return (SOURCES / path).read_text()


def text(op: str, **defines) -> str:
    """The source of an op: what all share, the types that it is defined for, the definitions, its kernels."""
    quants = dict.fromkeys(value for value in defines.values() if value in TYPES)
    parts = ["kernels/common.cuh", *(f"quants/{name.lower()}.cuh" for name in ("blocks", "activations", *quants))]
    tools = ["kernels/matvec.cuh", "kernels/tile.cuh"] if op in ("matmul", "experts") else []
    lines = [f"#define {name} {value}\n" for name, value in defines.items()]
    return "".join([*map(source, parts), *lines, *map(source, tools), source(f"kernels/{op}.cu")])


def jobs(needs: Needs) -> list[tuple[str, dict]]:
    """(op, defines) of every text that a model needs."""
    found = [(op, {}) for op in ("elementwise", "matmul", "experts", "sample", "post")]
    found += [("elementwise", {"KV": needs.kv}), ("attention", {"KV": needs.kv, "HEAD": needs.n_embd_head})]
    found += [("recurrent", {"HEAD": needs.recurrent})] if needs.recurrent else []
    found += [("elementwise", {"WEIGHT": name}) for name in sorted(needs.embeddings)]
    found += [("matmul", {"WEIGHT": name}) for name in sorted(needs.matrices)]
    pairs = needs.gate_up or {(name, name) for name in needs.experts}
    found += [("experts", {"GATE": gate, "UP": up}) for gate, up in sorted(pairs)]
    products = {name for pair in pairs for name in pair} | (needs.down or needs.experts)
    found += [("experts", {"WEIGHT": name}) for name in sorted(products)]
    return found


# ---- what kernels/matvec.cuh says, too ----


def up(a: int, b: int) -> int:
    return -(-a // b)


def warp_bytes(quant) -> int:
    """Shared memory of a warp in the kernels for few tokens (kernels/matvec.cuh, WARP_BYTES): 256 weights of 16 rows."""
    if quant.block == 1:
        return 0
    return 16 * (16 * up(256 // quant.block * quant.nbytes, 16) + (16 if quant.nbytes % 16 else 0))


def group_rows(quant, columns: int) -> int:
    """Rows that a warp takes at once there."""
    if quant.block == 1:
        return 1
    runs = columns // 32
    lanes = 32 if runs % 32 == 0 or runs > 64 else 16 if runs % 16 == 0 or runs > 32 else 8
    return 2 * 32 // lanes
