"""Engines with few slots for experts, on tiny models: these are far below any real cap, so slots are chosen, not computed."""

from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

from convert import stock
from rgpu import Engine, EngineConfig, load
from rgpu.gguf import GGUFFile
from tests.gguf_forms import rewrite
from tests.tiny import stock_gguf

FORMS = ("stacked", "fused", "split", "per_expert")
N_EXPERT, K = 24, 3
FLOOR, SPARE = K + 2, 2 * K  # slots of a layer, and spare ones of a class: the least that is ever run with


def quant(name: str) -> str:
    """Layer 1's down matrices are of another type: two size classes."""
    return "Q5_0" if name == "blk.1.ffn_down_exps.weight" else "Q4_0" if "_exps" in name else "Q8_0"


def written(folder: Path, arch: str, form: str = "stacked") -> Path:
    """A model of 24 experts, 3 of them used, in one of FORMS."""
    keys = {f"{arch}.expert_count": N_EXPERT, f"{arch}.expert_used_count": K}
    source, out = stock_gguf(folder / f"{arch}.gguf", arch, quant, k=False, metadata=keys), folder / f"{arch}-{form}.gguf"
    if form == "per_expert":
        with GGUFFile(source) as file:
            stock.to_per_expert(file, out)
        return out
    return {"stacked": lambda: source, "fused": lambda: rewrite(source, out, fused=True),
            "split": lambda: rewrite(source, out, per_file=9)}[form]()  # fmt: skip


@contextmanager
def few_slots(share: int, spare: int = SPARE):
    """Engines that are opened with `ram` have so many slots per layer, and spare ones per class."""

    def slots_within(available, class_of, nbytes, n_expert, k):
        return [class_of.count(cls) * share + spare for cls in range(len(nbytes))], spare

    with mock.patch.object(load, "slots_within", slots_within):
        yield


def capped(path: Path, share: int, **wishes) -> Engine:
    """An engine under a cap that is never reached, with so many slots per layer."""
    with few_slots(share):
        return Engine(EngineConfig(path, **dict(ram="1T", n_ctx=256) | wishes))


def tokens(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 500, n)]


def assert_residents_are_whole(engine: Engine) -> None:
    """Every resident's slot holds the bytes that the file has, where kernels look for them; no slot has two residents."""
    arena, store = engine.cached.arena, engine.cached.store
    residents = np.argwhere(arena.table >= 0)
    assert len(residents)
    for layer, expert in residents:
        slot = arena.table[layer, expert]
        assert arena.key_in[slot] == layer * store.n_expert + expert
        for part, mapped in zip(store.banks[layer], store.mapped[layer], strict=True):
            assert part.addresses[slot] == part.data[0].ctypes.data + part.offset[slot]
            np.testing.assert_array_equal(part.weight(slot).data, mapped.weight(expert).data)
